"""One base URL that answers for a repository: scheme detection, authentication, redirects, blob ranges."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urljoin

from erofs_builder.digest import Digest
from erofs_builder.errors import IntegrityError
from loader.errors import RegistryError, TransientRegistryError, UnreachableError
from loader.registry.auth import Authenticator, Scopes, repository_scope
from loader.registry.config import RegistryConfig
from loader.registry.credentials import Keychain
from loader.registry.known import KnownHosts
from loader.registry.reference import DEFAULT_HOST
from loader.registry.status import error_of
from loader.registry.streams import CHUNK, read_exactly
from loader.registry.transport import (
    HttpRequest,
    HttpResponse,
    PlainHttpError,
    Transport,
    public_url,
    split_url,
)

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_LOCATION_SECONDS = 300.0  # signed URLs commonly live 5 to 20 minutes; one that has run out is asked for again
_MAX_LOCATIONS = 4096
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]+|\*)\Z")


class Endpoint:
    """A registry, or a mirror of it, for one repository. Thread-safe."""

    def __init__(
        self,
        host: str,
        repository: str,
        config: RegistryConfig,
        transport: Transport,
        keychain: Keychain,
        scheme: str | None = None,
        prefix: str = "",
        known: KnownHosts | None = None,
    ) -> None:
        self.host = host
        self.repository = repository
        self.settings = config.host(host)
        self._transport = transport
        netloc = "registry-1.docker.io" if host == DEFAULT_HOST else host
        self._path = f"{netloc}{prefix}/v2/{repository}/"
        self._scheme = scheme or (None if self.settings.insecure else "https")
        self.known = known or KnownHosts()
        self._auth = Authenticator(transport, host, repository, keychain, self.settings.insecure)
        self._locations: OrderedDict[Digest, tuple[str, float]] = OrderedDict()

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}"

    def send(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        actions: str = "pull",
        more_scopes: Scopes = (),
    ) -> HttpResponse:
        """One request below /v2/REPOSITORY/ (or to an absolute URL of this registry), with login and redirects."""
        return self._located(method, path, headers, body, actions, more_scopes)[0]

    def blob_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a blob, unverified."""
        response = self.open_range(digest, offset, length)
        try:
            return read_exactly(response, length, f"{self}@{digest} bytes {offset}+{length}")
        finally:
            response.close()

    def open_range(self, digest: Digest, offset: int, length: int) -> HttpResponse:
        """The stream of `length` bytes of a blob, or of fewer where it breaks off; the caller closes it."""
        what = f"{self}@{digest} bytes {offset}+{length}"
        response = self._open_range(digest, f"bytes={offset}-{offset + length - 1}")
        try:
            _check_range(response, what, offset, length)
            if response.status == 200:
                _skip(response, offset, what)
        except BaseException:
            response.close()
            raise
        return response

    def open_blob(self, digest: Digest, offset: int = 0) -> HttpResponse:
        """A stream of a blob from `offset` on, unverified; the caller closes it."""
        what = f"{self}@{digest}"
        response = self._open_range(digest, f"bytes={offset}-" if offset else None)
        try:
            _check_range(response, what, offset, None)
            if response.status == 200 and offset:
                _skip(response, offset, what)
        except BaseException:
            response.close()
            raise
        return response

    def _open_range(self, digest: Digest, span: str | None) -> HttpResponse:
        """A GET of a blob, straight from where the registry redirected to the last time, while that works."""
        headers = {"Range": span} if span else {}
        known = self._locations.get(digest)
        if known and known[1] > time.monotonic():
            with suppress(RegistryError):  # whatever became of that place: the registry may know a better one
                response = self._transport.send(HttpRequest("GET", known[0], dict(headers)))
                if response.status in (200, 206):
                    return response
                response.close()
            self.forget_location(digest)
        response, url = self._located("GET", f"blobs/{digest}", headers)
        if response.status not in (200, 206):
            raise error_of(response, f"{self}@{digest}")
        if url != self._url(f"blobs/{digest}"):
            self._locations[digest] = (url, time.monotonic() + _LOCATION_SECONDS)
            while len(self._locations) > _MAX_LOCATIONS:
                self._locations.popitem(last=False)
        return response

    def forget_location(self, digest: Digest) -> None:
        """What came from where the registry redirected to was wrong: ask the registry again."""
        self._locations.pop(digest, None)

    def _located(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        actions: str = "pull",
        more_scopes: Scopes = (),
    ) -> tuple[HttpResponse, str]:
        """`send`, and the URL that answered."""
        self._settle_scheme()
        url = self._url(path)
        scopes = (repository_scope(self.repository, actions), *more_scopes)
        if not same_origin(url, self._url("")):  # an upload or page elsewhere: the URL is the permission
            return self._redirected(method, url, headers, self._authorized(method, url, headers, body, None))
        used = self._auth.header(scopes)
        response = self._authorized(method, url, headers, body, used)
        if response.status == 401:
            challenge = response.headers.get("WWW-Authenticate", "")
            refused = error_of(response, f"{self}", self._auth.login_hint)
            if body is not None and not isinstance(body, bytes):
                raise TransientRegistryError(f"{self}: the login ran out during an upload")  # body is spent
            self._auth.challenged(challenge, scopes, used)
            header = self._auth.header(scopes)
            if header == used:
                raise refused
            response = self._authorized(method, url, headers, body, header)
            if response.status == 401:
                raise error_of(response, f"{self}: the login is refused", self._auth.login_hint)
        return self._redirected(method, url, headers, response)

    def _authorized(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None,
        body: bytes | Iterator[bytes] | None,
        authorization: str | None,
    ) -> HttpResponse:
        sent = dict(headers or {})
        if authorization:
            sent["Authorization"] = authorization
        return self._transport.send(HttpRequest(method, url, sent, body))

    def _redirected(
        self, method: str, url: str, headers: dict[str, str] | None, response: HttpResponse
    ) -> tuple[HttpResponse, str]:
        """Follow redirects of a GET or HEAD without credentials: the Location carries its own, or needs none."""
        if method not in ("GET", "HEAD"):
            return response, url
        for _ in range(_MAX_REDIRECTS):
            if response.status not in _REDIRECTS:
                return response, url
            location = response.headers.get("Location", "")
            response.close()
            target = _join(url, location)
            self._check_redirect(url, target)
            authorization = None
            if same_origin(self._url(""), target):
                authorization = self._auth.header((repository_scope(self.repository, "pull"),))
            url = target
            response = self._authorized(method, url, headers, None, authorization)
        response.close()
        raise RegistryError(f"{self}: more than {_MAX_REDIRECTS} redirects")

    def _check_redirect(self, url: str, target: str) -> None:
        scheme = split_url(target).scheme
        if scheme not in ("http", "https"):
            raise RegistryError(f"{self}: redirects to {public_url(target)[:200]!r}")
        if scheme == "http" and split_url(url).scheme == "https" and not self.settings.insecure:
            raise RegistryError(f"{self}: redirects from HTTPS to plain HTTP", "use --insecure if that is intended")

    def _settle_scheme(self) -> None:
        """Hosts that may be insecure: HTTPS first, plain HTTP if nothing there speaks TLS (once)."""
        if self._scheme is None:
            with self.known.finding(self._netloc):
                self._scheme = self.known.schemes.get(self._netloc) or self._find_scheme()
                self.known.schemes[self._netloc] = self._scheme

    @property
    def _netloc(self) -> str:
        return self._path.partition("/")[0]

    @property
    def lacks_referrers(self) -> bool:
        """Whether it said lately that it has no referrers API."""
        return self.known.lacks_referrers_until.get(self._netloc, 0.0) > time.monotonic()

    def note_lack_of_referrers(self, seconds: float) -> None:
        """It said so just now, and is not asked again for so long."""
        self.known.lacks_referrers_until[self._netloc] = time.monotonic() + seconds

    def _find_scheme(self) -> str:
        netloc = self._netloc
        try:
            self._transport.send(HttpRequest("GET", f"https://{netloc}/v2/")).close()
            return "https"
        except PlainHttpError:
            return "http"
        except UnreachableError:
            self._transport.send(HttpRequest("GET", f"http://{netloc}/v2/")).close()
            return "http"

    def _url(self, path: str) -> str:
        if path.startswith(("http://", "https://")):
            return path
        return f"{self._scheme}://{self._path}{path}"

    def absolute(self, path: str, location: str) -> str:
        """The URL that an answer to a request for `path` names as Location or Link; RegistryError if it names none."""
        if not location:
            raise RegistryError(f"{self}: an answer without a Location")
        return _join(self._url(path), location)


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs have the same scheme, host and port: only then may credentials follow."""
    first, second = split_url(url), split_url(other)
    return (first.scheme, first.netloc.lower()) == (second.scheme, second.netloc.lower())


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise RegistryError(f"{public_url(url)}: leads to what is not a URL: {location[:100]!r}") from None


def _check_range(response: HttpResponse, what: str, offset: int, length: int | None) -> None:
    if response.status == 200:
        return
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", "").strip())
    wrong_end = match and length is not None and int(match[2]) != offset + length - 1
    if match is None or int(match[1]) != offset or wrong_end:
        got = response.headers.get("Content-Range", "")[:80]
        short = match is not None and int(match[1]) == offset and int(match[2]) < offset + (length or 0) - 1
        if short:
            raise IntegrityError(f"{what}: the blob ends before ({got!r})")
        raise RegistryError(f"{what}: the server sent another range ({got!r})")


def _skip(response: HttpResponse, count: int, what: str) -> None:
    """Read past the start of a body whose server ignores ranges, holding little in memory."""
    while count:
        data = response.read(min(count, CHUNK))
        if not data:
            raise TransientRegistryError(f"{what}: the body ended {count} bytes before the range")
        count -= len(data)
