"""Text for a terminal: escaped, measured, cut."""

from __future__ import annotations

import re
import unicodedata

from ..events.visible import UNSEEN


def visible_json(lines: str) -> str:
    """Stored lines with the same characters escaped as JSON does it, newlines between them kept."""
    return "\n".join(UNSEEN.sub(_json_escaped, line) for line in lines.split("\n"))


def _json_escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def width(text: str) -> int:
    """How many columns `visible` text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def fit(text: str, columns: int) -> str:
    """`text` in exactly so many columns: cut with an ellipsis, or padded."""
    if text.isascii():
        return text.ljust(columns) if len(text) <= columns else text[: columns - 1] + "…"
    taken = at = 0
    while at < len(text) and taken <= columns:
        taken += width(text[at])
        at += 1
    if taken <= columns:
        return text + " " * (columns - taken)
    while width(text[:at]) > columns - 1:  # a few steps
        at -= 1
    return text[:at] + "…" + " " * (columns - 1 - width(text[:at]))
