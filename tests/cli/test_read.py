"""`auditlog read` as its users call it: real processes, pipes and terminals."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from auditlog import AuditLogger, Session
from tests.cli.conftest import Run
from tests.conftest import ROOT, Start
from tests.helpers import contents, line, until, write_day


def ids(output: str) -> list[str]:
    return [json.loads(row)["resource_id"] for row in output.splitlines()]


ALL = [f"{kind}-{day}" for day in (11, 12, 13) for kind in ("cluster", "machine")]


class TestRange:
    def test_into_a_pipe_go_the_stored_lines_as_they_are(
        self, run: Run, log: AuditLogger, directory: Path
    ) -> None:
        done = run("read")
        assert done.stdout.encode() == b"".join(contents(directory).values())
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["2024-08-12"], ALL[2:]),
            (["2024-08-11", "2024-08-12"], ALL[:4]),
            (["--since", "2024-08-12", "--until", "2024-08-12"], ALL[2:4]),
            (["2024-08-12T12:00:00Z"], ALL[2:]),
            (["2024-08-12T12:00:00.001Z", "2024-08-13T14:00:00+02:00"], []),
            (["2024-08-13T13:59:59+02:00"], ALL[4:]),
            (["--reverse"], ALL[::-1]),
            (["--reverse", "-n", "1"], ALL[-1:]),
            (["-n", "0"], []),
            (["--event-type", "create", "-n", "2"], ["cluster-11", "cluster-12"]),
            (["--event-type", "create", "--event-type", "destroy", "2024-08-13"], ALL[4:]),
            (["--actor", "alice@example.com"], ["cluster-11", "cluster-12", "cluster-13"]),
            (["--cluster-id", "cluster-12"], ["cluster-12"]),
            (["--search", "MACHINE-1"], ["machine-11", "machine-12", "machine-13"]),
            (["--resource-type", "Machines.omni.sidero.dev", "--resource-id", "machine-12"], ["machine-12"]),
            (["today"], []),
            (["-2h"], []),
            (["2 hours ago"], []),
            (["--order-by-field", "resource_id"], sorted(ALL)),
            (["--order-by-field", "resource_id", "--order-by-dir", "desc", "-n", "2"], sorted(ALL)[:3:-1]),
            (
                ["--order-by-field", "actor", "-n", "4"],
                ["machine-11", "machine-12", "machine-13", "cluster-11"],
            ),
        ],
        ids=" ".join,
    )
    def test_bounds_filters_and_orders(
        self, run: Run, log: AuditLogger, arguments: list[str], expected: list[str]
    ) -> None:
        done = run("read", *arguments)
        assert (ids(done.stdout), done.returncode, done.stderr) == (expected, 0, "")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["soon"],
            ["2024-02-30"],
            ["2024-08-12T10:30:00"],
            ["2024-08-12", "2024-08-11"],
            ["2024-08-12", "--since", "2024-08-12"],
            ["--until", "two days"],
            ["999999 weeks ago"],
            ["--reverse", "--order-by-dir", "asc"],
            ["--follow", "--reverse"],
            ["--follow", "2024-08-12", "2024-08-13"],
            ["--order-by-field", "colour"],
            ["--order-by-field", "actor", "--follow"],
            ["--reverse", "--position-file", "position"],
            ["-n", "-1"],
            ["--output", "xml"],
            ["--fields", "colour"],
            ["--fields", "time", "-o", "jsonl"],
            ["--frobnicate"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_told_with_status_2(
        self, run: Run, log: AuditLogger, arguments: list[str]
    ) -> None:
        done = run("read", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        assert done.stderr

    def test_damage_is_left_out_and_told(self, run: Run, directory: Path) -> None:
        write_day(directory, "2024-08-12", line(1) + b"{torn\n" * 5 + line(2))
        for arguments in ([], ["--search", "create"], ["--reverse"]):
            done = run("read", *arguments)
            assert sorted(ids(done.stdout)) == ["1", "2"]
            assert "the line at 2024-08-12:" in done.stderr
            assert "5 damaged lines were left out" in done.stderr
            assert len(done.stderr.splitlines()) == 4
            assert done.returncode == 0


class TestFailing:
    def test_a_missing_directory_is_status_1(self, run: Run, directory: Path) -> None:
        done = run("read")
        assert done.returncode == 1
        assert done.stderr == f"auditlog: audit log directory {directory}: no such file or directory; " \
            "create it, or correct the path\n"  # fmt: skip

    def test_no_directory_at_all_is_wrong_usage(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "AUDITLOG_DIR"}
        command = [sys.executable, "-m", "auditlog", "read"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "--audit-log-dir" in done.stderr

    def test_no_permission_is_status_3(self, directory: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs to become somebody else")
        directory.mkdir(mode=0o700)
        for parent in list(directory.parents)[:3]:
            parent.chmod(0o755)
        from auditlog.cli import app, read  # noqa: F401 - another user may not be able to load them

        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.setuid(65534)
            os._exit(app.run(["read", "--audit-log-dir", str(directory)]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3

    def test_without_its_extra_it_says_how_to_get_it(self) -> None:
        code = "import sys; sys.modules['click'] = None; from auditlog.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "pip install 'auditlog-jsonl[cli]'" in done.stderr

    @pytest.mark.parametrize("arguments", [[], ["--search", "create"], ["-o", "csv"]])
    def test_a_closed_pipe_ends_it_silently(self, directory: Path, arguments: list[str]) -> None:
        write_day(directory, "2024-08-12", b"".join(map(line, range(50_000))))
        command = [sys.executable, "-m", "auditlog", "read", "--audit-log-dir", str(directory), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(10) == 0
        assert process.stderr
        assert process.stderr.read() == b""
        process.stderr.close()


def test_ctrl_c_is_status_130(directory: Path) -> None:
    write_day(directory, "2024-08-12", b"".join(map(line, range(50_000))))
    command = [sys.executable, "-m", "auditlog", "read", "--audit-log-dir", str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.read(1)  # it writes; and waits, for nobody reads on
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(10) == 130


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete_it(run: Run, shell: str) -> None:
    done = run(_AUDITLOG_COMPLETE=f"{shell}_source")
    assert "_AUDITLOG_COMPLETE" in done.stdout
    words = run(_AUDITLOG_COMPLETE="bash_complete", COMP_WORDS="auditlog read --ord", COMP_CWORD="2").stdout
    assert words.splitlines() == ["plain,--order-by-field", "plain,--order-by-dir"]


def test_an_order_of_very_many_entries_asks_for_a_limit(run: Run, directory: Path, long: bool) -> None:
    if not long:
        pytest.skip("takes some seconds: --long")
    write_day(directory, "2024-08-12", b'{"resource_id":"x"}\n' * 1_000_001)
    done = run("read", "--order-by-field", "resource_id")
    assert (done.returncode, done.stdout) == (1, "")
    assert "say with -n how many you want" in done.stderr
    assert len(run("read", "--order-by-field", "resource_id", "-n", "5").stdout.splitlines()) == 5


def test_a_value_that_looks_like_a_time_stays_a_value(run: Run, directory: Path) -> None:
    write_day(directory, "2024-08-12", line(1, resource_id="-3d"))
    assert ids(run("read", "--resource-id", "-3d").stdout) == ["-3d"]


def test_entries_that_nobody_could_write_are_printed_all_the_same(run: Run, directory: Path) -> None:
    deep = (
        b'{"resource_type":' + b"[" * 900 + b"]" * 900 + b',"event_data":' + b"[" * 300 + b"]" * 300 + b"}\n"
    )
    wide = line(1, resource_id="\u00e9" + "x" * 200_000)
    write_day(directory, "2024-08-12", deep + wide)
    for arguments in (
        ["-o", "table"],
        ["-o", "csv", "--fields", "event_data,resource_type"],
        ["--order-by-field", "resource_type"],
    ):
        done = run("read", *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert run("show", "2024-08-12:0").returncode == 0


def test_a_closed_output_is_no_reason_to_fail(directory: Path, log: AuditLogger) -> None:
    command = f"exec {sys.executable} -m auditlog read --audit-log-dir {directory} >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = "x\x1b[31m\u202etxt.exe\u200b\x9b"


class TestOutput:
    def test_csv_has_a_row_for_each_entry_and_no_formula(self, run: Run, directory: Path) -> None:
        with AuditLogger(directory, retention=None) as log:
            for name in ("=1+1", "+1", "-1", "@x", " =1", "plain", 'quo"te', "two\nlines", HOSTILE):
                log.create("T", name)
        rows = list(
            csv.reader(io.StringIO(run("read", "-o", "csv", "--fields", "resource_id,position").stdout))
        )
        assert rows[0] == ["resource_id", "position"]
        assert [row[0] for row in rows[1:]] == [
            *("'=1+1", "'+1", "'-1", "'@x", "' =1", "plain", 'quo"te', "two\\x0alines"),
            "x\\x1b[31m\\u202etxt.exe\\u200b\\x9b",
        ]

    def test_json_is_one_array(self, run: Run, log: AuditLogger) -> None:
        assert [record["resource_id"] for record in json.loads(run("read", "-o", "json").stdout)] == ALL
        assert json.loads(run("read", "-o", "json", "-n", "0").stdout) == []

    def test_a_table_names_the_zone_and_fits(self, run: Run, log: AuditLogger) -> None:
        done = run("read", "-o", "table", "2024-08-12", "2024-08-12", COLUMNS="150", TZ="Europe/Berlin")
        assert [row.split() for row in done.stdout.splitlines()] == [
            ["TIME", "(CEST)", "TYPE", "RESOURCE", "ACTOR", "ADDRESS", "SUMMARY"],
            ["2024-08-12", "14:00:00.000", "create", "Clusters/cluster-12", "alice@example.com", "10.1.2.3",
             "id=cluster-12"],
            ["2024-08-12", "14:00:00.000", "destroy", "Machines/machine-12"],
        ]  # fmt: skip
        utc = run("read", "-o", "table", "2024-08-12", "--utc", TZ="Europe/Berlin").stdout
        assert "TIME (UTC)" in utc
        assert "12:00:00" in utc

    @pytest.mark.parametrize("columns", [80, 100, 136, 200])
    def test_a_table_fits_into_the_terminal(self, run: Run, log: AuditLogger, columns: int) -> None:
        rows = run("read", "-o", "table", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, rows)) <= columns
        assert rows[1].startswith("2024-08-11 12:00:00")

    @pytest.mark.parametrize(
        "arguments", [["-o", "table"], ["-o", "csv"], ["-o", "json"], ["--order-by-field", "actor"]]
    )
    def test_what_looks_like_an_entry_and_is_none_stops_nothing(
        self, run: Run, directory: Path, arguments: list[str]
    ) -> None:
        write_day(directory, "2024-08-12", line(1) + b"{no json}\n" + line(2))
        done = run("read", *arguments)
        assert done.returncode == 0
        assert f"the line at 2024-08-12:{len(line(1))} is damaged" in done.stderr
        assert "no json" not in done.stdout

    def test_fields_may_be_paths(self, run: Run, log: AuditLogger) -> None:
        done = run("read", "--fields", "event_data.cluster.id,role", "-o", "csv", "-n", "2")
        assert done.stdout.splitlines() == ["event_data.cluster.id,role", "cluster-11,Admin", ","]


def on_a_terminal(directory: Path, *arguments: str) -> str:
    """What the command shows on a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"AUDITLOG_DIR": str(directory), "TZ": "UTC", "COLUMNS": "200"}
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "auditlog", *arguments])
    shown = b""
    with suppress(OSError), open(terminal, "rb", buffering=0) as output:  # EIO: the other end is closed
        while chunk := output.read(65536):
            shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode().replace("\r\n", "\n")


