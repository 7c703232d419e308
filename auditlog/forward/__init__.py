"""Forwarding the log to other systems: Talos-style destinations, syslog, HTTP (docs/forwarding.md)."""

from __future__ import annotations

from .config import load_destinations
from .destination import Destination
from .forwarder import Forwarder
from .status import DestinationStatus, prometheus, read_status

__all__ = [
    "Destination",
    "DestinationStatus",
    "Forwarder",
    "load_destinations",
    "prometheus",
    "read_status",
]
