"""`auditlog summary` and `auditlog doctor`."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from auditlog import AuditLogger
from tests.cli.conftest import Run
from tests.helpers import contents, line, write_day


class TestSummary:
    def test_it_counts_by_day_type_actor_and_resource_type(self, run: Run, log: AuditLogger) -> None:
        assert json.loads(run("summary", "-o", "json").stdout) == {
            "entries": 6,
            "damaged": 0,
            "by_day": {"2024-08-11": 2, "2024-08-12": 2, "2024-08-13": 2},
            "by_type": {"create": 3, "destroy": 3},
            "by_actor": {"alice@example.com": 3, "": 3},
            "by_resource_type": {"Clusters.omni.sidero.dev": 3, "Machines.omni.sidero.dev": 3},
        }
        assert json.loads(run("summary", "2024-08-12", "2024-08-12", "-o", "json").stdout)["entries"] == 2
        assert json.loads(run("summary", "-2h", "-o", "json").stdout)["entries"] == 0

    def test_the_table_has_bars_and_ends_its_lists(self, run: Run, directory: Path) -> None:
        lines = [line(number, event_type=f"type{number % 5}") for number in range(15)] + [line(99)]
        write_day(directory, "2024-08-12", b"".join(lines) + b"torn\n")
        done = run("summary", "--top", "2")
        rows = done.stdout.splitlines()
        assert rows[0] == "16 entries"
        at = rows.index("by type")
        assert [row.split() for row in rows[at + 1 : at + 4]] == [
            ["type0", "3", "█" * 30],
            ["type1", "3", "█" * 30],
            ["and", "4", "more", "(--top)"],
        ]
        assert "1 damaged lines were left out" in done.stderr
        assert done.returncode == 0

    def test_nothing_in_an_event_speaks_to_the_terminal(self, run: Run, directory: Path) -> None:
        with AuditLogger(directory, retention=None) as log:
            log.create("x\x1b[31m\u202e")
        assert "x\\x1b[31m\\u202e" in run("summary").stdout


class TestDoctor:
    def test_a_healthy_log_is_ok(self, run: Run, log: AuditLogger) -> None:
        done = run("doctor", "--days", "20000")
        assert done.returncode == 0
        assert {row.split()[0] for row in done.stdout.splitlines()} == {"ok"}
        assert "3 day files, from 2024-08-11 to 2024-08-13" in done.stdout
        assert "6 entries, 0 damaged lines" in done.stdout

    def test_damage_is_named_with_its_position_and_is_status_4(self, run: Run, directory: Path) -> None:
        write_day(directory, "2024-08-12", line(1) + b"to\x1brn\n" * 12 + line(2))
        before = contents(directory)
        done = run("doctor")
        assert done.returncode == 4
        assert (
            f"the line at 2024-08-12:{len(line(1))} (6 bytes) is damaged: it does not start with {{"
            in done.stdout
        )
        assert f"auditlog show 2024-08-12:{len(line(1))} -C 1" in done.stdout
        assert "and 2 more damaged lines" in done.stdout
        assert contents(directory) == before

    def test_strict_decodes_every_entry(self, run: Run, directory: Path) -> None:
        write_day(directory, "2024-08-12", line(1) + b"{no json}\n")
        assert run("doctor").returncode == 0
        assert run("doctor", "--strict").returncode == 4

    def test_everything_else_that_is_wrong_is_told_with_what_to_do(self, run: Run, directory: Path) -> None:
        ahead = (datetime.now(UTC) + timedelta(days=5)).date().isoformat()
        for day in ("2024-08-01", "2024-08-03", ahead):
            write_day(directory, day, line(1)).chmod(0o644)
        os.mkfifo(directory / "2024-08-04.jsonlog")
        (directory / "2026-02-30.jsonlog").touch()
        directory.chmod(0o777)
        done = run("doctor")
        assert done.returncode == 1
        for said in (
            "wrong   others than its owner may write there\n        chmod go-w",
            "note    2024-08-01.jsonlog has mode 0644\n        chmod 600",
            "wrong   2024-08-04.jsonlog is no regular file\n        move it away",
            "note    2026-02-30.jsonlog is no day file, and is left alone",
            "note    days without a file begin at 2024-08-02",
            f"wrong   {ahead}.jsonlog is ahead of the clock\n        check the clock",
            "are due\n        a server with the log open sweeps them by itself",
        ):
            assert said in done.stdout, said

    @pytest.mark.parametrize("content", [b"", b"{"])
    def test_a_damaged_state_is_told(
        self, run: Run, log: AuditLogger, directory: Path, content: bytes
    ) -> None:
        (directory / ".auditlog" / "state").write_bytes(content)
        done = run("doctor")
        assert done.returncode == 1
        assert "state is damaged; make .auditlog/state a plain file" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr

    def test_an_empty_or_a_missing_directory_is_told(self, run: Run, directory: Path) -> None:
        assert run("doctor").returncode == 1
        directory.mkdir(mode=0o700)
        done = run("doctor")
        assert "there is no day file yet" in done.stdout
        assert done.returncode == 0