class TestTerminal:
    def test_it_shows_a_table_with_colours_unless_they_are_refused(
        self, directory: Path, log: AuditLogger
    ) -> None:
        shown = on_a_terminal(directory, "read")
        assert "TIME (UTC)" in shown
        assert "\x1b[31mdestroy" in shown
        assert "\x1b" not in on_a_terminal(directory, "read", "--color", "never")

    @pytest.mark.parametrize("form", ["table", "jsonl", "json", "csv"])
    def test_nothing_in_an_event_speaks_to_it(self, directory: Path, form: str) -> None:
        with AuditLogger(directory, retention=None) as log, log.session(Session(email=HOSTILE)):
            log.create(HOSTILE, HOSTILE, own={"note": HOSTILE, HOSTILE: 1})
        shown = on_a_terminal(directory, "read", "-o", form, "--color", "never")
        assert not set(HOSTILE) & set(shown) - set("x[31mtxt.exe")
        if form in ("json", "jsonl"):
            records = json.loads(shown if form == "json" else f"[{shown}]")
            assert records[0]["resource_id"] == HOSTILE


class Followed:
    """`auditlog read --follow` in a process of its own, whose output goes to a file."""

    def __init__(self, start: Start, directory: Path, output: Path, *arguments: object) -> None:
        self.output = output
        with output.open("ab") as file:
            self.process = start(
                "auditlog_command", "read", "--follow", *arguments, "--audit-log-dir", directory, stdout=file
            )

    @property
    def ids(self) -> list[str]:
        return ids(self.output.read_text())

    def end(self, by: signal.Signals = signal.SIGINT) -> None:
        """As by Ctrl-C, unless by another signal."""
        self.process.send_signal(by)
        assert self.process.wait(10) == 0


