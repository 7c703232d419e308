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

# An attacker may bring as many names as he likes, and as long ones.
_MOST_HARMLESS = 4096
_LONGEST_HARMLESS = 64

_pattern = re.compile(r"(?:\*\.)?[^.*\s]+(?:\.(?:\*\.)?[^.*\s]+)*(?:\.\*)?").fullmatch
_separators = re.compile(r"[\W_]+")


class SecretNames:
    """Tells by the names on the way to a value whether it is a secret.

    `patterns`: a bare name (`authorization`) means a field of that name anywhere in the event's
    details; a dotted path (`config_patch.data`) one field, from the top of the details, where
    `*` stands for one name or several (`*.password`, `cluster.*.key`). Lists on the way count
    for nothing; a dot within a name is one like that between names. Names are compared without
    regard to case and to all but letters and digits.

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
        self._paths: list[list[str]] = []
        self.harmless: set[str] = set()
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
                self._paths.append(names)

    def match(self, path: str, name: str) -> bool:
        """Is the field `name` below `path` (dotted, "" at the top) a secret?"""
        plain = _plain(name)
        if plain in self._names or plain.endswith(self._endings):
            return True
        if self._paths and not self._last.isdisjoint((_plain(name.rpartition(".")[2]), "*")):
            names = [_plain(part) for part in f"{path}.{name}".lstrip(".").split(".")]
            return any(_fits(names, pattern) for pattern in self._paths)
        if len(name) <= _LONGEST_HARMLESS and len(self.harmless) < _MOST_HARMLESS:
            self.harmless.add(name)
        return False


def _fits(names: list[str], pattern: list[str]) -> bool:
    """Do the names fit a pattern, in which `*` stands for one of them or several?

    Each `*` takes as little as it can; only the last one has to take more. So the time is that of
    a look at each name, whatever an attacker calls his fields.
    """
    at = wanted = 0
    star = behind_star = -1
    while at < len(names):
        if wanted < len(pattern) and pattern[wanted] == "*":
            star, behind_star = wanted, at + 1
            at, wanted = at + 1, wanted + 1
        elif wanted < len(pattern) and pattern[wanted] == names[at]:
            at, wanted = at + 1, wanted + 1
        elif star >= 0:
            behind_star += 1
            at, wanted = behind_star, star + 1
        else:
            return False
    return wanted == len(pattern)


def _plain(name: str) -> str:
    return _separators.sub("", name.casefold())
