"""What the hosts of one configuration turned out to be like: asked once, whatever the number of repositories."""

from __future__ import annotations

import threading


class KnownHosts:
    """By host and port. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._finding: dict[str, threading.Lock] = {}
        self.schemes: dict[str, str] = {}  # of hosts that may speak plain HTTP
        self.lacks_referrers_until: dict[str, float] = {}  # monotonic: it said that it has no referrers API

    def finding(self, netloc: str) -> threading.Lock:
        """Held by who finds out the scheme of a host."""
        with self._lock:
            return self._finding.setdefault(netloc, threading.Lock())
