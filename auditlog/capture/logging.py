"""A bridge from logging: messages of chosen loggers as events, and the session in structlog's messages."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import InvalidEvent, InvalidSetting
from ..events.model import Event, EventData
from ..events.values import MAX_DEPTH, canonical, plain
from .request import clean
from .session import bound

if TYPE_CHECKING:
    from ..logger import AuditLogger

EVENT_TYPE = "log"
LONGEST_MESSAGE = 16 << 10  # characters
_DEEPEST = MAX_DEPTH // 2  # of what is passed as extra

# What every record has, by an empty one, and what formatters add to it.
_ORDINARY = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}


class AuditHandler(logging.Handler):
    """Writes the messages of chosen loggers as events of the type `log`, with the bound session.

        handler = AuditHandler(audit, "shop.security")
        logging.getLogger("shop.security").addHandler(handler)

    audit: where the events go.
    loggers: names of the loggers whose messages are events; those below them are, too. Messages of
        all others are passed over, wherever the handler is added.
    level: as in logging.Handler.

    An event holds `log`: `logger`, `level`, `message`, and `extra` with the fields that were
    passed as such, each as text where JSON has no form for it. The log call raises what
    AuditLogger.write raises, unless `on_failure` drops events of the type `log`.

    Raises InvalidSetting for the root logger, which anybody writes to, and for the loggers of auditlog.
    """

    def __init__(self, audit: AuditLogger, *loggers: str, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        if not loggers:
            raise InvalidSetting("loggers", loggers, "name the loggers whose messages are to be events")
        for name in loggers:
            if not isinstance(name, str) or name in ("", "root"):
                raise InvalidSetting("loggers", name, "must be the name of a logger below the root")
            if name.partition(".")[0] == "auditlog":
                raise InvalidSetting("loggers", name, "its messages are about writing to this log")
        self.audit = audit
        self._names = loggers
        self._below = tuple(f"{name}." for name in loggers)

    def handle(self, record: logging.LogRecord) -> Any:
        """Emit a record that passes the filters, as logging.Handler does, but hold no lock meanwhile.

        The log has locks of its own; this one would keep threads from sharing a sync.
        """
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as an event."""
        if record.name not in self._names and not record.name.startswith(self._below):
            return
        log: dict[str, Any] = {
            "logger": record.name,
            "level": record.levelname,
            "message": clean(_message_of(record), LONGEST_MESSAGE),
        }
        extra = {name: _plain(value) for name, value in vars(record).items() if name not in _ORDINARY}
        if extra:
            log["extra"] = extra
        if record.exc_info and record.exc_info[0]:  # not its text, which may show values
            log["error"] = record.exc_info[0].__name__
        details: dict[str, Any] = {"log": log}
        self.audit.write(Event(event_type=EVENT_TYPE, event_data=EventData(**details)))


def add_session(_logger: object, _method: str, event_dict: MutableMapping[str, Any]) -> Any:
    """A processor for structlog: who acts, as `actor`, `user_id`, `role`, `ip_address` and `request_id`.

        structlog.configure(processors=[add_session, structlog.processors.JSONRenderer()])

    What is not known is left out, what the message has already stays. A session that cannot be found
    never keeps a message from being logged.
    """
    try:
        here = bound()
    except Exception:  # of a `session_from`: of that, an event complains
        here = None
    if here is not None:
        session = here.session
        fields = {
            "actor": session.email,
            "user_id": session.user_id,
            "role": session.role,
            "ip_address": session.ip_address,
            "request_id": here.request_id,
        }
        for name, value in fields.items():
            if value:
                event_dict.setdefault(name, value)
    return event_dict


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # its arguments do not fit its format
        return str(record.msg)


def _plain(value: object, depth: int = 0) -> object:
    """A value as JSON has it, each leaf that it has no form for as text.

    Never a container as text: the names in it tell which of its values are secrets.
    """
    with suppress(Exception):
        if isinstance(value, BaseModel):
            value = dict(value)
        elif hasattr(value, "_asdict"):  # a named tuple
            value = value._asdict()
        elif isinstance(value, Mapping):
            value = dict(value)
        elif isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray | tuple):
            value = list(value)
        elif not isinstance(value, str | int | float | None):
            value = plain(value)
    if isinstance(value, dict | list) and depth == _DEEPEST:
        return f"a {type(value).__name__} that is nested too deep"
    if isinstance(value, dict):
        return {_name(name): _plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    try:
        return canonical(value, "extra")
    except InvalidEvent:
        return _text(value)


def _name(key: object) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else _text(key)


def _text(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if hasattr(value, "__dict__") and not isinstance(value, BaseException | type):
        return f"a {type(value).__name__}"
    try:
        return clean(str(value), LONGEST_MESSAGE)
    except Exception:
        return f"a {type(value).__name__} without a text"
