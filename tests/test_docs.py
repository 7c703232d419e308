from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import auditlog
from auditlog.events.model import PAYLOADS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_snippets(page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "snippets"), str(page)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_a_page_hold(page: Path) -> None:
    done = run_snippets(page)
    assert done.returncode == 0, done.stderr


def test_a_snippet_that_does_not_hold_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for content in (
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\n1 / 0\n```\n",
        "```console\n$ echo 1\n2\n```\n",
        "```console\n$ false\n```\n",
    ):
        page.write_text(content)
        assert run_snippets(page).returncode != 0, content


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_changelog_says_whether_the_format_changed() -> None:
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert releases
    for release in releases:
        assert re.search(r"^File format: ", release, re.MULTILINE), release


def test_the_format_page_names_every_payload_in_order() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    listed = re.findall(r"`(\w+)`", text[text.index("`event_data`, in this order") :])[1:15]
    assert listed == [*(name for name in PAYLOADS if name != "audit"), "audit"]


def test_the_version_is_one() -> None:
    assert version("auditlog-jsonl") == auditlog.__version__
