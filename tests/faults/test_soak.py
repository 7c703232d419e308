"""The soak works, in a few seconds of what it is meant to do for hours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.soak import main


def test_a_short_soak_loses_nothing_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--minutes", "0.08", "--directory", str(tmp_path)]) == 0
    counts = re.fullmatch(
        r"acknowledged (\d+)  found (\d+)  lost 0  doubled 0  corrupt \d+  kills (\d+)\n",
        capsys.readouterr().out,
    )
    assert counts is not None
    acknowledged, found, kills = map(int, counts.groups())
    assert acknowledged == found > 0
    assert kills > 0
    assert list(tmp_path.iterdir()) == []
