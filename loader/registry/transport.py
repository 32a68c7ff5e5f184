"""HTTP behind one seam: the client speaks to a `Transport`, tests give it another one.

A transport sends one request and returns the answer as it came: it follows no redirect, repeats nothing that could
have had an effect, and adds no credentials. Errors never quote a query string (signed URLs carry secrets there).

What is only asked for goes over kept sockets (ranges.py). Where there is a proxy or anything else out of the ordinary,
ranges go through urllib3, and documents, like all that is sent, through `requests`, which session.py imports when it is
first needed.
"""

from __future__ import annotations

import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import InvalidURL
from typing import TYPE_CHECKING, Protocol
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, ProtocolError, SSLError

from loader.errors import RegistryError, TransientRegistryError, UnreachableError, UsageError
from loader.registry.config import RegistryConfig
from loader.registry.paced import paced
from loader.registry.ranges import Origin, RangePool, RangeResponse, StaleConnectionError

if TYPE_CHECKING:
    from loader.registry.session import DocumentSession

USER_AGENT = "erofs-ondemand/0.1"
# Who runs with --insecure knows; once a request would be noise.
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
_SHORT = 16384  # bytes of a body that are rather read than its connection closed
_POOL_SIZE = 64  # kept connections per host: as many as readers may wait at once


class PlainHttpError(RegistryError):
    """The server answered a TLS handshake with something else: it probably speaks plain HTTP."""


@dataclass(slots=True)
class HttpRequest:
    """One request. An iterator as body needs a Content-Length header."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Iterator[bytes] | None = None


class HttpResponse(Protocol):
    """One answer; `close` after the last read, whether or not the body was read whole."""

    status: int

    @property
    def headers(self) -> Mapping[str, str]:
        """Case-insensitive."""
        ...

    def read(self, amount: int | None = None, /) -> bytes:
        """Up to `amount` bytes, empty at the end; TransientRegistryError if the body breaks off."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """Where requests go."""

    def send(self, request: HttpRequest) -> HttpResponse: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How one host is spoken to. `timeout` is (connect, read) in seconds, `proxy` a URL."""

    timeout: tuple[float | None, float | None]
    context: ssl.SSLContext | None
    proxy: str | None


