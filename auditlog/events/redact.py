"""Replacing secrets before anything is encoded, so that none reaches a file, an error or a log."""

from __future__ import annotations

import hmac
import re
from contextlib import suppress
from typing import Any

import orjson

from ..errors import InvalidEvent
from .model import PAYLOADS, Session
from .payloads import Model, fields_of
from .secrets import SecretNames
from .values import MAX_DEPTH, canonical, plain

REDACTED = "[redacted]"

# The steps of a path: the index of a list, a quoted name, any other name.
_step = re.compile(r'\[(?:\d+|("(?:[^"\\]|\\.)*"))\]|((?:[^.\[]|\[(?!\d+\]|"))+)')
_cut = re.compile(r"…\[cut: \d+ bytes\]\Z")
_MOST_NAMES = 2 * MAX_DEPTH  # of a path; no value lies deeper

_LEAVES = frozenset({str, int, float, bool, type(None)})
_NO_SECRETS = frozenset({bool, type(None)})


class Redactor:
    """Replaces the values that `names` calls secrets.

    A secret becomes `[redacted]`, or with `hmac_key` `hmac-sha256:<hex>` of its text (of its JSON
    with sorted keys, where it is no string): equal secrets stay recognizable, for those who have
    the key even what they were. Where a payload's model wants an object, it becomes one with a
    field `redacted`, where it wants a list, a list of one; a number is left out. None,
    booleans and what is empty stay.

    `affects_sessions`: may a field that every session has be a secret?
    """

    def __init__(self, names: SecretNames, hmac_key: bytes | None = None) -> None:
        self._match = names.match
        self._harmless = names.harmless
        self._hmac_key = hmac_key
        self.affects_sessions = any(names.match("session", name) for name in Session.model_fields)

    def details(self, data: dict[str, Any]) -> dict[str, Any]:
        """The details of an event without their secrets; `data` itself, where it has none.

        In `changes`, a list of dicts with `path`, `old` and `new`, a value is what its path calls it
        (capture.changes makes such paths). Raises InvalidEvent for a cycle, or a nesting that is too deep.
        """
        if "changes" not in data:
            return self._clean_members(data, "", 0)
        changes = data["changes"]
        if not isinstance(changes, list | tuple) or self._match("", "changes"):
            return self._clean_members(data, "", 0)
        cleaned = self._clean_members(data | {"changes": []}, "", 0)
        return cleaned | {"changes": [self._clean_change(change) for change in changes]}

    def session(self, session: Session) -> Session:
        """The session without its secrets."""
        return Session.model_construct(**self._clean_members(fields_of(session), "session", 0))

    def _clean(self, value: Any, path: str, depth: int) -> Any:
        """`value` without its secrets; the same object, where it has none (of a model, its fields)."""
        if depth > MAX_DEPTH:
            raise InvalidEvent(f"event_data.{path}", f"nested deeper than {MAX_DEPTH} levels, or a cycle")
        if isinstance(value, dict):
            return self._clean_members(value, path, depth)
        if isinstance(value, Model):
            return self._clean_members(fields_of(value), path, depth)
        if isinstance(value, list | tuple):
            items = [item if type(item) in _LEAVES else self._clean(item, path, depth + 1) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            return value if same else items
        try:
            converted = plain(value)
        except Exception:
            if isinstance(value, orjson.Fragment):  # would be written unseen
                raise InvalidEvent(
                    f"event_data.{path}", "a value of type Fragment cannot be written"
                ) from None
            return value  # the encoder says better what is wrong with it
        if type(converted) in _LEAVES:
            return value
        cleaned = self._clean(converted, path, depth)
        return value if cleaned is converted else cleaned

    def _clean_members(self, fields: dict[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        cleaned = fields
        for name, value in dict.items(fields):  # what the encoder sees, whatever a subclass says
            if name not in self._harmless and isinstance(name, str) and self._match(path, name):
                new = self._replacement(value, path, name)
            elif type(value) in _LEAVES:
                continue
            else:
                new = self._clean(value, f"{path}.{name}" if path else name, depth + 1)
            if new is not value:
                if cleaned is fields:
                    cleaned = dict(fields)
                cleaned[name] = new
        return cleaned

    def _clean_change(self, change: Any) -> Any:
        if not isinstance(change, dict):
            with suppress(Exception):  # the encoder says better what is wrong with it
                change = plain(change)
        fields = dict(dict.items(change)) if isinstance(change, dict) else {}
        if not isinstance(fields.get("path"), str):
            return self._clean(change, "changes", 1)
        path, secret = self._first_secret(_names_of(fields["path"]))
        values = {name: fields.pop(name) for name in ("old", "new") if name in fields}
        cleaned = self._clean_members(fields, "changes", 1)
        for name, value in values.items():
            here = secret or (("changes", name) if self._match("changes", name) else None)
            cleaned[name] = self._clean(value, path, 1) if here is None else self._replacement(value, *here)
        return cleaned

    def _first_secret(self, names: list[str]) -> tuple[str, tuple[str, str] | None]:
        """The dotted path of `names`, and what is above the first secret on it, with its name."""
        path = ""
        for name in names[:_MOST_NAMES]:
            if self._match(path, name):
                return path, (path, name)
            path = f"{path}.{name}" if path else name
        return path, ("changes", "path") if len(names) > _MOST_NAMES else None

    def _replacement(self, value: Any, path: str, name: str) -> Any:
        if type(value) in _NO_SECRETS or (isinstance(value, str | list | tuple | dict) and not value):
            return value
        is_whole = self._hmac_key is not None and not _is_cut(value)  # else the digest would be another's
        mark = self._digest(value, f"{path}.{name}") if is_whole else REDACTED
        if _is_modelled(path, name):
            if isinstance(value, dict | Model):
                return {"redacted": mark}
            if isinstance(value, list | tuple):
                return [mark]
            if isinstance(value, int | float):
                return None
        return mark

    def _digest(self, value: Any, path: str) -> str:
        value = canonical(fields_of(value) if isinstance(value, Model) else value, f"event_data.{path}")
        text = value.encode() if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        assert self._hmac_key is not None
        return "hmac-sha256:" + hmac.digest(self._hmac_key, text, "sha256").hex()


def _is_cut(value: Any) -> bool:
    """Is a value what capture.changes left of a longer one?"""
    if isinstance(value, str):
        return _cut.search(value) is not None
    return isinstance(value, dict) and value.keys() == {"truncated"}


def _names_of(path: str) -> list[str]:
    return [_unquoted(quoted) if quoted else name for quoted, name in _step.findall(path) if quoted or name]


def _unquoted(quoted: str) -> str:
    try:
        return str(orjson.loads(quoted))
    except orjson.JSONDecodeError:
        return quoted


def _is_modelled(path: str, name: str) -> bool:
    """Does a model say what type the value has?"""
    if path == "":
        return name in PAYLOADS
    model = Session if path == "session" else PAYLOADS.get(path)
    return model is not None and name in model.model_fields
