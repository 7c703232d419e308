"""The log as one destination needs it: from its position on, whatever became of that."""

from __future__ import annotations

import logging
import os
from datetime import date

from ..errors import CorruptEntry, PositionError, PositionInvalid
from ..query.follower import Follower
from ..query.reader import AuditReader
from ..storage.days import ONE_DAY, Clock, day_at
from ..storage.directory import Directory
from ..storage.entry import CorruptLine, Entry, pass_over
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.progress import Progress
from .message import hash_of

log = logging.getLogger("auditlog")


class Source:
    """Finds what is to be sent next, and says what can not be sent any more: swept days, damage."""

    def __init__(
        self, directory: str | os.PathLike[str], name: str, progress: Progress, clock: Clock, files: Files
    ) -> None:
        self._path = directory
        self._name = name
        self._progress = progress
        self._clock = clock
        self._files = files
        self._reader = AuditReader(directory, on_corrupt=self._note_damage, clock=clock, files=files)
        self._quiet_reader = AuditReader(directory, on_corrupt=pass_over, clock=clock, files=files)
        self._damaged_through = Position.START
        self._signed = Position.START

    def begin_now(self) -> None:
        """Leave out what the log has by now."""
        with self._quiet_reader.follow() as follower:
            self._progress.position = self._progress.sent_through = follower.position

    def newest(self) -> Position | None:
        """The newest entry that is to be sent: what is further ahead of the clock is not, before its day."""
        newest = next(self._quiet_reader.read(None, self._latest_day(), newest_first=True, limit=1), None)
        return None if newest is None else newest.position

    def entry_at(self, position: Position) -> Entry | None:
        """The entry at a position, where the log still has it."""
        try:
            found = self._quiet_reader.at(position)
        except PositionError:
            return None
        return found if isinstance(found, Entry) else None

    def sign(self) -> None:
        """Remember which line stands at the position: a power loss may put another one there."""
        progress = self._progress
        if progress.position != self._signed:
            last = self.entry_at(progress.position)
            progress.sha256 = hash_of(last.line) if last else ""
            self._signed = progress.position

    def follow(self, *, twice: bool) -> Follower:
        """Read on behind the position. `twice`: rather send something again than leave it out."""
        progress = self._progress
        self._look_at_oldest()
        try:
            self.check(progress.position)
            last = self.entry_at(progress.position) if progress.sha256 else None
            if last is not None and hash_of(last.line) != progress.sha256:
                raise PositionInvalid(progress.position, "another line stands there")
            return self._reader.follow(after=progress.position, on_missed=self._note_missed)
        except PositionInvalid as error:
            follower, place = self._find_place(twice)
            log.error("destination %s: %s; going on with %s", self._name, error, place)
            progress.position = progress.sent_through = follower.position
            progress.begins_with = Position.START  # where that is so, with what is the oldest now
            self._look_at_oldest()
            return follower

    def _find_place(self, twice: bool) -> tuple[Follower, str]:
        """Where to go on when the position says nothing, as lines are gone, or the clock was wrong.

        What stands in the place of lines that were sent was not, and nobody knows where it begins.
        """
        if not twice:
            return self._reader.follow(on_missed=self._note_missed), "what is written from now on"
        day = self._progress.position.day
        if day > self._latest_day():
            everything = self._reader.follow(after=Position.START, on_missed=self._note_missed)
            return everything, "all that is retained"
        return self._reader.follow(day, on_missed=self._note_missed), f"all of {day}"

    def check(self, position: Position) -> None:
        """Raise PositionInvalid where nothing comes behind it: it is of a day when the clock was wrong."""
        if position.day > self._latest_day():
            raise PositionInvalid(position, "its day is ahead of the clock")

    def decodable(self, entries: list[Entry]) -> list[Entry]:
        """Those that can be decoded; the others are damage."""
        good = []
        for entry in entries:
            try:
                entry.record  # noqa: B018 - decoded
                good.append(entry)
            except CorruptEntry as error:
                self._note_damage(CorruptLine(entry.position, b"", len(entry.line), error.reason))
        return good

    def note_first(self, entry: Entry) -> None:
        """The first entry of all is about to be sent: what was before it is gone, if it was another."""
        self._note_swept(self._progress.begins_with, entry.position)

    def _latest_day(self) -> date:
        return day_at(self._clock.time_ns(), self._quiet_reader.zone) + ONE_DAY

    def _look_at_oldest(self) -> None:
        """Notice a sweep before anything was sent: then there is no line that it could be noticed by."""
        progress = self._progress
        if progress.position != Position.START:
            return
        oldest = next(self._quiet_reader.read(limit=1), None)
        if oldest is None:
            return
        if progress.begins_with == Position.START:
            progress.begins_with = oldest.position
        else:
            self._note_swept(progress.begins_with, oldest.position)

    def _note_missed(self, position: Position, day: date) -> None:
        self._note_swept(position, Position(day, 0))

    def _note_swept(self, behind: Position, there: Position) -> None:
        # Over TCP what was sent may be due once more, and that it is gone is no loss.
        first = max(behind, self._progress.sent_through)
        if there <= first:
            return
        with Directory(self._path, self._files) as directory:
            swept_end = directory.read_state().swept_end
        if swept_end is not None and first >= swept_end:
            return
        if self._progress.note_swept(first, there):
            text = "destination %s: what was written from %s to %s was swept before it was sent"
            log.error(text, self._name, first, there)

    def _note_damage(self, line: CorruptLine) -> None:
        if line.position <= max(self._damaged_through, self._progress.sent_through):
            return  # it was told when it was first passed
        self._damaged_through = line.position
        self._progress.damaged += 1
        text = "destination %s: the line at %s is damaged (%s), and is not sent"
        log.warning(text, self._name, line.position, line.reason)
