"""Who is acting, and what they do, without the server having to remember.

Here is the session of the running code. The modules beside this one capture it from frameworks,
and events from stores, proxies and loggers; each is imported by its name (docs/integrations.md).
"""

from .session import bind, current, identify, wrap

__all__ = ["bind", "current", "identify", "wrap"]
