from __future__ import annotations

import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditlog.capture.address import ClientAddress, parse_address
from auditlog.errors import InvalidSetting

TRUSTED = ["10.0.0.0/8", "fd00::/8"]
LISTED, FORWARDED = "x-forwarded-for", "forwarded"

Address = IPv4Address | IPv6Address
Headers = dict[str, list[str]]


def plain(address: Address) -> str:
    """An address as the log has it."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def is_trusted(address: Address) -> bool:
    return any(ip_address(plain(address)) in ip_network(network) for network in TRUSTED)


def forms(address: Address) -> list[str]:
    """How proxies write an address into a list."""
    if isinstance(address, IPv6Address):
        return [f"{address}", f"[{address}]", f"[{address}]:8080", str(address).upper()]
    return [f"{address}", f"{address}:8080", f"::ffff:{address}", f"[::ffff:{address}]:1"]


clients = st.ip_addresses().filter(lambda address: not is_trusted(address))
proxies = st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="fd00::/8")

# What a client may think of: addresses of its choice, the proxies' own, and the syntax of both headers.
THOUGHT_OF = """203.0.113.66 [2001:db8::bad]:80 ::ffff:203.0.113.66 10.0.0.1 fd00::1 unknown _hidden unix
    for=203.0.113.66 for="[2001:db8::bad]" For=203.0.113.66 for=10.0.0.1;proto=http
    for= for=" host=" by= :80 " , ; \\ = % [ ]""".split()  # noqa: SIM905 - a line each is too long
forged = st.lists(
    st.sampled_from([*THOUGHT_OF, " ", "\t", "\x1b", "é"])
    | st.text(st.characters(exclude_characters="\r\n"), max_size=8),
    max_size=20,
).map("".join)
huge = st.sampled_from(["203.0.113.66, ", "for=203.0.113.66, ", '"', "a", " ", "10.0.0.1,", "[" * 9, "for=;"])
well_formed = st.lists(
    st.sampled_from(["203.0.113.66", "10.0.0.1", "fd00::1", "[2001:db8::bad]:80"]), min_size=1
)
values = well_formed.map(", ".join) | well_formed.map(lambda hops: ", ".join(f'for="{hop}"' for hop in hops))
values |= forged | st.builds(lambda unit, end: unit * 5000 + end, huge, forged)
lines = st.lists(values, max_size=3)


@st.composite
def appended(draw: Any, style: str, address: Address, host: st.SearchStrategy[str] | None = None) -> str:
    """What an honest proxy adds for the address that it was called from."""
    form = draw(st.sampled_from(forms(address)))
    if style == LISTED:
        return str(form)
    name = draw(st.sampled_from(["for", "For", "FOR"]))
    quoted = ":" in form or draw(st.booleans())
    pairs = [f'{name}="{form}"' if quoted else f"{name}={form}"]
    pairs += draw(st.lists(st.sampled_from(["proto=https", "by=10.0.0.9", 'by="[fd00::9]"']), max_size=2))
    if host is not None:
        text = draw(host).replace("\\", "\\\\").replace('"', '\\"')
        pairs.append(f'host="{text}"')
    separator: str = draw(st.sampled_from([";", "; "]))
    return separator.join(draw(st.permutations(pairs)))


@st.composite
def chains(draw: Any, styles: list[str], host: st.SearchStrategy[str] | None = None) -> list[Any]:
    """The addresses from client to peer; what each proxy adds: header, text, on a line of its own?"""
    hops = [draw(clients), *draw(st.lists(proxies, min_size=1, max_size=4))]
    added = []
    for caller in hops[:-1]:
        style = draw(st.sampled_from(styles))
        added.append((style, draw(appended(style, caller, host)), draw(st.booleans())))
    return [hops, added]


def sent(headers: Headers, added: list[tuple[str, str, bool]]) -> Callable[[str], list[str]]:
    """The headers of a client, as they arrive behind the proxies."""
    arriving = {name: list(values) for name, values in headers.items()}
    for name, text, own_line in added:
        present = arriving.setdefault(name, [])
        if own_line or not present:
            present.append(text)
        else:
            present[-1] += f", {text}"
    return lambda name: arriving.get(name, [])