class TestFollow:
    def test_entries_come_as_they_are_written_until_ctrl_c(
        self, start: Start, directory: Path, tmp_path: Path, log: AuditLogger
    ) -> None:
        position = tmp_path / "position"
        followed = Followed(start, directory, tmp_path / "out", "--position-file", position)
        until(position.exists)  # it says where it begins, before the first entry
        log.create("T", "1")
        until(lambda: followed.ids == ["1"])
        log.create("T", "2")
        until(lambda: followed.ids == ["1", "2"])
        followed.end()

    @pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
    def test_a_position_file_resumes_where_the_last_run_stopped(
        self, start: Start, directory: Path, tmp_path: Path, log: AuditLogger, by: signal.Signals
    ) -> None:
        position = tmp_path / "position"
        arguments = "--position-file", position, "--search", "Odd"
        followed = Followed(start, directory, tmp_path / "out", *arguments)
        until(position.exists)
        written: list[str] = []
        for round_ in range(3):
            for number in range(20):
                log.create("Odd" if number % 2 else "Even", f"{round_}-{number}")
                written += [f"{round_}-{number}"] * (number % 2)
            if round_ == 1:
                followed.end(by)  # the third round is written while nobody follows
        followed = Followed(start, directory, tmp_path / "out", *arguments)
        until(lambda: len(followed.ids) >= len(written))
        assert followed.ids == written
        followed.end()

    def test_a_run_that_is_killed_prints_nothing_less_the_next_time(
        self, start: Start, directory: Path, tmp_path: Path, log: AuditLogger
    ) -> None:
        position = tmp_path / "position"
        followed = Followed(start, directory, tmp_path / "out", "--position-file", position)
        until(position.exists)
        for number in range(500):
            log.create("T", str(number))
            if number == 250:
                until(lambda: followed.ids)
                followed.process.kill()
                followed.process.wait()
        (tmp_path / "out").write_bytes((tmp_path / "out").read_bytes().rpartition(b"\n")[0] + b"\n")
        followed = Followed(start, directory, tmp_path / "out", "--position-file", position)
        until(lambda: followed.ids[-1] == "499")
        assert set(followed.ids) == {str(number) for number in range(500)}
        followed.end()


