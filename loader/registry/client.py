"""A repository of a registry as ImageSource and ImageTarget: mirrors first, then the registry itself."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar
from urllib.parse import urlencode, urlsplit

from erofs_builder.digest import Digest
from erofs_builder.errors import IntegrityError
from loader.artifact import INDEX_TYPE
from loader.errors import LoaderError, NotFoundError, RegistryError, TransientRegistryError, UsageError
from loader.registry import upload
from loader.registry.again import Again
from loader.registry.base import SMALL_BLOB_LIMIT, Descriptor
from loader.registry.config import RegistryConfig
from loader.registry.credentials import Keychain
from loader.registry.documents import ACCEPT, MANIFEST_LIMIT, describe_manifest, fallback_tag, index_entries
from loader.registry.endpoint import Endpoint
from loader.registry.known import KnownHosts
from loader.registry.patience import patiently
from loader.registry.ranges import RangeResponse
from loader.registry.status import error_of
from loader.registry.streams import Readable, read_exactly, verified_stream
from loader.registry.transport import HttpResponse, PooledTransport, Transport

T = TypeVar("T")
_REST_SECONDS = 30.0  # how long a mirror that failed is asked last
_LACK_SECONDS = 300.0  # how long a mirror that lacks a blob is asked last for it, and a registry not for its API
_MAX_MANIFESTS = 64
_MAX_PAGES = 100


class Registry:
    """One repository of a registry. Thread-safe; `read_range` keeps as many connections as threads use it."""

    def __init__(
        self,
        host: str,
        repository: str,
        config: RegistryConfig,
        transport: Transport | None = None,
        keychain: Keychain | None = None,
        known: KnownHosts | None = None,
    ) -> None:
        """`transport` and `known` may be shared by repositories."""
        known = known or KnownHosts()
        self.host = host
        self.repository = repository
        self._transport = transport or PooledTransport(config)
        self._owns_transport = transport is None
        keychain = keychain or Keychain.default(config.auth_file)
        mirrors = [
            _mirror(text, repository, config, self._transport, keychain, known) for text in config.host(host).mirrors
        ]
        self._upstream = Endpoint(host, repository, config, self._transport, keychain, known=known)
        self._endpoints = [*mirrors, self._upstream]
        self._resting: dict[int, float] = {}  # endpoint's place: until when
        self._lacking: OrderedDict[tuple[int, Digest], float] = OrderedDict()
        self._manifests: OrderedDict[Digest, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._answered = threading.local()  # .place: of the endpoint that answered this thread last

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}"

    # ImageSource

    def resolve(self, reference: str) -> Descriptor:
        """A tag's or digest's descriptor; fetches the manifest and checks it against a digest."""
        wanted = Digest.parse(reference) if reference.startswith("sha256:") else None
        known = self._manifests.get(wanted) if wanted is not None else None
        if known is not None:
            return describe_manifest(known, f"{self}@{reference}")
        return self._fetch_manifest(reference, wanted)[0]

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest's or index's bytes, verified."""
        known = self._manifests.get(descriptor.digest)
        return known if known is not None else self._fetch_manifest(str(descriptor.digest), descriptor.digest)[1]

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob's bytes, whole and verified."""
        if descriptor.data is not None:  # held against the digest where the descriptor was read
            return descriptor.data
        if descriptor.size == 0:
            descriptor.digest.verify(b"", f"{self}@{descriptor.digest}")
            return b""
        if descriptor.size > SMALL_BLOB_LIMIT:
            raise RegistryError(f"{self}@{descriptor.digest}: {descriptor.size} bytes are too many to read whole")
        with self.open_blob(descriptor) as stream:
            data = read_exactly(stream, descriptor.size, f"{self}@{descriptor.digest}")
            stream.read(1)  # reaches the end, where the stream checks
            return data

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A verified stream of a large blob; goes on where it was when the connection breaks."""
        digest = descriptor.digest

        def open_at(position: int) -> HttpResponse:
            return self._read(lambda endpoint: endpoint.open_blob(digest, position), digest)

        return verified_stream(patiently(lambda: open_at(0)), digest, descriptor.size, f"{self}@{digest}", open_at)

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a blob at `offset`, unverified."""
        if length <= 0 or offset < 0:
            raise ValueError(f"range {offset}+{length}")
        return self._read(lambda endpoint: endpoint.blob_range(digest, offset, length), digest)

    def open_range(self, digest: Digest, offset: int, length: int) -> Readable:
        """The same bytes as a stream, for who reads them piece by piece; `broke` if it does not give them all."""
        return self._read(lambda endpoint: endpoint.open_range(digest, offset, length), digest)

    def again(self, response: Readable, digest: Digest) -> Again | None:
        """The way to more ranges of a blob, after one has been answered; None if it was no ordinary one."""
        if not isinstance(response, RangeResponse) or response.status != 206:
            return None
        return Again(response, f"{self}@{digest}", getattr(self._answered, "place", None))

    def answers(self, again: Again) -> None:
        """It is this thread's answer: what follows, `broke` or `distrust`, is said of its endpoint."""
        self._answered.place = again.place

    def broke(self) -> None:
        """The stream that this thread opened last broke off: another endpoint is asked for a while."""
        place = getattr(self._answered, "place", None)
        if place is not None:
            self._resting[place] = time.monotonic() + _REST_SECONDS

    def distrust(self, digest: Digest) -> None:
        """What this thread read of this blob last was wrong: that endpoint is asked for it last from now on."""
        place = getattr(self._answered, "place", None)
        if place is not None:
            self._endpoints[place].forget_location(digest)
            self._lack(place, digest)

    @property
    def places(self) -> int:
        """How many servers may be asked for a blob."""
        return len(self._endpoints)

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """By the referrers API, else by the fallback tag. The exact type only."""
        found = patiently(lambda: self._read(lambda endpoint: _referrers_at(endpoint, subject, artifact_type)))
        return [entry for entry in found if entry.artifact_type == artifact_type]

    def close(self) -> None:
        """Give back the connections, if they are its own."""
        if self._owns_transport:
            self._transport.close()

    # ImageTarget: always the registry itself, never a mirror

    def tagged(self, tag: str) -> tuple[Descriptor, bytes] | None:
        """The manifest that a tag names in the registry."""
        try:
            return patiently(lambda: self._manifest_at(self._upstream, tag, None))
        except NotFoundError:
            return None

    def has_blob(self, digest: Digest) -> bool:
        """Whether the registry has a blob."""
        return upload.has_blob(self._upstream, digest)

    def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """Link a blob from another repository of the same registry; False if that did not go."""
        return upload.mount_blob(self._upstream, digest, from_repository)

    def put_blob(self, descriptor: Descriptor, chunks: Iterator[bytes]) -> None:
        """Upload a blob."""
        upload.put_blob(self._upstream, descriptor, chunks)

    def put_manifest(self, media_type: str, data: bytes, tag: str | None) -> Descriptor:
        """Store a manifest; one with a `subject` becomes findable as a referrer."""
        descriptor = describe_manifest(data, f"{self}: manifest", media_type)
        upload.put_manifest(self._upstream, descriptor, data, tag)
        return descriptor

    # Endpoints

    def _read(self, call: Callable[[Endpoint], T], digest: Digest | None = None) -> T:
        """Ask the endpoints one after the other until one answers; else the error that matters most."""
        errors: dict[int, LoaderError | IntegrityError] = {}
        for place in self._order(digest):
            try:
                result = call(self._endpoints[place])
                self._answered.place = place
                return result
            except (NotFoundError, IntegrityError) as error:
                errors[place] = error
                if digest is not None:
                    self._lack(place, digest)
            except RegistryError as error:
                errors[place] = error
                self._resting[place] = time.monotonic() + _REST_SECONDS
        last = errors[len(self._endpoints) - 1]
        if not isinstance(last, NotFoundError):
            last = next((error for error in errors.values() if isinstance(error, TransientRegistryError)), last)
        raise last

    def _order(self, digest: Digest | None) -> list[int]:
        places = list(range(len(self._endpoints)))
        if len(places) == 1:
            return places
        now = time.monotonic()
        lacking = self._lacking

        def rank(place: int) -> bool:
            resting = self._resting.get(place, 0.0) > now
            return resting or (digest is not None and lacking.get((place, digest), 0.0) > now)

        return sorted(places, key=rank)

    def _lack(self, place: int, digest: Digest) -> None:
        with self._lock:
            self._lacking[place, digest] = time.monotonic() + _LACK_SECONDS
            while len(self._lacking) > 4096:
                self._lacking.popitem(last=False)

    def _fetch_manifest(self, reference: str, wanted: Digest | None) -> tuple[Descriptor, bytes]:
        return patiently(lambda: self._read(lambda endpoint: self._manifest_at(endpoint, reference, wanted), wanted))

    def _manifest_at(self, endpoint: Endpoint, reference: str, wanted: Digest | None) -> tuple[Descriptor, bytes]:
        what = f"{endpoint}{'@' if wanted else ':'}{reference}"
        response = endpoint.send("GET", f"manifests/{reference}", {"Accept": ACCEPT})
        if response.status != 200:
            raise error_of(response, what, None if wanted else "check the name and the tag")
        try:
            data = _read_document(response, what)
        finally:
            response.close()
        if wanted is not None:
            wanted.verify(data, what)
        descriptor = describe_manifest(data, what, response.headers.get("Content-Type", ""))
        with self._lock:
            self._manifests[descriptor.digest] = data
            while len(self._manifests) > _MAX_MANIFESTS:
                self._manifests.popitem(last=False)
        return descriptor, data