def public_url(url: str) -> str:
    """A URL as a message may show it: without credentials and query."""
    parts = split_url(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def split_url(url: str) -> SplitResult:
    """A URL's parts; RegistryError for what is none, such as a redirect to `http://[`."""
    try:
        return urlsplit(url)
    except ValueError:
        raise RegistryError(f"not a URL: {url.partition('?')[0][:200]!r}") from None


class PooledTransport:
    """Kept connections, proxies from the environment and per-host TLS settings. Thread-safe."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str], urllib3.PoolManager] = {}
        self._range_pools: dict[tuple[str, str], RangePool | None] = {}
        self._odd = set[tuple[str, str]]()  # servers that do not say beforehand how long a document is
        self._session: DocumentSession | None = None

    def send(self, request: HttpRequest) -> HttpResponse:
        """Send one request; a kept connection that turns out to be dead is replaced once where that is harmless."""
        harmless = request.method in ("GET", "HEAD") and request.body is None
        try:
            return self._send(request)
        except StaleConnectionError:
            if not harmless:
                raise
        return self._send(request)

    def close(self) -> None:
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
            range_pools, self._range_pools = list(self._range_pools.values()), {}
            session, self._session = self._session, None
        for pool in pools:
            pool.clear()
        for range_pool in range_pools:
            if range_pool is not None:
                range_pool.close()
        if session is not None:
            session.close()

    def _send(self, request: HttpRequest) -> HttpResponse:
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
        with mapped_errors(request.url):
            ranged = "Range" in headers
            if request.method == "GET" and request.body is None:
                answer = self._get(request.url, headers, ranged)
                if answer is not None:
                    return answer
            if not ranged:
                return _PooledResponse(self._documents().send(request, headers), request.url)
            raw = self._pool(request.url).request(
                request.method,
                request.url,
                body=request.body,
                headers=headers,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            return _PooledResponse(raw, request.url)

    def _get(self, url: str, headers: dict[str, str], ranged: bool) -> RangeResponse | None:
        """The answer over a kept socket; None where a general client has to be asked.

        A server that once answered a document's request in an odd way would be asked twice for each: it is not.
        """
        parts = split_url(url)
        key = (parts.scheme, parts.netloc)
        if not ranged and key in self._odd:
            return None
        try:
            pool = self._range_pools[key]
        except KeyError:
            pool = self._add_range_pool(key, parts, url)
        if pool is None:
            return None
        shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        try:
            answer = pool.send(f"{parts.path}?{parts.query}" if parts.query else parts.path, headers, shown)
        except ssl.SSLError as error:
            raise _tls_error(shown, error) from None
        if answer is None and not ranged:
            self._odd.add(key)
        return answer

    def _add_range_pool(self, key: tuple[str, str], parts: SplitResult, url: str) -> RangePool | None:
        settings, pool = self._settings(url), None
        if parts.hostname and not settings.proxy and "@" not in parts.netloc and parts.scheme in ("http", "https"):
            with suppress(ValueError):  # a port that is none
                port = parts.port or (443 if parts.scheme == "https" else 80)
                pool = RangePool(Origin(parts.hostname, port, settings.context, *settings.timeout))
        with self._lock:
            return self._range_pools.setdefault(key, pool)

    def _documents(self) -> DocumentSession:
        with self._lock:
            if self._session is None:
                from loader.registry.session import DocumentSession

                self._session = DocumentSession(self._settings)
            return self._session

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = split_url(url)
        key = (parts.scheme, parts.netloc)
        pool = self._pools.get(key)
        if pool is None:
            with self._lock:
                pool = self._pools.get(key)
                if pool is None:
                    pool = self._pools[key] = _make_pool(self._settings(url))
        return pool

    def _settings(self, url: str) -> HostSettings:
        parts = urlsplit(url)
        host = self._config.host(parts.netloc)
        context = _tls_context(host.ca_file, host.insecure) if parts.scheme == "https" else None
        return HostSettings((host.connect_timeout, host.timeout), context, _proxy(parts.scheme, parts.netloc))


def _proxy(scheme: str, netloc: str) -> str | None:
    """The proxy that the environment names for a host."""
    proxy = urllib.request.getproxies_environment().get(scheme)
    if not proxy or urllib.request.proxy_bypass(netloc):
        return None
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        known = urllib3.util.parse_url(url).scheme in ("http", "https")
    except LocationParseError:
        known = False
    if not known:  # not shown: it may have a password
        raise UsageError(f"{scheme.upper()}_PROXY names no proxy", "it must be like http://host:port, or unset")
    return url


def _make_pool(settings: HostSettings) -> urllib3.PoolManager:
    timeout = urllib3.Timeout(connect=settings.timeout[0], read=settings.timeout[1])
    if not settings.proxy:
        return paced(urllib3.PoolManager(maxsize=_POOL_SIZE, timeout=timeout, ssl_context=settings.context))
    return paced(
        urllib3.ProxyManager(
            settings.proxy,
            proxy_headers=_proxy_headers(settings.proxy),
            maxsize=_POOL_SIZE,
            timeout=timeout,
            ssl_context=settings.context,
        )
    )


class _PooledResponse:
    """urllib3's answer with our errors."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, url: str) -> None:
        self.status = raw.status
        self._raw = raw
        self._url = url

    @property
    def headers(self) -> Mapping[str, str]:
        return self._raw.headers

    def read(self, amount: int | None = None, /) -> bytes:
        with mapped_errors(self._url):
            return self._raw.read(amount)

    def close(self) -> None:
        # A body that was read whole has given its connection back already. What is left of a short one (an error's) is
        # read, for a new connection takes longer; any other connection is of no more use.
        if (length := self._raw.headers.get("Content-Length", "")).isdecimal() and int(length) <= _SHORT:
            with suppress(HTTPError, OSError):
                self._raw.drain_conn()
        self._raw.close()
        self._raw.release_conn()


@contextmanager
def mapped_errors(url: str) -> Iterator[None]:
    """Turn what urllib3 raises into our errors."""
    shown = public_url(url)
    try:
        yield
    except (LocationParseError, UnicodeError, InvalidURL):
        raise RegistryError(f"{shown}: not a URL") from None
    except SSLError as error:
        raise _tls_error(shown, error) from None
    except NewConnectionError as error:
        raise UnreachableError(f"{shown}: cannot connect ({_reason(error)})") from None
    except ProtocolError as error:
        raise StaleConnectionError(f"{shown}: the connection broke ({_reason(error)})") from None
    except urllib3.exceptions.TimeoutError as error:
        kind = UnreachableError if isinstance(error, urllib3.exceptions.ConnectTimeoutError) else TransientRegistryError
        raise kind(f"{shown}: timed out") from None
    except urllib3.exceptions.ProxyError as error:
        raise UnreachableError(
            f"{shown}: the proxy cannot be reached ({_reason(error)})", "check HTTPS_PROXY"
        ) from None
    except (HTTPError, OSError) as error:
        raise TransientRegistryError(f"{shown}: {type(error).__name__}") from None
    except ValueError as error:  # a chunk of -5 bytes
        raise TransientRegistryError(f"{shown}: a malformed answer ({error})") from None


def _tls_error(shown: str, error: Exception) -> RegistryError:
    text = str(error)
    if "WRONG_VERSION_NUMBER" in text or "HTTP_REQUEST" in text or "record layer failure" in text.lower():
        return PlainHttpError(f"{shown}: the server does not speak TLS", "use --insecure for a plain HTTP registry")
    if "certificate has expired" in text:
        return RegistryError(
            f"{shown}: the server's certificate has expired", "renew it, or check this machine's clock"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text or "doesn't match" in text:
        return RegistryError(
            f"{shown}: the server's certificate is not trusted",
            "set ca_file for this host in the configuration, or use --insecure",
        )
    return TransientRegistryError(f"{shown}: TLS failed")


def _reason(error: Exception) -> str:
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner.args[0])[:120] if inner.args and isinstance(inner.args[0], str) else type(inner).__name__


def _tls_context(ca_file: str | None, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context()
        if ca_file:
            context.load_verify_locations(ca_file)  # in addition to the system's
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"ca_file {ca_file}: {error}") from None
    if insecure and not ca_file:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    return dict(urllib3.make_headers(proxy_basic_auth=f"{parts.username}:{parts.password or ''}"))