@settings(deadline=None)
@given(lines, st.one_of(chains([LISTED]), chains([FORWARDED])), st.booleans())
def test_whatever_a_client_sends_its_own_address_is_found(
    made_up: list[str], chain: list[Any], fixed: bool
) -> None:
    (hops, added) = chain
    style: Any = added[0][0]
    address = ClientAddress(TRUSTED, style if fixed else None)
    assert address.of(str(hops[-1]), sent({style: made_up}, added)) == plain(hops[0])


@settings(deadline=None)
@given(lines, lines, st.one_of(chains([LISTED]), chains([FORWARDED])))
def test_a_fixed_header_is_the_only_one_that_counts(
    made_up: list[str], other: list[str], chain: list[Any]
) -> None:
    (hops, added) = chain
    style: Any = added[0][0]
    header = sent({LISTED: other, FORWARDED: other} | {style: made_up}, added)
    assert ClientAddress(TRUSTED, style).of(str(hops[-1]), header) == plain(hops[0])


@settings(deadline=None)
@given(lines, lines, st.one_of(chains([LISTED]), chains([FORWARDED])))
def test_a_client_that_sends_both_headers_can_only_hide_behind_the_nearest_proxy(
    listed: list[str], forwarded: list[str], chain: list[Any]
) -> None:
    (hops, added) = chain
    found = ClientAddress(TRUSTED).of(str(hops[-1]), sent({LISTED: listed, FORWARDED: forwarded}, added))
    assert found in (plain(hops[0]), plain(hops[-1]))


@settings(deadline=None)
@given(lines, lines, chains([LISTED, FORWARDED], host=forged))
def test_no_mixture_of_headers_and_host_names_gives_an_address_of_the_clients_choice(
    listed: list[str], forwarded: list[str], chain: list[Any]
) -> None:
    (hops, added) = chain
    found = ClientAddress(TRUSTED).of(str(hops[-1]), sent({LISTED: listed, FORWARDED: forwarded}, added))
    assert found in {plain(hop) for hop in hops}


@pytest.mark.parametrize("end", ['"', '";proto=https', '" ; by=10.0.0.9'])
@pytest.mark.parametrize(
    "host",
    ["a;for=H", "a;for=H;b", "a, for=H", "a, for=H;", "a, for=H;b=c", "a, for=H, b", "a, for=H;b=\\\\"],
)
def test_a_host_name_that_a_proxy_quotes_is_not_taken_for_an_address(host: str, end: str) -> None:
    element = 'for=192.0.2.1;host="' + host.replace("H", "203.0.113.66") + end
    for values in ([element], [element, "for=10.0.0.7"], [element + ", for=10.0.0.7"]):
        found = ClientAddress(TRUSTED).of("10.0.0.1", sent({FORWARDED: values}, []))
        assert found in ("192.0.2.1", "10.0.0.7", "10.0.0.1")


networks = st.builds(
    lambda *network: ip_network(network, strict=False), st.ip_addresses(), st.integers(0, 32)
)


@settings(deadline=None)
@given(st.ip_addresses() | st.just(""), st.lists(networks, max_size=3))
def test_headers_of_a_peer_that_is_not_trusted_are_never_read(peer: Any, networks: list[Any]) -> None:
    def header(name: str) -> list[str]:
        raise AssertionError

    normal = parse_address(str(peer))
    trusted = [str(network) for network in networks if normal is not None and normal not in network]
    assert ClientAddress(trusted).of(str(peer), header) == ("" if normal is None else str(normal))


@settings(deadline=None)
@given(st.text())
def test_any_peer_gives_an_address_or_nothing(peer: str) -> None:
    found = ClientAddress().of(peer, lambda name: ["203.0.113.66"])
    assert found == "" or parse_address(found) is not None


