"""Uploads to a registry: blobs (monolithic, in chunks, or mounted from another repository) and manifests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import urlencode

from erofs_builder.digest import Digest
from loader.artifact import INDEX_TYPE
from loader.errors import NotFoundError, TransientRegistryError
from loader.registry.auth import repository_scope
from loader.registry.base import Descriptor
from loader.registry.documents import MANIFEST_LIMIT, add_referrer, as_referrer, fallback_tag, subject_of
from loader.registry.endpoint import Endpoint
from loader.registry.status import error_of

_PUSH = "pull,push"
_UPLOADS = "blobs/uploads/"
_OCTETS = "application/octet-stream"
_TAG_ATTEMPTS = 4


def has_blob(endpoint: Endpoint, digest: Digest) -> bool:
    """HEAD of a blob."""
    response = endpoint.send("HEAD", f"blobs/{digest}")
    response.close()
    if response.status == 200:
        return True
    if response.status == 404:
        return False
    raise error_of(response, f"{endpoint}@{digest}")


def mount_blob(endpoint: Endpoint, digest: Digest, from_repository: str) -> bool:
    """Link a blob of another repository of the same registry; False if the registry did not."""
    query = urlencode([("mount", str(digest)), ("from", from_repository)])
    scopes = (repository_scope(from_repository, "pull"),)
    response = endpoint.send("POST", f"{_UPLOADS}?{query}", {"Content-Length": "0"}, b"", _PUSH, scopes)
    response.close()
    if response.status == 202:  # an ordinary upload was begun instead; take it back
        location = endpoint.absolute(_UPLOADS, response.headers.get("Location", ""))
        endpoint.send("DELETE", location, None, None, _PUSH).close()
    return response.status == 201


def put_blob(endpoint: Endpoint, descriptor: Descriptor, chunks: Iterable[bytes]) -> None:
    """Upload a blob; the registry checks the digest. The whole in one request, or in chunks where configured."""
    what = f"{endpoint}: upload of {descriptor.digest}"
    response = endpoint.send("POST", _UPLOADS, {"Content-Length": "0"}, b"", _PUSH)
    if response.status not in (201, 202):
        raise error_of(response, what)
    location = endpoint.absolute(_UPLOADS, response.headers.get("Location", ""))
    response.close()
    chunk = endpoint.settings.upload_chunk
    body: Iterator[bytes] | bytes = iter(chunks)
    if chunk:
        location = _patch(endpoint, location, regrouped(iter(chunks), chunk), what)
        body = b""
    url = location + ("&" if "?" in location else "?") + urlencode([("digest", str(descriptor.digest))])
    length = 0 if chunk else descriptor.size
    headers = {"Content-Length": str(length), "Content-Type": _OCTETS}
    response = endpoint.send("PUT", url, headers, body, _PUSH)
    if response.status != 201:
        raise error_of(response, what)
    response.close()


def _patch(endpoint: Endpoint, location: str, chunks: Iterator[bytes], what: str) -> str:
    position = 0
    for chunk in chunks:
        headers = {
            "Content-Length": str(len(chunk)),
            "Content-Type": _OCTETS,
            "Content-Range": f"{position}-{position + len(chunk) - 1}",
        }
        response = endpoint.send("PATCH", location, headers, chunk, _PUSH)
        if response.status != 202:
            raise error_of(response, what)
        location = endpoint.absolute(_UPLOADS, response.headers.get("Location", ""))
        response.close()
        position += len(chunk)
    return location


def regrouped(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one shorter."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while len(pending) >= size:
            yield bytes(pending[:size])
            del pending[:size]
    if pending:
        yield bytes(pending)


def put_manifest(endpoint: Endpoint, descriptor: Descriptor, data: bytes, tag: str | None) -> None:
    """Store a manifest under a tag or its digest, and make it findable from its subject."""
    handled = _put(endpoint, descriptor.media_type, data, tag or str(descriptor.digest))
    subject = subject_of(data)
    if subject is not None and not handled:
        _add_to_fallback_tag(endpoint, subject.digest, as_referrer(descriptor, data))


def _put(endpoint: Endpoint, media_type: str, data: bytes, name: str) -> bool:
    """PUT a manifest; True if the registry says that it keeps the list of referrers itself."""
    response = endpoint.send("PUT", f"manifests/{name}", {"Content-Type": media_type}, data, _PUSH)
    if response.status not in (200, 201):
        raise error_of(response, f"{endpoint}: manifest {name}")
    response.close()
    return bool(response.headers.get("OCI-Subject"))


def _add_to_fallback_tag(endpoint: Endpoint, subject: Digest, referrer: Descriptor) -> None:
    """Add to the index under the fallback tag. Registries have no compare-and-swap: look again until it stayed."""
    tag = fallback_tag(subject)
    for _ in range(_TAG_ATTEMPTS):
        index = add_referrer(_get_tag(endpoint, tag), referrer)
        if index is None:
            return
        _put(endpoint, INDEX_TYPE, index, tag)
    if add_referrer(_get_tag(endpoint, tag), referrer) is not None:
        raise TransientRegistryError(f"{endpoint}:{tag}: others keep changing the list of referrers")


def _get_tag(endpoint: Endpoint, tag: str) -> bytes | None:
    response = endpoint.send("GET", f"manifests/{tag}", {"Accept": INDEX_TYPE}, None, _PUSH)
    if response.status != 200:
        error = error_of(response, f"{endpoint}:{tag}")
        if isinstance(error, NotFoundError):
            return None
        raise error
    try:
        return response.read(MANIFEST_LIMIT)
    finally:
        response.close()
