"""Text that came from elsewhere, made harmless for a terminal."""

from __future__ import annotations

import re
import unicodedata

# Control characters, and those that hide or reorder what stands beside them.
_unseen = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f"
    "\u205f-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff"
    "\U00013430-\U00013438\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """`text` with every character escaped that a terminal would obey or not show."""
    return _unseen.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible_json(lines: str) -> str:
    """Stored lines with the same characters escaped as JSON does it, newlines between them kept."""
    return "\n".join(_unseen.sub(_json_escaped, line) for line in lines.split("\n"))


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
