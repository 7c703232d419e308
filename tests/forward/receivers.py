"""Real syslog receivers on loopback: rsyslog and syslog-ng, each writing what it got to files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import orjson
import pytest
import trustme

from tests.conftest import ROOT
from tests.helpers import until

Transport = Literal["udp", "tcp", "tls", "mutual"]
TRANSPORTS: tuple[Transport, ...] = ("udp", "tcp", "tls", "mutual")
KINDS = ("syslog", "lines")
MAX_MESSAGE_BYTES = 2 << 20

_UNPACKED = ROOT / ".receivers"  # where scripts/receivers puts what the machine has not installed
# Below the ports that a kernel gives to clients: a receiver that was killed finds its own free again.
_PORTS = range(20_000, 32_000)


class Receiver:
    """A receiver in a process of its own. Its ports and files stay its own over restarts.

    `ca_file` says whom to trust for `tls`; `mutual`, TLS too, asks for `cert_file` and `key_file`.
    """

    program: ClassVar[str]

    def __init__(self, directory: Path) -> None:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:{_UNPACKED}/usr/sbin"
        found = shutil.which(self.program, path=path)
        if found is None:
            pytest.skip(f"{self.program} is not installed; scripts/receivers gets it")
        self.directory = directory / self.program
        self.directory.mkdir()
        self._path = Path(found)
        self._process: subprocess.Popen[bytes] | None = None
        free = filter(_is_free, random.sample(_PORTS, len(_PORTS)))
        self._ports = {(transport, kind): next(free) for transport in TRANSPORTS for kind in KINDS}
        self._make_certificates()
        config = self._config().replace("HERE", str(self.directory))
        self._file("conf").write_text(config.replace("LIMIT", str(MAX_MESSAGE_BYTES)))
        self._file("log").touch()

    @property
    def ca_file(self) -> str:
        return str(self._file("ca.pem"))

    @property
    def cert_file(self) -> str:
        return str(self._file("client.pem"))

    @property
    def key_file(self) -> str:
        return str(self._file("client.key"))

    def endpoint(self, transport: Transport, format: str = "syslog") -> str:  # noqa: A002 - a word of ours
        """Where it listens for messages of a format."""
        scheme = "tls" if transport == "mutual" else transport
        return f"{scheme}://127.0.0.1:{self._ports[transport, 'syslog' if format == 'syslog' else 'lines']}/"

    def syslog(self) -> list[dict[str, Any]]:
        """What came as syslog, parsed: pri, time, host, app, msgid, sd and msg, whose JSON is `event`."""
        messages = [orjson.loads(line) for line in _lines(self._file("syslog"))]
        for message in messages:
            message |= {"pri": int(message["pri"]), "time": datetime.fromisoformat(message["time"])}
        return messages

    def lines(self) -> list[bytes]:
        """What came as lines, as it came."""
        return _lines(self._file("lines"))

    def start(self) -> Self:
        """Run, and wait until it listens on all ports. Also after `kill` and `terminate`."""
        assert self._process is None
        command = [str(self._path), *self._arguments()]
        with self._file("log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=os.environ | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._listens)
        return self

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Let it stand still; the kernel goes on to accept for it."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, if it still runs."""
        if self._process:
            self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _config(self) -> str:
        raise NotImplementedError

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _file(self, name: str) -> Path:
        return self.directory / name

    def _make_certificates(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self._file("ca.pem"))
        for name, certificate in (
            ("server", authority.issue_cert("127.0.0.1", "localhost")),
            ("client", authority.issue_cert("client.example.com")),
        ):
            certificate.private_key_pem.write_to_path(self._file(f"{name}.key"))
            for pem in certificate.cert_chain_pems:
                pem.write_to_path(self._file(f"{name}.pem"), append=True)

    def _environment(self) -> dict[str, str]:
        if not self._path.is_relative_to(_UNPACKED):
            return {}
        libraries = [_UNPACKED / "usr/lib/syslog-ng", *_UNPACKED.glob("usr/lib/*-linux-*")]
        libraries += _UNPACKED.glob("lib/*-linux-*")
        return {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}

    def _listens(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self._file("log").read_text()
        # Those for UDP it opens before; a look at one could be in its way.
        return all(_is_open(port) for (transport, _), port in self._ports.items() if transport != "udp")

    def _end(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)
        self.resume()  # or it stands still for ever
        self._process.wait()
        self._process = None


class Rsyslog(Receiver):
    """rsyslog, without a queue: what it has read is in the file before it reads on."""

    program = "rsyslogd"

    def _config(self) -> str:
        inputs = []
        for kind in KINDS:
            framing = "on" if kind == "syslog" else "off"
            common = f'address="127.0.0.1" ruleset="{kind}" port='
            tcp = f'type="imtcp" supportOctetCountedFraming="{framing}" {common}'
            tls = f'streamDriver.name="ossl" streamDriver.mode="1" {tcp}'
            inputs += [
                f'input(type="imudp" rcvbufSize="4m" {common}"{self._ports["udp", kind]}")',
                f'input({tcp}"{self._ports["tcp", kind]}")',
                f'input(streamDriver.authMode="anon" {tls}"{self._ports["tls", kind]}")',
                f'input(streamDriver.authMode="x509/certvalid" {tls}"{self._ports["mutual", kind]}")',
            ]
        return _RSYSLOG + "\n".join(inputs) + "\n"

    def _arguments(self) -> list[str]:
        # The driver for TLS may be unpacked, and the rest installed.
        roots = [_UNPACKED] if self._path.is_relative_to(_UNPACKED) else [Path("/"), _UNPACKED]
        modules = [str(path) for root in roots for path in root.glob("usr/lib/*/rsyslog")]
        return ["-n", "-C", "-i", "NONE", "-f", str(self._file("conf")), "-M", ":".join(modules)]


# Without the first of its settings, an error in the rest would make it collect the machine's own messages.
_RSYSLOG = r"""
global(
    abortOnUncleanConfig="on"
    workDirectory="HERE"
    maxMessageSize="LIMIT"
    parser.escapeControlCharactersOnReceive="off"
    defaultNetstreamDriverCAFile="HERE/ca.pem"
    defaultNetstreamDriverCertFile="HERE/server.pem"
    defaultNetstreamDriverKeyFile="HERE/server.key"
)
module(load="imudp")
module(load="imtcp" maxFrameSize="LIMIT")
module(load="mmpstrucdata")
module(load="mmjsonparse")
template(name="time" type="list") { property(name="timereported" dateFormat="rfc3339") }
template(name="parsed" type="list") { property(name="$!all-json-plain") constant(value="\n") }
template(name="raw" type="list") { property(name="rawmsg") constant(value="\n") }
ruleset(name="syslog" queue.type="Direct") {
    action(type="mmpstrucdata" jsonRoot="!structured" sd_name.lowercase="off")
    action(type="mmjsonparse" container="!event")
    set $!sd = $!structured!rfc5424-sd;
    unset $!structured;
    set $!pri = $pri;
    set $!time = exec_template("time");
    set $!host = $hostname;
    set $!app = $app-name;
    set $!msgid = $msgid;
    set $!msg = $msg;
    action(type="omfile" file="HERE/syslog" template="parsed")
}
ruleset(name="lines" queue.type="Direct") {
    action(type="omfile" file="HERE/lines" template="raw")
}
"""


class SyslogNg(Receiver):
    """syslog-ng, which reads on only as fast as it writes."""

    program = "syslog-ng"

    def _config(self) -> str:
        key_pair = 'key-file("HERE/server.key") cert-file("HERE/server.pem")'
        client = 'ca-file("HERE/ca.pem") peer-verify(required-trusted)'
        options = {
            "udp": "transport(udp) so-rcvbuf(4194304)",
            "tcp": "transport(tcp)",
            "tls": f"transport(tls) tls({key_pair} peer-verify(optional-untrusted))",
            "mutual": f"transport(tls) tls({key_pair} {client})",
        }
        config = ["@version: 3.35"]
        for kind, driver in (("syslog", "syslog("), ("lines", "network(flags(no-parse) ")):
            config.append(f"source s_{kind} {{")
            for transport in TRANSPORTS:
                port = self._ports[transport, kind]
                config.append(f"    {driver}ip(127.0.0.1) port({port}) {options[transport]});")
            config.append("};")
        return "\n".join(config) + _SYSLOG_NG

    def _arguments(self) -> list[str]:
        # The path of a socket must be short: it begins at the working directory.
        own = ["-R", str(self._file("persist")), "-p", str(self._file("pid")), "-c", "control"]
        if self._path.is_relative_to(_UNPACKED):
            own += ["--module-path", ":".join(map(str, _UNPACKED.glob("usr/lib/syslog-ng/*/")))]
        return ["-F", "--no-caps", "--stderr", "-f", str(self._file("conf")), *own]


_SYSLOG_NG = r"""
options { log-msg-size(LIMIT); keep-hostname(yes); use-dns(no); stats-freq(0); };
parser p_event { json-parser(marker("@cee: ") prefix("event.")); };
template t_parsed {
    template("$(format-json pri=$PRI time=$S_ISODATE host=$HOST app=$PROGRAM msgid=$MSGID msg=$MSG
        --key event.* --key .SDATA.* --rekey .SDATA.* --shift 7 --add-prefix sd.)\n");
};
destination d_syslog { file("HERE/syslog" template(t_parsed) frac-digits(3)); };
destination d_lines { file("HERE/lines" template("$MSG\n")); };
log {
    source(s_syslog);
    if { parser(p_event); };
    destination(d_syslog);
    flags(flow-control);
};
log { source(s_lines); destination(d_lines); flags(flow-control); };
"""


def _lines(path: Path) -> list[bytes]:
    with suppress(FileNotFoundError):
        return path.read_bytes().split(b"\n")[:-1]  # what is behind the last newline is still being written
    return []


def _is_free(port: int) -> bool:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        try:
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
