"""Targets for a registry that answers whatever it likes, and for names of images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from fuzz.layers import sealed_tar
from loader.errors import LoaderError, RegistryError
from loader.registry import patience
from loader.registry.archive import DockerArchive, OciArchive
from loader.registry.auth import parse_challenges
from loader.registry.base import Descriptor
from loader.registry.client import Registry
from loader.registry.config import RegistryConfig
from loader.registry.credentials import Keychain
from loader.registry.documents import index_entries, platform_text, select_platform
from loader.registry.find import find_artifact
from loader.registry.layout import resolve_in_index
from loader.registry.reference import RegistryReference, parse_reference
from loader.registry.status import retry_after
from loader.registry.transport import HttpRequest
from loader.worker.images import canonical, repository, with_digest
from tests.support.http import FakeResponse, FakeTransport

ALLOWED = (FormatError, IntegrityError, LoaderError)
_NAMES = (
    "Content-Range",
    "WWW-Authenticate",
    "Location",
    "Retry-After",
    "Link",
    "Content-Type",
    "Content-Length",
)
_STATUSES = (200, 206, 401, 302, 307, 429, 503, 404, 400, 416, 500, 204)


class _Script:
    """Answers one request after the other from the input: status 1, count 1, headers (name 1, length 1, text), body."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def number(self) -> int:
        return int.from_bytes(self.take(1), "little")

    def answer(self, request: HttpRequest) -> FakeResponse:
        status = _STATUSES[self.number() % len(_STATUSES)]
        headers = {}
        for _ in range(self.number() % 4):
            name = _NAMES[self.number() % len(_NAMES)]
            headers[name] = self.take(self.number()).decode("latin-1")  # as http.client gives them
        return FakeResponse(status, self.take(self.number() * 4), headers)


def registry(data: bytes) -> None:
    """A client whose every request is answered from the input."""
    patience.FIRST_PAUSE = patience._LONGEST_PAUSE = 0.0
    script = _Script(data)
    client = Registry("registry.example", "a/b", RegistryConfig(), FakeTransport(script.answer), Keychain([]))
    digest = Digest.of(b"content")
    descriptor = Descriptor("", digest, 7)
    calls: tuple[Callable[[], object], ...] = (
        lambda: client.read_range(digest, 3, 4),
        lambda: client.resolve("tag"),
        lambda: client.blob(descriptor),
        lambda: client.referrers(digest, "type"),
        lambda: find_artifact(client, "tag", "linux/amd64"),
        lambda: client.has_blob(digest),
        lambda: client.put_blob(descriptor, iter((b"content",))),
        lambda: client.put_manifest("", b"{}", "tag"),
    )
    chosen = script.number()
    for bit, call in enumerate(calls):
        if chosen >> bit & 1:
            try:
                result = call()
            except ALLOWED:
                continue
            if bit == 0:
                assert isinstance(result, bytes) and len(result) == 4
            if bit == 2:
                assert result == b"content"


def headers(data: bytes) -> None:
    """Header values of an answer."""
    text = data.decode("latin-1")
    for challenge in parse_challenges(text):
        assert challenge.scheme in ("bearer", "basic")
    wait = retry_after({"Retry-After": text})
    assert wait is None or 0 <= wait <= 3600


def index(data: bytes) -> None:
    """An image index: choosing a platform and a tag from it."""
    entries = index_entries(data, "fuzz")
    for entry in entries:
        platform_text(entry)
    calls: tuple[Callable[[], object], ...] = (
        lambda: select_platform(entries, "linux/amd64", "fuzz"),
        lambda: resolve_in_index(entries, "", "fuzz"),
        lambda: resolve_in_index(entries, "tag", "fuzz"),
    )
    for call in calls:
        try:
            call()
        except ALLOWED:
            pass


def reference(data: bytes) -> None:
    """The name of an image: what is accepted is the same when it is read again, and never leads out of a path."""
    text = data.decode("utf-8", "surrogateescape")
    found = parse_reference(text)
    if isinstance(found, RegistryReference):
        assert parse_reference(str(found)) == found
        assert ".." not in found.repository.split("/") and not found.repository.startswith("/")
    assert parse_reference(canonical(text))
    try:
        repository(text)
        with_digest(text, Digest(bytes(32)))
    except RegistryError:
        pass


def docker_archive(data: bytes) -> None:
    """An image in a tar file, by both kinds of archive."""
    handle = os.memfd_create("fuzz")
    try:
        os.write(handle, sealed_tar(data))
        for kind in (DockerArchive, OciArchive):
            try:
                source = kind(Path(f"/proc/self/fd/{handle}"))
            except ALLOWED:
                continue
            try:
                described = source.resolve("")
                document = json.loads(source.manifest(described))
                assert isinstance(document, dict)
            except ALLOWED:
                pass
            finally:
                source.close()
    finally:
        os.close(handle)