@pytest.mark.parametrize("peer", ["", "unix"])
def test_a_peer_at_a_unix_socket_is_believed_only_where_that_is_trusted(peer: str) -> None:
    def header(name: str) -> list[str]:
        return ["203.0.113.66, 192.0.2.1"] if name == LISTED else []

    assert ClientAddress(["unix"]).of(peer, header) == "192.0.2.1"
    assert ClientAddress(["unix", "192.0.2.0/24"]).of(peer, header) == "203.0.113.66"
    assert ClientAddress(["10.0.0.0/8"]).of(peer, header) == ""
    assert ClientAddress(["unix"]).of("unknown", header) == ""
    assert ClientAddress(["unix"]).of("10.0.0.1", header) == "10.0.0.1"


@pytest.mark.parametrize("hidden", ["unknown", "_hidden", "for=unknown", 'for="_proxy:80"', "", "nonsense"])
def test_what_stands_left_of_a_hidden_address_is_not_believed(hidden: str) -> None:
    address = ClientAddress(TRUSTED)
    for name, near in ((LISTED, "10.0.0.7"), (FORWARDED, "for=10.0.0.7")):
        header = sent({name: ["203.0.113.66", hidden, near]}, [])
        assert address.of("10.0.0.1", header) == "10.0.0.7"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1:80 ", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:65535", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("fe80::1%\x1b[31m", "fe80::1"),
        ("[::ffff:192.0.2.1%" + "x" * 3000 + "]", "192.0.2.1"),
    ],
)
def test_an_address_has_one_spelling(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


NO_ADDRESSES = """unknown _x localhost 1.2.3 1.2.3.4.5 01.2.3.4 1.2.3.4%x 1.2.3.4: 1.2.3.4:123456
    [::1 ::1] [] [::1]: [::1]x ::1% ::1%a%b ١.2.3.4""".split()  # noqa: SIM905


@pytest.mark.parametrize("text", [*NO_ADDRESSES, "", "1.2.3.4 5.6.7.8", "\x00"])
def test_what_is_no_address_is_none(text: str) -> None:
    assert parse_address(text) is None


def test_networks_may_be_written_as_addresses_with_host_bits_or_mapped() -> None:
    header = sent({LISTED: ["192.0.2.1"]}, [])
    for trusted in ("10.0.0.1", "10.1.2.3/8", "::ffff:10.0.0.1", "::ffff:10.0.0.0/104"):
        for peer in ("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1:80"):
            assert ClientAddress([trusted]).of(peer, header) == "192.0.2.1"
    assert ClientAddress(["::ffff:10.0.0.0/104"]).of("11.0.0.1", header) == "11.0.0.1"


NO_NETWORKS: list[Any] = [
    "",
    "*",
    "10.0.0",
    "10.0.0.0/33",
    "10.0.0.0/8,11.0.0.0/8",
    "unix:",
    "proxy.internal",
]
NO_NETWORKS += [None, 5, b"\x0a\0\0\1", ["10.0.0.1"]]


@pytest.mark.parametrize(
    "trusted",
    ["10.0.0.0/8", b"10.0.0.1", None, 5, True, ["10.0.0.1", None], *([each] for each in NO_NETWORKS)],
)
def test_proxies_that_are_no_networks_are_refused(trusted: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        ClientAddress(trusted)
    assert caught.value.setting == "trusted_proxies"


@pytest.mark.parametrize("header", ["", "X-Forwarded-For", "x-real-ip", 5, ["forwarded"]])
def test_a_header_that_nobody_knows_is_refused(header: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        ClientAddress((), header)
    assert caught.value.setting == "forwarded_header"


@pytest.mark.parametrize(
    "value", ["a=" + " " * 5000 + '"', " " * 5000, "for=" * 2000, "[" * 5000, ";" * 5000, "," * 100_000]
)
def test_no_header_takes_long_to_read(value: str) -> None:
    address = ClientAddress(TRUSTED)
    began = time.process_time()
    for _ in range(50):
        address.of("10.0.0.1", sent({LISTED: [value], FORWARDED: [value]}, []))
    assert time.process_time() - began < 1.5
