"""What each of five HTTP APIs demands of a request: its rules, as their documentation has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson


class BrokenRule(Exception):
    """A request is not what the API says that it must be."""


def must(holds: object, rule: str) -> None:
    """Say that a rule of the API is broken, unless it holds."""
    if not holds:
        raise BrokenRule(rule)


class Message(NamedTuple):
    """One event of a request: its key, its resource's id, its time, and all that was said of it."""

    key: str
    id: str
    ns: int
    fields: dict[str, Any]


def _lines(body: bytes) -> list[bytes]:
    must(body.endswith(b"\n"), "the last line ends with a newline")
    return body[:-1].split(b"\n")


def _object(content: bytes | str) -> dict[str, Any]:
    found = orjson.loads(content)
    must(isinstance(found, dict), "a JSON object")
    return dict(found)


def _message(fields: dict[str, Any], ns: int = 0) -> Message:
    for name in ("msg", "talos-level", "talos-service", "talos-time", "source", "position", "sha256"):
        must(isinstance(fields.get(name), str), f"the message has {name}")
    key = f"{fields['source']}:{fields['position']}:{fields['sha256']}"
    return Message(key, fields.get("resource_id", ""), ns, fields)


def _json_lines(body: bytes) -> Iterator[Message]:
    for line in _lines(body):
        yield _message(_object(line))


def _raw(body: bytes) -> Iterator[Message]:
    for line in _lines(body):
        text = line.decode()
        fields = {} if "…[cut: " in text else _object(line)
        yield Message(text, fields.get("resource_id", ""), 0, fields)


def _loki(body: bytes) -> Iterator[Message]:
    push = _object(body)
    must(push.keys() == {"streams"}, "streams and nothing else")
    for stream in push["streams"]:
        must(stream.keys() == {"stream", "values"}, "a stream has labels and values")
        must(0 < len(stream["stream"]) <= 15, "a stream has labels, and few")
        for name, value in stream["stream"].items():
            must(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) and isinstance(value, str), f"label {name}")
        for value in stream["values"]:
            must(len(value) == 2 and all(isinstance(part, str) for part in value), "a pair of strings")
            ns, line = value
            must(re.fullmatch(r"\d{19}", ns), f"nanoseconds, not {ns}")
            yield _message(_object(line), int(ns))


def _splunk_hec(body: bytes) -> Iterator[Message]:
    for line in _lines(body):  # as Splunk would read it: one object behind the other
        must(re.match(rb'{"time":\d{9,11}\.\d{3},', line), "the time in seconds with milliseconds")
        event = _object(line)
        must(
            event.keys() <= {"time", "host", "source", "sourcetype", "index", "event", "fields"},
            "a key of HEC",
        )
        must(isinstance(event["event"], dict) and event["event"], "an event that is not blank")
        for name in ("host", "source", "sourcetype"):
            must(isinstance(event[name], str) and event[name], name)
        yield _message(event["event"], round(event["time"] * 1000) * 10**6)


def _elasticsearch(body: bytes) -> Iterator[Message]:
    lines = _lines(body)
    must(len(lines) % 2 == 0, "pairs of lines")
    for action, document in zip(lines[::2], lines[1::2], strict=True):
        create = _object(action)
        must(create.keys() == {"create"} and create["create"].keys() == {"_id"}, "create with an _id")
        key = create["create"]["_id"]
        must(isinstance(key, str) and 0 < len(key.encode()) <= 512, "an _id of at most 512 bytes")
        message = _message(_object(document))
        must(message.key == key, "the key as the _id")
        at = message.fields["@timestamp"]
        must(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", at), "a date with nanoseconds")
        must(at == message.fields["talos-time"], "the time")
        yield message


def _otlp(body: bytes) -> Iterator[Message]:
    export = _object(body)
    must(export.keys() == {"resourceLogs"}, "resourceLogs")
    for resource_logs in export["resourceLogs"]:
        resource = _attributes(resource_logs["resource"]["attributes"])
        must({"service.name", "host.name"} <= resource.keys(), "the resource has its names")
        for scope_logs in resource_logs["scopeLogs"]:
            must(scope_logs["scope"]["name"], "the scope has a name")
            for record in scope_logs["logRecords"]:
                yield _log_record(record, resource)


def _log_record(record: dict[str, Any], resource: dict[str, Any]) -> Message:
    known = {"timeUnixNano", "observedTimeUnixNano", "severityNumber", "severityText", "eventName", "body"}
    must(record.keys() == known | {"attributes"}, f"fields of a LogRecord: {record.keys()}")
    must(re.fullmatch(r"\d{1,20}", record["timeUnixNano"]), "64-bit integers as strings")
    must(re.fullmatch(r"\d{1,20}", record["observedTimeUnixNano"]), "64-bit integers as strings")
    must(
        (record["severityNumber"], record["severityText"]) in [(9, "INFO"), (13, "WARN"), (17, "ERROR")],
        "severity",
    )
    must(isinstance(_any_value(record["body"]), str), "a string as the body")
    fields = _attributes(record["attributes"])
    must("truncated" in fields or fields["event_type"] == record["eventName"], "eventName")
    fields = fields | {"resource": resource, "msg": record["body"]["stringValue"]}
    return Message(
        fields["log.record.uid"], fields.get("resource_id", ""), int(record["timeUnixNano"]), fields
    )


def _attributes(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    must(isinstance(pairs, list) and all(pair.keys() == {"key", "value"} for pair in pairs), "KeyValues")
    names = [pair["key"] for pair in pairs]
    must(len(set(names)) == len(names) and all(isinstance(name, str) for name in names), "each key once")
    return {pair["key"]: _any_value(pair["value"]) for pair in pairs}


def _any_value(value: dict[str, Any]) -> Any:
    """The JSON value of an AnyValue, which has one key, or none for null."""
    if value == {}:
        return None
    must(len(value) == 1, f"an AnyValue with one key, not {value.keys()}")
    [(kind, inner)] = value.items()
    must(kind in _KINDS, f"an AnyValue of a known kind, not {kind}")
    return _KINDS[kind](inner)


def _integer(value: Any) -> int:
    must(isinstance(value, str) and -(2**63) <= int(value) < 2**63, "a 64-bit integer as a string")
    return int(value)


def _of_type(kind: type | tuple[type, ...]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        must(isinstance(value, kind), f"{kind}, not {value!r}")
        return value

    return check


_KINDS: dict[str, Callable[[Any], Any]] = {
    "stringValue": _of_type(str),
    "boolValue": _of_type(bool),
    "intValue": _integer,
    "doubleValue": _of_type((float, int)),
    "arrayValue": lambda array: [_any_value(each) for each in array["values"]],
    "kvlistValue": lambda pairs: _attributes(pairs["values"]),
}
PARSERS: dict[str, Callable[[bytes], Iterator[Message]]] = {
    "json_lines": _json_lines,
    "raw": _raw,
    "loki": _loki,
    "splunk_hec": _splunk_hec,
    "elasticsearch": _elasticsearch,
    "otlp": _otlp,
}