class TestPositionFile:
    def test_a_range_is_read_once(self, run: Run, log: AuditLogger, tmp_path: Path) -> None:
        position = tmp_path / "position"
        for arguments in ([], ["-n", "100"]):
            position.unlink(missing_ok=True)
            assert ids(run("read", "--position-file", position, *arguments).stdout) == ALL
            assert position.read_text().startswith("2024-08-13:")
            assert run("read", "--position-file", position, *arguments).stdout == ""
        log.create("T", "new")
        assert ids(run("read", "--position-file", position).stdout) == ["new"]

    def test_it_moves_with_what_a_filter_passes_over(
        self, run: Run, log: AuditLogger, tmp_path: Path
    ) -> None:
        position = tmp_path / "position"
        arguments = "--position-file", position, "--resource-id", "cluster-11"
        assert ids(run("read", *arguments).stdout) == ["cluster-11"]
        assert position.read_text().startswith("2024-08-13:")
        position.unlink()
        assert ids(run("read", *arguments, "-n", "1").stdout) == ["cluster-11"]
        assert position.read_text() == "2024-08-11:0\n"

    @pytest.mark.parametrize("place", [os.mkfifo, Path.mkdir, lambda path: path.write_text("")])
    def test_what_is_no_position_file_is_status_12(
        self, run: Run, log: AuditLogger, tmp_path: Path, place: Callable[[Path], object]
    ) -> None:
        place(tmp_path / "position")
        assert run("read", "--position-file", tmp_path / "position").returncode in (2, 12)

    def test_one_that_is_none_is_status_12_and_left_alone(
        self, run: Run, log: AuditLogger, tmp_path: Path
    ) -> None:
        position = tmp_path / "position"
        position.write_text("not a position")
        done = run("read", "--position-file", position)
        assert (done.returncode, done.stdout) == (12, "")
        assert f"the position file {position} cannot be used" in done.stderr
        assert position.read_text() == "not a position"
        assert run("read", "--position-file", tmp_path / "no" / "such" / "directory").returncode == 12

    def test_an_expired_one_is_status_10_and_a_wrong_one_11(
        self, run: Run, log: AuditLogger, tmp_path: Path
    ) -> None:
        position = tmp_path / "position"
        for text, status in (("2024-08-01:0", 10), ("2024-08-12:7", 11), ("2025-08-12:0", 11)):
            position.write_text(text)
            done = run("read", "--position-file", position)
            assert (done.returncode, done.stdout) == (status, "")
            assert text in done.stderr


def test_the_newest_20_of_a_large_log_come_at_once(run: Run, directory: Path) -> None:
    for day in range(1, 6):
        write_day(directory, f"2024-08-0{day}", b"".join(map(line, range(100_000))))
    started = time.monotonic()
    assert len(run("read", "--limit", "20", "--reverse").stdout.splitlines()) == 20
    assert time.monotonic() - started < 3  # a pass over all of it takes longer
