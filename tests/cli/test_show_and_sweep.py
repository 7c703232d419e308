"""`auditlog show` and `auditlog sweep`."""

from __future__ import annotations

import json
from pathlib import Path

from auditlog import AuditLogger
from tests.cli.conftest import Run
from tests.helpers import contents, line, write_day


def test_show_prints_an_entry_whole_and_what_is_around_it(
    run: Run, log: AuditLogger, directory: Path
) -> None:
    offset = contents(directory)["2024-08-12.jsonlog"].index(b'{"event_type":"destroy"')
    position = f"2024-08-12:{offset}"
    head, _, body = run("show", position).stdout.partition("\n")
    assert head == position
    assert json.loads(body)["resource_id"] == "machine-12"
    around = run("show", position, "-C", "2").stdout
    names = ["machine-11", "cluster-12", "machine-12", "cluster-13", "machine-13"]
    assert [around.index(name) for name in names] == sorted(around.index(name) for name in names)
    assert "cluster-11" not in around


def test_show_says_what_is_wrong_with_a_position_or_a_line(run: Run, directory: Path) -> None:
    write_day(directory, "2024-08-12", line(1) + b"{to\x1brn\n" + line(2))
    for position, status in (
        ("x", 11),
        ("2024-08-12:3", 11),
        ("start", 11),
        ("2024-08-11:0", 10),
        ("2024-08-13:0", 11),
    ):
        assert run("show", position).returncode == status, position
    done = run("show", f"2024-08-12:{len(line(1))}", "-C", "1")
    assert done.returncode == 1
    assert "damaged: it does not end with }\n{to\\x1brn" in done.stdout
    assert '"resource_id":"1"' in done.stdout
    assert '"resource_id":"2"' in done.stdout


def test_sweep_says_what_goes_and_removes_it(run: Run, log: AuditLogger, directory: Path) -> None:
    dry = run("sweep", "--dry-run")
    assert "would remove 2024-08-11.jsonlog\nwould remove 2024-08-12.jsonlog\n2 days" in dry.stdout
    assert len(contents(directory)) == 3
    done = run("sweep")
    assert "removed 2024-08-11.jsonlog\nremoved 2024-08-12.jsonlog\n2 days" in done.stdout
    assert list(contents(directory)) == ["2024-08-13.jsonlog"]  # the newest, however old
    assert done.returncode == 0
    assert run("sweep", "--days", "0").returncode == 2
