"""`auditlog forward` as its users call it: real processes, receivers and terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from auditlog import AuditLogger
from auditlog.storage.files import Files
from auditlog.storage.layout import Position
from auditlog.storage.progress import Place, Progress
from tests.cli.conftest import Run
from tests.conftest import ROOT, Start
from tests.forward.sinks import Stream, free_port
from tests.helpers import line, until, write_day

DAY = "2024-08-12"
ESCAPE = "\x1b[31m"


@pytest.fixture
def receiver() -> Iterator[Stream]:
    with Stream() as receiver:
        yield receiver


@pytest.fixture
def receivers() -> Iterator[list[Stream]]:
    with Stream() as one, Stream() as another:
        yield [one, another]


Configure = Callable[..., Path]


@pytest.fixture
def configured(tmp_path: Path) -> Configure:
    """Writes the configuration of destinations, by their names."""

    def write(**endpoints: str) -> Path:
        items = [{"name": name, "endpoint": endpoint} for name, endpoint in endpoints.items()]
        path = tmp_path / "forward.yaml"
        path.write_bytes(orjson.dumps({"machine": {"logging": {"destinations": items}}}))
        return path

    return write


def nowhere() -> str:
    return f"tcp://127.0.0.1:{free_port()}/"


class TestOnce:
    def test_it_sends_what_is_there_and_says_nothing(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1) + line(2))
        config = configured(siem=receiver.endpoint)
        done = run("forward", "--config", config, "--once")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        until(lambda: receiver.ids == ["1", "2"])

    def test_the_next_one_sends_what_came_since(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        config = configured(siem=receiver.endpoint)
        for number in (1, 2, 3):
            write_day(directory, f"2024-08-1{number}", line(number))
            assert run("forward", "--config", config, "--once").returncode == 0
        until(lambda: receiver.ids == ["1", "2", "3"])

    def test_one_that_fails_is_named_and_the_others_get_everything(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1))
        config = configured(first=nowhere(), siem=receiver.endpoint, last=nowhere())
        for _ in range(2):
            done = run("forward", "--config", config, "--once")
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1] == (
                "auditlog: 2 of 3 destinations did not take everything: "
                "first (connection refused); last (connection refused)"
            )
            until(lambda: receiver.ids == ["1"])

    @pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-"])
    def test_a_closed_standard_error_is_no_reason_to_fail(
        self, directory: Path, configured: Configure, receiver: Stream, streams: str
    ) -> None:
        write_day(directory, DAY, line(1))
        arguments = f"--audit-log-dir {directory} --config {configured(siem=receiver.endpoint)} --once"
        command = f"exec {sys.executable} -m auditlog forward {arguments} {streams}"
        assert subprocess.run(["bash", "-c", command], cwd=ROOT, check=False).returncode == 0
        until(lambda: receiver.ids == ["1"])

    def test_an_empty_log_is_soon_sent(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        directory.mkdir(mode=0o700)
        done = run("forward", "--config", configured(siem=receiver.endpoint), "--once")
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_missing_log_is_told(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        done = run("forward", "--config", configured(siem=receiver.endpoint), "--once")
        assert done.returncode == 1
        assert f"{directory}: no such file or directory; create it, or correct the path" in done.stderr
        assert not directory.exists()

    def test_one_that_is_interrupted_says_so(
        self, directory: Path, configured: Configure, start: Start
    ) -> None:
        # The kernel of a receiver that does not read takes some MiB, and no more.
        write_day(directory, DAY, b"".join(line(number, text="x" * 9000) for number in range(3000)))
        process = start("stalled_receiver", stdout=subprocess.PIPE)
        assert process.stdout
        config = configured(siem=f"tcp://127.0.0.1:{int(process.stdout.readline())}/")
        command = ["forward", "--audit-log-dir", directory, "--config", config, "--once"]
        once = start("auditlog_command", *command)
        assert process.stdout.readline() == b"connected\n"
        once.send_signal(signal.SIGTERM)
        assert once.wait(20) == 130


class Forwarding:
    """`auditlog forward` in a process of its own, whose messages go to a file."""

    def __init__(self, start: Start, directory: Path, config: Path) -> None:
        self.output = config.with_suffix(".log")
        with self.output.open("ab") as file:
            self.process = start(
                "auditlog_command", "forward", "--audit-log-dir", directory, "--config", config, stderr=file
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def end(self, by: signal.Signals = signal.SIGINT) -> None:
        """As by Ctrl-C, unless by another signal."""
        self.process.send_signal(by)
        assert self.process.wait(20) == 0


class TestRunning:
    @pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
    def test_it_goes_on_as_the_log_grows_until_a_signal(
        self,
        directory: Path,
        configured: Configure,
        receivers: list[Stream],
        start: Start,
        by: signal.Signals,
    ) -> None:
        config = configured(siem=receivers[0].endpoint, loki=receivers[1].endpoint)
        with AuditLogger(directory, retention=None) as log:
            log.create("T", "1")
            forwarding = Forwarding(start, directory, config)
            for number in range(2, 5):
                until(lambda: all(receiver.ids for receiver in receivers))
                log.create("T", str(number))
            until(lambda: all(receiver.ids == ["1", "2", "3", "4"] for receiver in receivers))
            forwarding.end(by)
        said = [re.sub(r"^[\d-]+T[\d:]+Z ", "", row) for row in forwarding.said.splitlines()]
        assert said[:2] == [
            f"info    forwarding to siem ({receivers[0].endpoint})",
            f"info    forwarding to loki ({receivers[1].endpoint})",
        ]
        assert [row.rpartition(" at ")[0] for row in said[2:]] == [
            "info    stopped forwarding to siem,",
            "info    stopped forwarding to loki,",
        ]
        assert "\x1b" not in forwarding.said

    def test_a_token_in_an_endpoint_is_not_told(
        self, run: Run, directory: Path, configured: Configure, start: Start
    ) -> None:
        write_day(directory, DAY, line(1))
        endpoint = f"http://127.0.0.1:{free_port()}/in"
        forwarding = Forwarding(start, directory, configured(siem=f"{endpoint}?token=secret"))
        until(lambda: "error   destination siem: connection refused\n" in forwarding.said)
        status = run("forward", "--status").stdout
        forwarding.end()
        assert f"info    forwarding to siem ({endpoint})\n" in forwarding.said
        assert f"siem  {endpoint}\n" in status
        assert "secret" not in forwarding.said + status

    def test_a_dead_destination_is_told_once_and_blocks_no_other(
        self, directory: Path, configured: Configure, receiver: Stream, start: Start
    ) -> None:
        write_day(directory, DAY, line(1))
        port = free_port()
        config = configured(dead=f"tcp://127.0.0.1:{port}/", siem=receiver.endpoint)
        forwarding = Forwarding(start, directory, config)
        until(lambda: receiver.ids == ["1"])
        until(lambda: "error   destination dead: connection refused\n" in forwarding.said)
        with Stream(port=port) as risen:
            until(lambda: risen.ids == ["1"])
            until(lambda: "destination dead takes messages again" in forwarding.said)
            forwarding.end()
        assert forwarding.said.count("connection refused") == 1

    def test_a_second_one_refuses_before_anything_is_sent(
        self, run: Run, directory: Path, configured: Configure, receivers: list[Stream], start: Start
    ) -> None:
        write_day(directory, DAY, line(1))
        forwarding = Forwarding(start, directory, configured(siem=receivers[0].endpoint))
        until(lambda: receivers[0].ids == ["1"])
        both = configured(other=receivers[1].endpoint, siem=receivers[0].endpoint)
        for arguments in ([], ["--once"]):
            done = run("forward", "--config", both, *arguments)
            assert done.returncode == 1
            assert done.stderr.startswith("auditlog: destination siem: another process forwards to it; stop ")
        forwarding.end()
        assert receivers[1].connections == []

    def test_it_waits_for_a_log_that_is_to_come(
        self, directory: Path, configured: Configure, receiver: Stream, start: Start
    ) -> None:
        forwarding = Forwarding(start, directory, configured(siem=receiver.endpoint))
        until(lambda: f"warning there is no log at {directory} yet; waiting for it" in forwarding.said)
        with AuditLogger(directory, retention=None) as log:
            log.create("T", "1")
            until(lambda: receiver.ids == ["1"])
        forwarding.end()

    def test_it_can_be_ended_while_it_waits(
        self, directory: Path, configured: Configure, start: Start
    ) -> None:
        forwarding = Forwarding(start, directory, configured(siem=nowhere()))
        until(lambda: "waiting for it" in forwarding.said)
        forwarding.end(signal.SIGTERM)
        assert not directory.exists()

    def test_one_whose_progress_is_damaged_is_given_up_and_the_others_go_on(
        self, directory: Path, configured: Configure, receivers: list[Stream], start: Start
    ) -> None:
        write_day(directory, DAY, line(1))
        stored(directory, "siem")
        (directory / ".auditlog" / "forward" / "siem").write_text("{")
        config = configured(siem=receivers[0].endpoint, loki=receivers[1].endpoint)
        forwarding = Forwarding(start, directory, config)
        until(lambda: receivers[1].ids == ["1"])
        until(lambda: "error   siem is given up: audit log directory" in forwarding.said)
        forwarding.process.send_signal(signal.SIGTERM)
        assert forwarding.process.wait(20) == 1
        assert "1 of 2 destinations did not take everything: siem (audit log directory" in forwarding.said
        assert receivers[0].connections == []

    def test_another_users_log_is_refused(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs to become somebody else")
        write_day(directory, DAY, line(1))
        os.chown(directory, 12345, 12345)
        config = configured(siem=receiver.endpoint)
        done = run("forward", "--config", config, "--once")
        assert done.returncode == 1
        assert "it belongs to user 12345, not to user 0 that wants to write" in done.stderr
        assert not (directory / ".auditlog").exists()
        assert run("forward", "--config", config, "--once", "--allow-shared-directory").returncode == 0


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "--config FILE names the destinations"),
            (["--once"], "--config FILE names the destinations"),
            (["--status", "--once"], "--status only looks"),
            (["--status", "--config", "forward.yaml"], "--status only looks"),
            (["--config", "forward.yaml", "-o", "json"], "--output is of --status"),
            (["--config", "none.yaml"], "config='none.yaml': cannot be read: no such file or directory"),
        ],
    )
    def test_wrong_usage_is_told_with_status_2(
        self, run: Run, directory: Path, arguments: list[str], said: str
    ) -> None:
        write_day(directory, DAY, line(1))
        done = run("forward", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr

    def test_a_wrong_configuration_is_told_with_its_place(
        self, run: Run, directory: Path, configured: Configure
    ) -> None:
        write_day(directory, DAY, line(1))
        config = configured(siem=f"tcp://{ESCAPE}:1/")
        done = run("forward", "--config", config)
        assert done.returncode == 2
        assert f"auditlog: {config}: machine.logging.destinations[0].endpoint=" in done.stderr
        assert "\x1b" not in done.stderr

    @pytest.mark.parametrize(
        ("endpoint", "settings", "said"),
        [
            ("tls://h:1/", {"caFile": "none.pem"}, "caFile='none.pem': cannot be used"),
            (
                "tls://h:1/",
                {"certFile": "none.pem", "keyFile": "x"},
                "certFile='none.pem': cannot be used, or keyFile cannot",
            ),
            ("http://h/", {"headers": {"A": "\u00e9"}}, "headers.A='[redacted]': cannot be said in HTTP"),
            ("http://h/", {"format": "loki", "labels": {"a-b": "c"}}, "labels='a-b': the name of a label"),
            (
                "http://h/x?token=secret",
                {"format": "elasticsearch"},
                "endpoint='http://h/x': the path must be that of the bulk API",
            ),
            (
                "tcp://h:1/",
                {"format": "syslog", "extraTags": {"my tag.x": "y"}},
                "extraTags.my tag.x='y': syslog takes names",
            ),
        ],
    )
    def test_a_destination_that_cannot_work_is_told_with_its_place(
        self, run: Run, directory: Path, tmp_path: Path, endpoint: str, settings: dict[str, Any], said: str
    ) -> None:
        write_day(directory, DAY, line(1))
        items = [{"endpoint": nowhere()}, {"endpoint": endpoint, **settings}]
        config = tmp_path / "forward.yaml"
        config.write_bytes(b"a: b\n---\n" + orjson.dumps({"machine": {"logging": {"destinations": items}}}))
        done = run("forward", "--config", config, "--once")
        assert (done.returncode, done.stdout) == (2, "")
        place = "document 2: machine.logging.destinations[1]"
        assert done.stderr.startswith(f"auditlog: {config}: {place}.{said}")
        assert "secret" not in done.stderr
        assert not (directory / ".auditlog" / "forward").exists()

    @pytest.mark.parametrize(
        "command", ["read", "summary", "show 2024-08-12:0", "doctor", "sweep", "forward"]
    )
    def test_an_empty_directory_name_is_not_the_current_directory(self, run: Run, command: str) -> None:
        done = run(*command.split(), "--audit-log-dir", "")
        assert (done.returncode, done.stdout) == (2, "")
        assert "Invalid value for '--audit-log-dir': it is empty; name the directory" in done.stderr


def stored(directory: Path, name: str, **facts: Any) -> None:
    """What a run of the command left behind."""
    progress = Progress(endpoint="tcp://siem.example.com:5044/")
    for fact, value in facts.items():
        setattr(progress, fact, value)
    Place(str(directory), name, Files()).write(progress)


class TestStatus:
    def test_it_needs_no_configuration_and_changes_nothing(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1))
        assert run("forward", "--status").stdout == "nothing was forwarded from here yet\n"
        run("forward", "--config", configured(siem=receiver.endpoint, loki=nowhere()), "--once")
        done = run("forward", "--status")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.sub(r"[\d,]+ d\)|20\d\d-.*\)", "…", done.stdout) == (
            f"loki  {self._endpoint(run, 'loki')}\n"
            "  state       not running, and failed before\n"
            "  position    start\n"
            "  lag         1 event (…\n"
            "  messages    0 sent, 0 cut, 0 rejected, 0 lost\n"
            "  reconnects  0\n"
            "  last error  …: connection refused\n"
            "\n"
            f"siem  {receiver.endpoint}\n"
            "  state       not running\n"
            "  position    2024-08-12:0\n"
            "  lag         none\n"
            "  messages    1 sent, 0 cut, 0 rejected, 0 lost\n"
            "  reconnects  0\n"
        )

    @staticmethod
    def _endpoint(run: Run, name: str) -> str:
        told = json.loads(run("forward", "--status", "-o", "json").stdout)
        endpoint: str = next(each["endpoint"] for each in told if each["name"] == name)
        return endpoint

    @pytest.mark.parametrize("columns", [40, 80, 200])
    def test_it_fits_into_the_terminal_and_does_not_speak_to_it(
        self, run: Run, directory: Path, columns: int
    ) -> None:
        write_day(directory, DAY, line(1))
        stored(
            directory,
            "siem",
            sent=123_456_789,
            damaged=2,
            swept=[("2024-08-01:0", "2024-08-03:123456789")],
            last_error=f"{ESCAPE}the receiver says: " + "no more room " * 20,
            last_error_ms=1_723_464_000_000,
            failing=True,
        )
        rows = run("forward", "--status", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, rows)) <= columns
        text = " ".join(row[14:] for row in rows[1:])
        assert "123,456,789 sent, 0 cut, 0 rejected, 0 lost, 2 damaged" in text
        assert "from 2024-08-01:0 up to 2024-08-03:123456789" in text
        assert "2024-08-12 12:00:00" in text
        assert text.count("no more room") == 20
        assert "\x1b" not in text

    def test_what_a_new_run_sends_again_is_told(self, run: Run, directory: Path) -> None:
        write_day(directory, DAY, line(1) + line(2))
        stored(directory, "siem", sent_through=Position.parse(f"{DAY}:{len(line(1))}"))
        rows = run("forward", "--status").stdout.splitlines()
        assert rows[2:5] == [
            f"  position    {DAY}:{len(line(1))}",
            "  resumes     behind start: what was sent since is sent again by a new run",
            "  lag         none",
        ]

    def test_it_is_json_and_prometheus_for_programs(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1) + line(2))
        run("forward", "--config", configured(siem=receiver.endpoint), "--once")
        (told,) = json.loads(run("forward", "--status", "-o", "json").stdout)
        assert (told["name"], told["sent"], told["position"]) == ("siem", 2, f"{DAY}:{len(line(1))}")
        text = run("forward", "--status", "-o", "prometheus").stdout
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert {sample.labels["destination"] for sample in samples} == {"siem"}
        assert {sample.value for sample in samples if sample.name == "auditlog_forward_sent_total"} == {2}

    def test_a_missing_log_is_status_1(self, run: Run, directory: Path) -> None:
        assert run("forward", "--status").returncode == 1


class TestDoctor:
    def test_a_destination_that_is_up_to_date_is_ok(
        self, run: Run, directory: Path, configured: Configure, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1)).chmod(0o600)
        run("forward", "--config", configured(siem=receiver.endpoint), "--once")
        done = run("doctor", "--days", "20000")
        assert f"ok      destination siem ({receiver.endpoint}) is up to date\n" in done.stdout
        assert done.returncode == 0

    def test_one_that_fails_is_wrong(self, run: Run, directory: Path, configured: Configure) -> None:
        write_day(directory, DAY, line(1)).chmod(0o600)
        run("forward", "--config", configured(siem=nowhere()), "--once")
        done = run("doctor", "--days", "20000")
        assert re.search(
            r"\nwrong   destination siem \(.*\) fails, and is 1 event \(.*\) behind: connection refused\n"
            r"        look at the receiver",
            done.stdout,
        )
        assert done.returncode == 1

    def test_what_was_swept_before_it_was_sent_is_told(self, run: Run, directory: Path) -> None:
        write_day(directory, DAY, line(1)).chmod(0o600)
        here = Position.parse(f"{DAY}:0")
        stored(directory, "siem", position=here, sent_through=here, swept=[("2024-08-01:0", f"{DAY}:0")])
        done = run("doctor", "--days", "20000")
        assert f"never got what was written from 2024-08-01:0 up to {DAY}:0: it was swept" in done.stdout
        assert "Retention(hold_for_destinations=True)" in done.stdout
        assert done.returncode == 0

    def test_one_that_nobody_serves_is_a_note(self, run: Run, directory: Path) -> None:
        write_day(directory, DAY, line(1)).chmod(0o600)
        stored(directory, "siem")
        done = run("doctor", "--days", "20000")
        assert re.search(
            r"^note    destination siem .* behind, and nobody forwards", done.stdout, re.MULTILINE
        )
        assert "or remove .auditlog/forward/siem" in done.stdout
        assert done.returncode == 0

    def test_damaged_progress_is_wrong(self, run: Run, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        stored(directory, "siem")
        (directory / ".auditlog" / "forward" / "siem").write_text("{")
        done = run("doctor", "--days", "20000")
        assert ".auditlog/forward/siem is damaged" in done.stdout
        assert done.returncode == 1


class OnATerminal:
    """`auditlog forward` on a terminal of so many columns."""

    def __init__(self, columns: int, *arguments: object) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "auditlog", "forward", *map(str, arguments)])
        self._shown = b""

    def sees(self, wanted: str) -> bool:
        """Is this shown, when some more was read?"""
        self._shown += os.read(self._terminal, 1 << 16)
        return re.search(wanted, self._shown.decode(errors="replace")) is not None

    def end(self, status: int = 0) -> list[str]:
        """Press Ctrl-C; give what was shown, each drawing of a line by itself."""
        os.write(self._terminal, b"\x03")
        return self.wait(status)

    def wait(self, status: int = 0) -> list[str]:
        """What was shown, when it has ended."""
        with suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(self._terminal, 1 << 16):
                self._shown += chunk
        pid, self._pid = self._pid, 0
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        return self._shown.decode().replace("^C", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")

    def close(self) -> None:
        os.close(self._terminal)
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


Show = Callable[..., OnATerminal]


@pytest.fixture
def show(directory: Path) -> Iterator[Show]:
    """Runs the command on a terminal; it does not outlive the test."""
    shown: list[OnATerminal] = []

    def run_command(columns: int, config: Path, *arguments: str, log: Path = directory) -> OnATerminal:
        shown.append(OnATerminal(columns, "--audit-log-dir", log, "--config", config, *arguments))
        return shown[-1]

    yield run_command
    for each in shown:
        each.close()


class TestTerminal:
    def test_a_line_says_how_each_destination_fares(
        self, directory: Path, configured: Configure, show: Show, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1) + line(2))
        config = configured(siem=receiver.endpoint, loki=nowhere())
        shown = show(200, config)
        until(lambda: shown.sees(r"siem: up to date.*2 sent.*\| loki: failing, connection refused, 0 sent"))
        rows = shown.end()
        last = next(row for row in reversed(rows) if row)
        assert last.rstrip() == (
            f"siem: up to date, 2 sent, at {DAY}:{len(line(1))} | "
            "loki: failing, connection refused, 0 sent, at start"
        )
        # A message stands by itself, and the line is drawn anew below it.
        assert any(re.fullmatch(r"\S+Z error   destination loki: connection refused", row) for row in rows)

    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            (
                110,
                f"siem: up to date, 1 sent, at {DAY}:0 | loki: failing, connection refused, 0 sent, at start",
            ),
            (80, "siem: up to date, 1 sent | loki: failing, connection refused"),
            (40, "siem: up to date | loki: failing"),
            (26, "loki: failing | siem: up…"),
            (15, "loki: failing…"),
        ],
    )
    def test_it_is_one_line_of_the_terminal(
        self,
        directory: Path,
        configured: Configure,
        show: Show,
        receiver: Stream,
        columns: int,
        expected: str,
    ) -> None:
        write_day(directory, DAY, line(1))
        config = configured(siem=receiver.endpoint, loki=nowhere())
        shown = show(columns, config)
        drawn = f"{expected:{columns - 1}}"
        until(lambda: shown.sees(f"\r{re.escape(drawn)}"))
        rows = [row for row in shown.end() if row.startswith(("siem: ", "loki: "))]
        assert max(map(len, rows)) == columns - 1

    def test_a_backlog_is_told_with_rate_and_age(
        self, directory: Path, configured: Configure, show: Show, start: Start
    ) -> None:
        write_day(directory, DAY, b"".join(line(number, text="x" * 9000) for number in range(3000)))
        process = start("stalled_receiver", stdout=subprocess.PIPE)
        assert process.stdout
        config = configured(siem=f"tcp://127.0.0.1:{int(process.stdout.readline())}/")
        shown = show(120, config)
        until(lambda: shown.sees(r"siem: (over )?[\d,]+ events \([\d,]+ d\) behind, "))
        process.kill()
        shown.end()

    def test_once_ends_with_how_far_it_came(
        self, directory: Path, configured: Configure, show: Show, receiver: Stream
    ) -> None:
        write_day(directory, DAY, line(1))
        shown = show(100, configured(siem=receiver.endpoint), "--once")
        rows = shown.wait()
        assert re.fullmatch(rf"siem: up to date, (\d+/s, )?1 sent, at {DAY}:0 *", rows[-2])
        assert rows[-1] == ""

    def test_waiting_is_shown(self, directory: Path, configured: Configure, show: Show) -> None:
        shown = show(200, configured(siem=nowhere()))
        until(lambda: shown.sees(f"waiting for {directory}"))
        shown.end()

    def test_nothing_speaks_to_it(self, tmp_path: Path, configured: Configure, show: Show) -> None:
        hostile = tmp_path / f"x{ESCAPE}\u202e"
        shown = show(200, configured(siem=nowhere()), log=hostile)
        until(lambda: shown.sees("waiting for .*x"))
        assert "\x1b" not in "".join(shown.end())
