"""A Hub on this machine for the tests of `armt publish`: the real client talks to it over HTTP."""

from .client import connected, environment
from .server import LocalHub
from .transport import Dropped


__all__ = ["Dropped", "LocalHub", "connected", "environment"]
