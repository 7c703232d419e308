"""Finding the few lines that may match a filter, without decoding the others.

A filter that wants a certain text somewhere can only match a line in which that text stands. Its
longest part that stands in a stored line as it is, whoever wrote it, is looked for in whole blocks;
what is found is decoded, and the filter decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from ..storage.blocks import Run, find
from ..storage.entry import Entry
from .filters import Filter

_SHORTEST = 3  # bytes: what is shorter stands in nearly every line

# Printable ASCII that no encoder of JSON has a reason to escape.
_as_it_is = re.compile(r"[ !#-%'-.0-;=?-\[\]-~]+")
# Escapes that nobody writes who writes this format, and behind which any letter may hide.
_odd_escape = re.compile(rb"\\u(?!003[cCeE]|0026|00[01][0-9a-fA-F]|202[89])")


class Needle:
    """A text that stands in every line that matches a filter; `folded`: whatever its case."""

    def __init__(self, text: str, *, folded: bool) -> None:
        self._text = text.encode()
        self._folded = folded

    @classmethod
    def of(cls, where: Filter) -> Needle | None:
        """The best text to look for; None where there is none."""
        exact = (where.resource_id, where.actor, where.cluster_id)
        types = (where.resource_type, where.event_type if isinstance(where.event_type, str) else None)
        for text in (*exact, where.search, *types):
            if text is None:
                continue
            folded = text is where.search
            part = max(_as_it_is.findall(text.casefold() if folded else text), key=len, default="")
            if len(part) >= _SHORTEST:
                return cls(part, folded=folded)
        return None

    def entries(self, run: Run) -> Iterator[Entry]:
        """The entries of a run that may match, in their order."""
        buffer, behind, end = run.buffer, run.start, run.end
        for at in self._places(run):
            if at < behind:
                continue  # in a line that was found already
            start = buffer.rfind(b"\n", behind, at) + 1 or behind
            behind = buffer.find(b"\n", at, end) + 1
            yield run.entry(start, behind)

    def _places(self, run: Run) -> Iterator[int]:
        """Where in the buffer a line may match, in ascending order."""
        buffer, start, end = run.buffer, run.start, run.end
        if find(buffer, b"\\u", start, end) >= 0 and _odd_escape.search(buffer, start, end):
            yield from self._all_lines(run)
            return
        text, wanted = buffer, self._text
        if self._folded:
            if not buffer.isascii() and _folds_into_ascii().search(buffer, start, end):
                yield from self._all_lines(run)
                return
            text = buffer.lower()
        at = find(text, wanted, start, end)
        while at >= 0:
            yield at
            line_end = text.find(b"\n", at, end)
            at = find(text, wanted, line_end, end)

    def _all_lines(self, run: Run) -> Iterator[int]:
        at = run.start
        while at < run.end:
            yield at
            at = run.buffer.find(b"\n", at, run.end) + 1


@cache
def _folds_into_ascii() -> re.Pattern[bytes]:
    """Characters beyond ASCII that are, or contain, ASCII letters when case does not count."""
    folding = (chr(code) for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000)
    found = [char for char in folding if any(part.isascii() for part in char.casefold())]
    return re.compile(b"|".join(char.encode() for char in found))