def _read_document(response: HttpResponse, what: str) -> bytes:
    parts, size = [], 0
    while data := response.read(65536):
        parts.append(data)
        size += len(data)
        if size > MANIFEST_LIMIT:
            raise RegistryError(f"{what}: larger than {MANIFEST_LIMIT} bytes")
    return b"".join(parts)


def _referrers_at(endpoint: Endpoint, subject: Digest, artifact_type: str) -> list[Descriptor]:
    if endpoint.lacks_referrers:
        return _fallback_referrers(endpoint, subject)
    path = f"referrers/{subject}?{urlencode([('artifactType', artifact_type)])}"
    found: list[Descriptor] = []
    for _ in range(_MAX_PAGES):
        response = endpoint.send("GET", path, {"Accept": INDEX_TYPE})
        if response.status in (400, 404, 405, 501) and not found:
            response.close()
            endpoint.note_lack_of_referrers(_LACK_SECONDS)
            return _fallback_referrers(endpoint, subject)
        if response.status != 200:
            raise error_of(response, f"{endpoint}: referrers of {subject}")
        try:
            data = _read_document(response, f"{endpoint}: referrers of {subject}")
        finally:
            response.close()
        found += index_entries(data, f"{endpoint}: referrers of {subject}")
        following = _next_page(response.headers.get("Link", ""))
        if not following:
            return found
        path = endpoint.absolute(path, following)
    raise RegistryError(f"{endpoint}: the list of referrers of {subject} does not end")


