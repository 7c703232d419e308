"""Destinations from a YAML file: a Talos machine configuration, or as much of one as they need.

    machine:
      logging:
        destinations:
          - endpoint: tcp://host:5044/
            extraTags:
              server: s03-rack07

The keys of a destination are the fields of `Destination` in camelCase. Everything else in the file
is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

from ..errors import InvalidSetting
from .destination import Destination, checked

_PATH = ("machine", "logging", "destinations")
_PLACE = ".".join(_PATH)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_variable = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", re.ASCII)
_word = re.compile(r"[a-z]+(?:_[a-z]+)+", re.ASCII)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(map(str.capitalize, rest))


_FIELDS = {_camel(each.name): each for each in fields(Destination) if each.init}
_KEYS = {each.name: key for key, each in _FIELDS.items()}


def load_destinations(path: str | os.PathLike[str]) -> list[Destination]:
    """The destinations of a YAML file: `machine.logging.destinations` of each of its documents.

    Scalars are taken as they are written, so that the tag `rack: 07` is "07", as Talos sends it.
    `${NAME}` in the value of a header is taken from the environment; nothing else is expanded. Names of
    files are relative to the directory of this process.

    Raises InvalidSetting, which names the file and the place in it, for whatever is wrong with them.
    """
    return list(destinations_by_place(path).values())


def destinations_by_place(path: str | os.PathLike[str]) -> dict[str, Destination]:
    """The same by their places, which begin with the file: what `at_place` needs for later errors."""
    file = os.fspath(path)
    found: dict[str, Destination] = {}
    documents = _documents(file)
    for count, document in enumerate(documents, 1):
        start = f"{file}: document {count}: " if len(documents) > 1 else f"{file}: "
        for number, item in enumerate(_items(start, document)):
            place = f"{start}{_PLACE}[{number}]"
            settings = _settings(place, item)
            try:
                found[place] = Destination(**settings)
                checked(found.values())
            except InvalidSetting as error:
                raise at_place(place, error) from None
    if not found:
        raise InvalidSetting("config", file, f'has no {_PLACE}; one takes an endpoint: "tcp://host:5044/"')
    return found


def at_place(place: str, error: InvalidSetting) -> InvalidSetting:
    """What is wrong with a destination, with its place and in the words of the file."""
    name, dot, rest = error.setting.partition(".")
    reason = _word.sub(lambda word: _KEYS.get(word[0], word[0]), error.reason)
    return InvalidSetting(f"{place}.{_KEYS.get(name, name)}{dot}{rest}", error.value, reason)


def _documents(file: str) -> list[Any]:
    try:
        from .documents import documents_of
    except ImportError:
        reason = "reading it takes PyYAML: pip install 'auditlog-jsonl[forward]'"
        raise InvalidSetting("config", file, reason) from None
    try:
        with open(file, "rb") as stream:
            return documents_of(stream.read())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidSetting("config", file, f"cannot be read: {reason}") from None
    except ValueError as error:
        raise InvalidSetting("config", file, f"is no YAML: {error}") from None


def _items(place: str, document: Any) -> list[Any]:
    """What the destinations of a document are made of; `place` is that of the document."""
    found: Any = document if isinstance(document, dict) else {}
    for key in _PATH:
        found = found.get(key)
        if found is None:
            return []
        place += key
        _check_is(list if key == _PATH[-1] else dict, found, place)
        place += "."
    return list(found)


def _settings(place: str, item: Any) -> dict[str, Any]:
    """The fields of a destination."""
    _check_is(dict, item, place)
    given = {}
    for key, value in item.items():
        if key not in _FIELDS:
            raise InvalidSetting(f"{place}.{key}", "[redacted]", _unknown(str(key)))
        if value is not None:  # a key without a value is as none
            given[_FIELDS[key].name] = _given(f"{place}.{key}", key, value)
    if "endpoint" not in given:
        raise InvalidSetting(f"{place}.endpoint", "", 'is missing; it is like "tcp://host:5044/"')
    return given


def _given(place: str, key: str, value: Any) -> Any:
    """What a field is given, where the file has that value."""
    default = _FIELDS[key].default
    if _FIELDS[key].default_factory is not MISSING:
        _check_is(dict, value, place)
        return _expanded(place, value) if key == "headers" else value
    _check_is(str, value, place)
    if isinstance(default, bool):
        return _BOOLEANS.get(value.lower(), value)
    if isinstance(default, int | float):
        try:
            return type(default)(value)
        except ValueError:
            return value  # which the destination refuses, with its own words
    return value


def _expanded(place: str, headers: Mapping[str, Any]) -> dict[str, Any]:
    """Headers with what the environment has for the `${NAME}` in their values."""
    return {
        name: _variable.sub(partial(_of_environment, f"{place}.{name}"), value)
        if isinstance(value, str)
        else value
        for name, value in headers.items()
    }


def _of_environment(place: str, variable: re.Match[str]) -> str:
    name = variable[1]
    value = os.environ.get(name)
    if not value:
        is_now = "not set" if value is None else "empty"
        reason = f"the environment variable {name} is {is_now}; set it, or correct its name"
        raise InvalidSetting(place, variable[0], reason)
    return value


def _unknown(key: str) -> str:
    """Why a destination has no such key."""
    lower = {known.lower(): known for known in _FIELDS}
    near = get_close_matches(key.lower().replace("_", ""), lower, n=1)
    guess = f"; is it {lower[near[0]]}?" if near else "."
    return f"a destination has no such key{guess} There are {', '.join(_FIELDS)}"


def _check_is(kind: type, value: Any, place: str) -> None:
    names = {dict: "a mapping", list: "a list", str: "a single value", type(None): "empty"}
    if not isinstance(value, kind):
        # What stands in the wrong place may be a password.
        is_now = names.get(type(value), "a value with a tag (!)")
        raise InvalidSetting(place, "[redacted]", f"must be {names[kind]}, and is {is_now}")
