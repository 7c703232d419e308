"""The address of a client, behind proxies that are trusted and headers that are not.

Each proxy adds to the right of `X-Forwarded-For` (or `Forwarded`, RFC 7239) the address that it
was called from. So only what trusted proxies added is true: the list is walked from the right, and
the first address that is none of theirs is the client. What stands left of it, anybody wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from ..errors import InvalidSetting

ForwardedHeader = Literal["x-forwarded-for", "forwarded"]
Header = Callable[[str], Sequence[str]]
"""The values of a header, by its lower-case name, in the order in which they came."""

UNIX = "unix"
_LONGEST_LIST = 4096  # characters, from the right: nobody has that many proxies

_with_port = re.compile(r"\[([^\]]*)\](?::\d{1,5})?|([0-9.]+):\d{1,5}")
_pair = re.compile(r'([A-Za-z]+)\s*=\s*(?:"([^"\\]*)"|([^";\s]*))')

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network


class ClientAddress:
    """Finds the client's address of a request.

    trusted_proxies: addresses and networks (CIDR) of the proxies that stand before the server, and
        "unix" for peers at a Unix socket. Without any, the peer is the client.
    forwarded_header: the header that these proxies set, if they let clients send the other one
        ("x-forwarded-for" or "forwarded"). None: whichever is there; where both are and they do
        not agree, one of them is forged, and the address is that of the peer.

    Raises InvalidSetting.
    """

    def __init__(
        self, trusted_proxies: Iterable[str] = (), forwarded_header: ForwardedHeader | None = None
    ) -> None:
        if isinstance(trusted_proxies, str | bytes) or not isinstance(trusted_proxies, Iterable):
            raise InvalidSetting("trusted_proxies", trusted_proxies, "must be a list of networks")
        networks = list(trusted_proxies)
        self._trusts_unix = UNIX in networks
        try:
            self._networks = [_network(each) for each in networks if each != UNIX]
        except ValueError:
            reason = 'must be addresses or networks such as "10.0.0.0/8", or "unix"'
            raise InvalidSetting("trusted_proxies", networks, reason) from None
        self._readers: dict[str, Callable[[str], list[str]]] = {
            "x-forwarded-for": _hops_of_list,
            "forwarded": _hops_of_forwarded,
        }
        if forwarded_header is not None:
            if forwarded_header not in list(self._readers):
                reason = 'must be "x-forwarded-for", "forwarded" or None'
                raise InvalidSetting("forwarded_header", forwarded_header, reason)
            self._readers = {forwarded_header: self._readers[forwarded_header]}

    def of(self, peer: str, header: Header) -> str:
        """The client's address, of the peer (an address, with a port or without; "unix" or "" for a
        Unix socket) and the headers of a request; "" where nothing is known.
        """
        address = parse_address(peer)
        shown = "" if address is None else str(address)
        if not self._is_trusted(peer, address):
            return shown
        clients = set()
        for name, read in self._readers.items():
            values = header(name)
            if values:
                clients.add(self._walk(shown, read(",".join(values)[-_LONGEST_LIST:])))
        return clients.pop() if len(clients) == 1 else shown

    def _walk(self, peer: str, hops: list[str]) -> str:
        client = peer
        for hop in reversed(hops):
            address = parse_address(hop)
            if address is None:  # "unknown", a name, or nonsense: what is right of it is all we know
                break
            client = str(address)
            if not self._is_trusted(hop, address):
                break
        return client

    def _is_trusted(self, peer: str, address: _Address | None) -> bool:
        if address is None:
            return self._trusts_unix and peer in ("", UNIX)
        return any(address in network for network in self._networks)


def parse_address(text: str) -> _Address | None:
    """An address with or without a port and brackets; None where it is none.

    An IPv4 address that is mapped into IPv6 is given as what it is; the zone of an IPv6 address,
    which may be any text and means something on one machine only, is left out.
    """
    text = text.strip()
    if match := _with_port.fullmatch(text):
        text = match[1] or match[2] or ""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or IPv6Address(int(address))
    return address


def _network(text: object) -> _Network:
    network = ip_network(str(text), strict=False)
    if isinstance(network, IPv6Network) and (mapped := network.network_address.ipv4_mapped):
        return IPv4Network((mapped, network.prefixlen - 96))
    return network


def _hops_of_list(value: str) -> list[str]:
    return value.split(",")


def _hops_of_forwarded(value: str) -> list[str]:
    # Split at every comma, quoted or not: a client that opens a quote must not swallow what the
    # proxy behind it has added. No address has a comma in it.
    return [_for_of(element) for element in value.split(",")]


def _for_of(element: str) -> str:
    hops = []
    for pair in element.split(";"):
        match = _pair.fullmatch(pair.strip())
        if match is None:
            return "unknown"
        if match[1].lower() == "for":
            hops.append(match[2] or match[3] or "")
    return hops[0] if len(hops) == 1 else "unknown"