def _fallback_referrers(endpoint: Endpoint, subject: Digest) -> list[Descriptor]:
    tag = fallback_tag(subject)
    response = endpoint.send("GET", f"manifests/{tag}", {"Accept": INDEX_TYPE})
    if response.status == 404:
        response.close()
        return []
    if response.status != 200:
        raise error_of(response, f"{endpoint}:{tag}")
    try:
        return index_entries(_read_document(response, f"{endpoint}:{tag}"), f"{endpoint}:{tag}")
    finally:
        response.close()


def _next_page(link: str) -> str:
    target, _, parameters = link.partition(";")
    if 'rel="next"' not in parameters and "rel=next" not in parameters:
        return ""
    return target.strip().removeprefix("<").removesuffix(">")


def _mirror(
    text: str, repository: str, config: RegistryConfig, transport: Transport, keychain: Keychain, known: KnownHosts
) -> Endpoint:
    """A mirror of the configuration: `[http[s]://]HOST[:PORT][/PREFIX]`; the scheme given is the one used."""
    parts = urlsplit(text if "://" in text else f"//{text}")
    if parts.scheme not in ("", "http", "https") or not parts.netloc:
        raise UsageError(f"configuration: mirror {text!r} is not a URL")
    prefix = parts.path.rstrip("/").removesuffix("/v2")
    return Endpoint(parts.netloc, repository, config, transport, keychain, parts.scheme or None, prefix, known)
