"""Which fields of an event hold secrets, by name and by path: pure functions of names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InvalidSetting

# Compared with a name's letters and digits alone: client_secret, client-secret, clientSecret.
_SENSITIVE_ENDINGS = (
    "accesskey",
    "apikey",
    "authorization",
    "cookie",
    "credential",
    "credentials",
    "passphrase",
    "passwd",
    "password",
    "passwords",
    "privatekey",
    "secret",
    "secretkey",
    "secrets",
    "token",
    "tokens",
)

_MOST_HARMLESS = 4096  # an attacker may bring as many names as he likes

_pattern = re.compile(r"(?:\*\.)?[^.*\s]+(?:\.(?:\*\.)?[^.*\s]+)*(?:\.\*)?").fullmatch
_separators = re.compile(r"[\W_]+")


class SecretNames:
    """Tells by the names on the way to a value whether it is a secret.

    `patterns`: a bare name (`authorization`) means a field of that name anywhere in the event's
    details; a dotted path (`config_patch.data`) one field, from the top of the details, where
    `*` stands for one name or several (`*.password`, `cluster.*.key`). Lists on the way count
    for nothing. Names are compared without regard to case, `-` and `_`.

    `defaults`: whether names that end like a password, token, key, cookie or authorization are
    secrets, too. Raises InvalidSetting for a pattern that is none.

    `harmless`: names that were met, and are no secrets wherever they stand.
    """

    def __init__(self, patterns: Iterable[str], *, defaults: bool) -> None:
        if isinstance(patterns, str):
            raise InvalidSetting("redact", patterns, "must be a list of names and paths")
        self._endings = _SENSITIVE_ENDINGS if defaults else ()
        self._names: set[str] = set()
        self._last: set[str] = set()  # the last names of the paths
        self.harmless: set[str] = set()
        paths = []
        for pattern in patterns:
            if not isinstance(pattern, str) or not _pattern(pattern):
                raise InvalidSetting("redact", pattern, "must be a name, or names with dots between them")
            if pattern.startswith("event_data."):
                raise InvalidSetting("redact", pattern, "begins inside event_data: leave that name out")
            names = [name if name == "*" else _plain(name) for name in pattern.split(".")]
            if "" in names:
                raise InvalidSetting("redact", pattern, "needs letters or digits in each of its names")
            if len(names) == 1:
                self._names.add(names[0])
            else:
                self._last.add(names[-1])
                paths.append(r"\.".join(r".+" if name == "*" else name for name in names))
        self._path = re.compile("|".join(paths)).fullmatch if paths else None

    def __bool__(self) -> bool:
        return bool(self._endings or self._names or self._path)

    def match(self, path: str, name: str) -> bool:
        """Is the field `name` below `path` (dotted, "" at the top) a secret?"""
        plain = _plain(name)
        if plain in self._names or plain.endswith(self._endings):
            return True
        if self._path is not None and not self._last.isdisjoint((plain, "*")):
            above = [_plain(part) for part in path.split(".")] if path else []
            return self._path(".".join([*above, plain])) is not None
        if len(self.harmless) < _MOST_HARMLESS:
            self.harmless.add(name)
        return False


def _plain(name: str) -> str:
    return _separators.sub("", name.casefold())
