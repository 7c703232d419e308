"""Event <-> one line of the log.

A line is encoded in two parts around `event_ts`, which the writer assigns while it holds the
append lock: everything costly, and all code of users, runs before that.

Encoding is optimistic. orjson writes what it is given; only where it refuses a value, or where
its output may hide one that must be refused (a NaN becomes `null`, a deep nesting is many
brackets), the data is walked value by value (values.canonical), which names the culprit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import InvalidEvent
from .limit import DEFAULT_MAX_LINE_BYTES, fit
from .model import PAYLOADS, Event, EventData, Session
from .payloads import AuditFacts, Model, fields_of, invalid
from .records import decode_record, is_event_type
from .redact import Redactor
from .values import MAX_DEPTH, canonical, plain

TS_DIGITS = 13  # of a time in milliseconds, until the year 2286

_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_rank = {name: rank for rank, name in enumerate(PAYLOADS) if name != "audit"}

_absent = object()

Dump = Callable[[object], bytes]


Encoded = tuple[bytes, int, bytes]
"""A line without its time: what precedes it, `event_ts` (0: assigned by the writer), the rest."""


def line_at(encoded: Encoded, now_ms: int) -> bytes:
    """The whole line, at `now_ms` (milliseconds since the epoch) unless it has its own time."""
    head, event_ts, tail = encoded
    return b"%b%d%b" % (head, event_ts or now_ms, tail)


def encode(
    event_type: str,
    resource_type: str,
    resource_id: str,
    data: Mapping[str, object],
    session: bytes,
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    extra: Mapping[str, object] | None = None,
    event_ts: int = 0,
) -> Encoded:
    """Encode an event whose details are `data` (without the session) and an encoded session.

    `extra` are unknown top-level keys of an event that was read. A line over `max_line_bytes`
    has its longest strings cut (see limit.fit). Raises InvalidEvent, with the path of the field.
    """
    if "session" in data:
        raise InvalidEvent("event_data.session", "is the bound session, no field of the event's details")
    more = b""
    tail: bytes | None = None
    try:
        head = _head(event_type, resource_type, resource_id)
        members = _members(data, _quick)
        if extra:
            more = _quick(extra)
        tail = _tail(members, session, more)
    except (TypeError, InvalidEvent, _Doubtful):
        pass  # what it says may show a value
    if tail is None:
        head = _head(
            _text("event_type", event_type),
            _text("resource_type", resource_type),
            _text("resource_id", resource_id),
        )
        data = _checked(data, "event_data")
        members = _members(data, _sorted_dump)
        if extra:
            more = _sorted_dump(_checked(extra, "event"))
        tail = _tail(members, session, more)
    excess = len(head) + TS_DIGITS + len(tail) - max_line_bytes
    if excess > 0:

        def encode_tail(cut: Mapping[str, object]) -> bytes:
            return _tail(_members(cut, _sorted_dump), session, more)

        tail = fit(_checked(data, "event_data"), len(tail) - excess, encode_tail)
    return head, event_ts, tail


def encode_event(
    event: Event,
    session: bytes,
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
    redactor: Redactor | None = None,
    request_id: str = "",
) -> Encoded:
    """Encode an Event; `session` (encoded) is used where the event brings none of its own.

    `redactor` replaces the secrets of all that the event brings. `request_id` is that of the
    request which writes it; an event with its own time did not happen there.
    """
    if type(event.event_ts) is not int or event.event_ts < 0:
        raise InvalidEvent("event_ts", "must be milliseconds since the epoch")
    details = event.event_data
    known = {name: value for name, value in details.__dict__.items() if value is not None}
    known.pop("session", None)
    data = known | (details.model_extra or {})
    if request_id and not event.event_ts:
        data = with_request_id(data, request_id)
    if details.session is not None:
        session = encode_session(details.session, redactor)
    extra = event.model_extra or {}
    if type(event) is not Event:  # a subclass may have fields of its own
        own = {name: value for name, value in event.__dict__.items() if name not in Event.model_fields}
        extra = {**extra, **own}
    if redactor is not None:
        data, extra = redactor.details(data), redactor.details(extra)
    return encode(
        event.event_type,
        event.resource_type,
        event.resource_id,
        data,
        session,
        max_line_bytes,
        extra,
        event.event_ts,
    )


def with_request_id(data: dict[str, Any], request_id: str) -> dict[str, Any]:
    """The details of an event with the id of the request in which it happens."""
    facts = data.get("audit", {})
    if isinstance(facts, AuditFacts):
        facts = fields_of(facts)
    if not isinstance(facts, dict) or facts.get("request_id"):
        return data
    return {**data, "audit": {**facts, "request_id": request_id}}


def encode_session(session: Session, redactor: Redactor | None = None) -> bytes:
    """The session as it stands in a line, to be encoded once and used for many events."""
    if redactor is not None:
        session = redactor.session(session)
    fields = _checked({"session": session}, "event_data")["session"]
    return _escape(orjson.dumps(_modelled(Session, fields, _sorted_dump, "session")))


def decode(line: bytes) -> Event:
    """The typed event of a stored line, whichever of Omni's formats it has.

    Raises ValueError, with the reason, where the line is no event.
    """
    try:
        event = _event_validator()(line)
    except ValidationError as error:
        decode_record(line)  # broken JSON is the better reason, where it is the reason
        raise ValueError(str(invalid("event", error))) from None
    if event.event_data.session is None and event.event_data.model_extra:
        return _with_flat_session(event)
    return event


@cache
def _event_validator() -> Callable[[bytes], Event]:
    return TypeAdapter(Event).validator.validate_json


def _with_flat_session(event: Event) -> Event:
    extra = event.event_data.model_extra or {}
    flat = {name: extra[name] for name in Session.model_fields if name in extra}
    try:
        session = Session.model_validate(flat) if flat else None
    except ValidationError:  # somebody's own fields by the same names
        return event
    own = {name: value for name, value in extra.items() if name not in flat}
    known = {name: value for name, value in event.event_data if name not in extra}
    data = EventData.model_validate(known | own | {"session": session})
    return event.model_copy(update={"event_data": data})


@lru_cache(maxsize=1024)
def _kind(event_type: str, resource_type: str) -> bytes:
    """The start of a line, which few combinations of types share."""
    if not isinstance(resource_type, str):
        raise TypeError("resource_type")
    if not is_event_type(event_type):
        raise InvalidEvent("event_type", "must be lower-case letters, digits and _, as in k8s_access")
    head = b'{"event_type":"%b"' % event_type.encode()
    if resource_type:
        head += b',"resource_type":' + _escape(orjson.dumps(resource_type))
    return head


def _head(event_type: str, resource_type: str, resource_id: str) -> bytes:
    if not isinstance(resource_id, str):
        raise TypeError("resource_id")
    head = _kind(event_type, resource_type)
    if resource_id:
        return head + b',"resource_id":%b,"event_ts":' % _escape(orjson.dumps(resource_id))
    return head + b',"event_ts":'


def _tail(members: dict[str, object], session: bytes, more: bytes) -> bytes:
    members["session"] = orjson.Fragment(session)  # the last field, and encoded long before
    rest = b"," + more[1:] if more else b"}"
    return _escape(b"".join((b',"event_data":', orjson.dumps(members), rest, b"\n")))


def _members(data: Mapping[str, Any], dump: Dump) -> dict[str, object]:
    """The fields of `data` in their order in a line, each ready to be dumped."""
    members: dict[str, object] = {}
    for name in sorted(data, key=_order) if len(data) > 1 else data:
        value = data[name]
        model = PAYLOADS.get(name)
        if model is None:
            members[name] = orjson.Fragment(dump(value))
        elif value is not None:
            members[name] = _modelled(model, value, dump, name)
    return members


def _checked(data: Mapping[str, object], path: str) -> dict[str, Any]:
    """`data` as plain JSON values, each of them walked; the first that is none is named."""
    checked = {}
    for name, value in data.items():
        fields = fields_of(value) if isinstance(value, Model) else value
        checked[str(canonical(name, path))] = canonical(fields, f"{path}.{name}")
    return checked


def _order(name: str) -> tuple[int, str]:
    return _rank.get(name, len(_rank)), name


def _text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidEvent(path, "must be a string")
    return str(canonical(value, path))


# A field: its name, how it is validated (None: a string, whose type says enough), and whether it
# is written when it is present but empty.
_Field = tuple[str, Callable[[object], object] | None, bool]


@cache
def _fields(model: type[Model]) -> tuple[_Field, ...]:
    return tuple(
        (name, None if field.annotation is str else _validator(field.annotation), field.default is None)
        for name, field in model.model_fields.items()
    )


def _validator(annotation: Any) -> Callable[[object], object]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True)).validator.validate_python


_validate_text = _validator(str)


def _modelled(model: type[Model], value: object, dump: Dump, payload: str) -> dict[str, object]:
    """A modelled value's fields in order, the empty ones left out, unknown ones sorted behind.

    Field by field, because nearly all are strings: validating a whole payload with pydantic, and
    then dropping what is empty, takes longer.
    """
    if type(value) is model:
        value = fields_of(value)
    if not isinstance(value, dict):
        raise InvalidEvent(f"event_data.{payload}", f"must be a dict or a {model.__name__}")
    kept: dict[str, object] = {}
    known = 0
    for name, validate, is_message in _fields(model):
        field = value.get(name, _absent)
        if field is _absent:
            continue
        known += 1
        if validate is None and type(field) is str:
            if field:
                kept[name] = field
        elif field is not None:
            try:
                field = (validate or _validate_text)(field)
            except ValidationError as error:
                raise invalid(f"event_data.{payload}.{name}", error) from None
            if field:
                kept[name] = orjson.Fragment(dump(field))
            elif is_message:
                kept[name] = field
    if known < len(value):
        for name in sorted(value.keys() - model.model_fields.keys()):
            kept[name] = orjson.Fragment(dump(value[name]))
    return kept


class _Doubtful(Exception):
    """The output may hide a value that must be refused."""


def _quick(value: object) -> bytes:
    encoded = orjson.dumps(value, plain, _OPTIONS)
    if b"null" in encoded:
        raise _Doubtful
    if len(encoded) > MAX_DEPTH and encoded.count(b"{") + encoded.count(b"[") > MAX_DEPTH:
        raise _Doubtful
    return encoded


def _sorted_dump(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _escape(encoded: bytes) -> bytes:
    """What Go's encoding/json escapes beyond JSON's own rules; outside strings these never stand."""
    encoded = encoded.replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")
    if encoded.isascii():
        return encoded
    return encoded.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
