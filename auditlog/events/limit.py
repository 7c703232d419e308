"""Bringing an event that is too large under the limit, visibly.

First its longest strings are cut, each with a marker that gives the original length and hash.
When that is not enough, its largest fields are replaced whole by such a marker. What says which
resource is meant (ids, our own facts) is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import orjson

from ..errors import InvalidEvent

DEFAULT_MAX_LINE_BYTES = 1 << 20
MIN_LINE_BYTES = 4096
MAX_LINE_BYTES = 16 << 20
SHORTEST_CUT = 1024  # bytes: no string that fits into this is ever cut

_ids = frozenset({"id", "cluster_id", "cluster_name", "cluster_uuid"})


def fit(original: dict[str, Any], budget: int, encode: Callable[[dict[str, Any]], bytes]) -> bytes:
    """Return `encode` of `original` with at most `budget` bytes, cut as far as that needs.

    Raises InvalidEvent where what may be cut is not enough.
    """
    cap = max(budget, SHORTEST_CUT)
    data = original
    while cap > SHORTEST_CUT:
        cap = max(cap // 2, SHORTEST_CUT)
        data = {name: _keep_ids(value, _cut(value, cap), name) for name, value in original.items()}
        if len(encoded := encode(data)) <= budget:
            return encoded
    excess = len(encode(data)) - budget
    by_size = sorted(((len(orjson.dumps(data[name])), name) for name in data), reverse=True)
    for size, name in by_size:
        replaced = _keep_ids(original[name], _replacement(original[name]), name)
        gain = size - len(orjson.dumps(replaced))
        if gain <= 0 or excess <= 0:
            continue
        data[name] = replaced
        excess -= gain
    if len(encoded := encode(data)) > budget:
        raise InvalidEvent("event_data", "over the limit, and too little of it is long enough to be cut")
    return encoded


def _keep_ids(value: Any, shortened: Any, name: str) -> Any:
    if name == "audit":
        return value
    if isinstance(value, dict) and isinstance(shortened, dict):
        return shortened | {key: member for key, member in value.items() if key in _ids}
    return shortened


def _cut(value: Any, cap: int) -> Any:
    if isinstance(value, dict):
        return {key: _cut(member, cap) for key, member in value.items()}
    if isinstance(value, list):
        return [_cut(member, cap) for member in value]
    if isinstance(value, str) and len(raw := value.encode()) > cap:
        marker = f"…[cut: {len(raw)} bytes, sha256 {sha256(raw).hexdigest()}]"
        return raw[: cap - len(marker.encode())].decode(errors="ignore") + marker
    return value


def _replacement(value: Any) -> dict[str, Any]:
    raw = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return {"truncated": {"bytes": len(raw), "sha256": sha256(raw).hexdigest()}}
