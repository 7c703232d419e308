"""Measures all cases in turn, several rounds of them, and prints each as a ratio to its raw case.

Every measurement is a process of its own (so that its peak memory is its own), and the ratios
are taken within a round: a machine that is busy now and idle then does not spoil them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import cases, forwarding
from benchmarks.cases import make_day

CASES = cases.CASES | forwarding.CASES

Figures = dict[str, Any]


def peak_bytes() -> int:
    """The peak memory of this process (of its own life: what a parent used does not count)."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name: str, log: Path) -> Figures:
    """Run a case in a process of its own."""
    own = Path(tempfile.mkdtemp(dir=log.parent)) / "own"
    command = [sys.executable, "-m", "benchmarks.run", "--case", name, str(own), str(log)]
    figures: Figures = json.loads(subprocess.check_output(command))
    shutil.rmtree(own.parent)
    return figures


def summary(rounds: list[dict[str, Figures]]) -> list[Figures]:
    """A row for each case: medians over the rounds, and the spread of the ratios."""
    rows = []
    for name, case in CASES.items():
        if name not in rounds[0]:
            continue
        rates = [figures[name]["events"] / figures[name]["seconds"] for figures in rounds]
        raw = [figures[case.baseline]["events"] / figures[case.baseline]["seconds"] for figures in rounds]
        ratios = sorted(rate / base for rate, base in zip(rates, raw, strict=True))
        rows.append(
            {
                "case": name,
                "baseline": case.baseline,
                "per_second": statistics.median(rates),
                "microseconds": 1e6 / statistics.median(rates),
                "ratio": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "peak_mib": max(figures[name]["peak_bytes"] for figures in rounds) / 2**20,
            }
        )
    return rows


def table(rows: list[Figures]) -> str:
    """The rows for a terminal."""
    lines = [f"{'':26} {'a second':>11} {'us each':>11} {'ratio':>7} {'min':>7} {'max':>7} {'peak MiB':>9}"]
    for row in rows:
        if row["case"] == row["baseline"]:
            lines.append("")
        lines.append(
            f"{row['case']:26} {row['per_second']:11,.0f} {row['microseconds']:11.2f} {row['ratio']:7.3f} "
            f"{row['ratio_min']:7.3f} {row['ratio_max']:7.3f} {row['peak_mib']:9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=200_000, help="in the day file that is read")
    parser.add_argument("--only", default="", help="cases whose name holds this text, and their raw cases")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--case", nargs=3, metavar=("NAME", "OWN", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, own, log = options.case
        timed = CASES[name].run(Path(own), Path(log))
        print(json.dumps({"seconds": timed.seconds, "events": timed.events, "peak_bytes": peak_bytes()}))
        return
    chosen = {name for name in CASES if options.only in name}
    for _ in range(2):  # with what they are compared with, and what that is compared with
        chosen |= {CASES[name].baseline for name in chosen}
    names = [name for name in CASES if name in chosen]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        make_day(log, options.events)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append({name: measure(name, log) for name in names})
    rows = summary(rounds)
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
