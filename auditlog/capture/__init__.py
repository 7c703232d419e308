"""Who is acting: the session of the running code, bound to its context."""

from .session import bind, current, wrap

__all__ = ["bind", "current", "wrap"]
