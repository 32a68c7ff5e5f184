"""Uploads, and documents and tokens of servers that are out of the ordinary, over `requests`: one session, an adapter
mounted for each host.

Only the pooling, the proxies and the sending are its part. What it would do on its own - redirects, cookies, .netrc,
another list of CAs, a proxy of its choice - is off, so that both ways of a transport behave alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from loader.registry.paced import paced
from loader.registry.transport import HostSettings, HttpRequest

_POOL_SIZE = 8  # kept connections per host: uploads and documents go a few at a time


class DocumentSession:
    """Sends requests, raises what urllib3 raised. Thread-safe. `settings(url)` is asked once a host."""

    def __init__(self, settings: Callable[[str], HostSettings]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.adapters.clear()

    def send(self, request: HttpRequest, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer as it came, its body unread. Whatever is wrong with the request itself is a ValueError."""
        adapter = self._adapter(request.url)
        try:
            response = self._session.send(
                _prepared(request, headers),
                stream=True,
                allow_redirects=False,
                timeout=adapter.settings.timeout,
                proxies=adapter.proxies,
            )
        except requests.RequestException as error:
            cause = _cause(error)
            raise cause from cause.__cause__  # the system's own word
        raw: urllib3.BaseHTTPResponse = response.raw
        return raw

    def close(self) -> None:
        self._session.close()

    def _adapter(self, url: str) -> _HostAdapter:
        parts = urlsplit(url)
        prefix = f"{parts.scheme}://{parts.netloc}".lower()  # the longest one that matches counts: its own
        with self._lock:
            adapter = self._session.adapters.get(prefix)
            if adapter is None:
                adapter = _HostAdapter(parts.scheme, self._settings(url))
                self._session.mount(prefix, adapter)
        assert isinstance(adapter, _HostAdapter)
        return adapter


class _HostAdapter(HTTPAdapter):
    """Pools with this host's TLS context: nothing is added to it."""

    def __init__(self, scheme: str, settings: HostSettings) -> None:
        self.settings = settings
        self.proxies = {scheme: settings.proxy} if settings.proxy else {}
        super().__init__(pool_maxsize=_POOL_SIZE)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **more: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self.settings.context, **more)
        paced(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **more: Any) -> urllib3.ProxyManager:
        manager: urllib3.ProxyManager = super().proxy_manager_for(proxy, ssl_context=self.settings.context, **more)
        paced(manager)
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: bool | str, cert: Any = None
    ) -> Any:
        """Scheme, host and port; and no TLS settings of its own choice."""
        parts = urlsplit(request.url or "")
        return {"scheme": parts.scheme, "host": parts.hostname, "port": parts.port}, {}

    def cert_verify(self, conn: Any, url: str, verify: bool | str, cert: Any) -> None:
        """The context says it all."""


def _prepared(request: HttpRequest, headers: dict[str, str]) -> requests.PreparedRequest:
    prepared = requests.Request(request.method, request.url, headers=headers, data=request.body).prepare()
    prepared.url = request.url  # as signed: not quoted anew
    if "Content-Length" in headers:
        prepared.headers.pop("Transfer-Encoding", None)  # a stream of known length
    return prepared


def _cause(error: requests.RequestException) -> Exception:
    """What urllib3 had raised, for the one mapping of both ways."""
    if isinstance(error, ValueError):  # InvalidURL and its like
        return urllib3.exceptions.LocationParseError(str(error))
    inner = error.args[0] if error.args else None
    if isinstance(inner, urllib3.exceptions.MaxRetryError) and inner.reason is not None:
        inner = inner.reason
    return inner if isinstance(inner, Exception) else error
