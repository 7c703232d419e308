"""What may stand in an event: the careful walk over a user's own data.

The codec encodes first and asks afterwards. Only where its encoder refused something, or gave
something that may hide a refused value, is the data walked here, value by value, to convert
what may be converted and to name the path of what may not be written.
"""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import date, datetime, time
from enum import Enum
from typing import cast
from uuid import UUID

from pydantic import BaseModel

from ..errors import InvalidEvent

MAX_DEPTH = 64
INT_RANGE = range(-(2**63), 2**64)

_lone_surrogate = re.compile("[\ud800-\udfff]")


def plain(value: object) -> object:
    """Convert one value, not its members, to one that JSON has; TypeError if it may not be written.

    It is orjson's `default` hook as well, so it is called only for what JSON does not have.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise TypeError("a datetime needs a time zone")
        return value.isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)  # without a subclass's own idea of its text
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, list):
        return list(value)
    hint = " (use an aware datetime)" if isinstance(value, time) else ""
    raise TypeError(f"a value of type {type(value).__name__} cannot be written{hint}")


def canonical(value: object, path: str) -> object:
    """Return `value` as plain JSON values, every one of them checked.

    Raises InvalidEvent with the path of the first value that may not be written: one of a type
    that JSON has no form for, NaN or an infinity, an integer beyond 64 bits, a key that is no
    string, a nesting deeper than 64, or a cycle (which is the same to a reader).
    """
    return _canonical(value, path, 0)


def _canonical(value: object, path: str, depth: int) -> object:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _lone_surrogate.sub("\ufffd", cast("str", value))
    if kind is int:
        if value not in INT_RANGE:
            raise InvalidEvent(path, "an integer must fit into 64 bits")
        return value
    if kind is float:
        if not math.isfinite(cast("float", value)):
            raise InvalidEvent(path, "NaN and infinities have no form in JSON")
        return value
    if depth == MAX_DEPTH:
        raise InvalidEvent(path, f"nested deeper than {MAX_DEPTH} levels, or a cycle")
    if isinstance(value, dict):
        result = {}
        for key, member in value.items():
            if not isinstance(key, str):
                raise InvalidEvent(path, f"a key of type {type(key).__name__} is no string")
            name = _lone_surrogate.sub("\ufffd", str.__str__(key))
            result[name] = _canonical(member, f"{path}.{name}", depth + 1)
        return result
    if kind is list:
        return [
            _canonical(member, f"{path}[{index}]", depth + 1)
            for index, member in enumerate(cast("list[object]", value))
        ]
    try:
        converted = plain(value)
    except TypeError as error:
        raise InvalidEvent(path, str(error)) from None
    except Exception as error:  # a user's own model or property failed
        raise InvalidEvent(path, f"{kind.__name__} cannot be written: {type(error).__name__}") from None
    return _canonical(converted, path, depth)
