"""Images in tar files: `oci-archive:` (an OCI layout in a tar) and `docker-archive:` (what `docker save` writes).

A tar is read in place: members are looked up once, then read at their offsets. Only an archive that is compressed as a
whole is unpacked first, into an unnamed temporary file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, IntegrityError, TarError
from loader.artifact import descriptor_to_json
from loader.errors import LoaderError, NotFoundError, TransientRegistryError, UsageError
from loader.registry import tarscan
from loader.registry.base import Descriptor
from loader.registry.documents import DOCKER_MANIFEST_TYPE, MANIFEST_LIMIT, describe_manifest, index_entries
from loader.registry.layout import pread_whole, resolve_in_index
from loader.registry.streams import CHUNK, verified_stream

_MAX_MEMBERS = 100_000
_LINK_HOPS = 8
_LAYER_TYPES = (
    (b"\x1f\x8b", "application/vnd.docker.image.rootfs.diff.tar.gzip"),
    (b"\x28\xb5\x2f\xfd", "application/vnd.oci.image.layer.v1.tar+zstd"),
)
_PLAIN_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"


class _Member(NamedTuple):
    offset: int
    size: int


class TarFile:
    """The regular files of a tar, by name, symbolic and hard links followed. Thread-safe once made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = _open_plain(path)
        except OSError as error:
            raise NotFoundError(f"{path}: {error.strerror or error}") from None
        try:
            self._members = self._scan()
        except BaseException:
            os.close(self._handle)
            raise

    def _scan(self) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        links: dict[str, str] = {}
        try:
            for count, found in enumerate(tarscan.scan(partial(pread_whole, self._handle))):
                if count >= _MAX_MEMBERS:
                    raise ArtifactError(f"{self.path}: more than {_MAX_MEMBERS} members")
                name = posixpath.normpath(os.fsdecode(found.name)).lstrip("/")
                link = os.fsdecode(found.link)
                if found.kind == tarscan.REGULAR:
                    members[name] = _Member(found.offset, found.size)
                elif found.kind == tarscan.SYMLINK:
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
                elif found.kind == tarscan.HARD_LINK:
                    links[name] = posixpath.normpath(link)
        except TarError as error:
            raise ArtifactError(f"{self.path}: not a tar archive ({error})") from None
        except OSError as error:
            raise LoaderError(f"{self.path}: {error.strerror}") from None
        for name in links:
            target = name
            for _ in range(_LINK_HOPS):
                target = links.get(target, target)
            if target in members:
                members[name] = members[target]
        return members

    def __contains__(self, name: str) -> bool:
        return posixpath.normpath(name) in self._members

    def size(self, name: str) -> int:
        """A member's bytes."""
        return self._member(name).size

    def read(self, name: str, limit: int = MANIFEST_LIMIT) -> bytes:
        """A small member, whole."""
        member = self._member(name)
        if member.size > limit:
            raise ArtifactError(f"{self.path}: {name} is larger than {limit} bytes")
        return self.read_range(name, 0, member.size)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a member."""
        member = self._member(name)
        length_there = max(0, min(length, member.size - offset))
        data = pread_whole(self._handle, length_there, member.offset + offset)
        if len(data) != length:
            raise TransientRegistryError(f"{self.path}: {name}: {len(data)} of {length} bytes at {offset}")
        return data

    def open(self, name: str) -> MemberStream:
        """A member as a stream."""
        return MemberStream(self, name)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _member(self, name: str) -> _Member:
        try:
            return self._members[posixpath.normpath(name)]
        except KeyError:
            raise NotFoundError(f"{self.path}: holds no {name}", "the archive may be incomplete") from None


class MemberStream:
    """Reads a member from its start to its end."""

    def __init__(self, archive: TarFile, name: str) -> None:
        self._archive, self._name = archive, name
        self._position, self._size = 0, archive.size(name)

    def read(self, amount: int, /) -> bytes:
        data = self._archive.read_range(self._name, self._position, min(amount, self._size - self._position))
        self._position += len(data)
        return data

    def close(self) -> None:
        """Nothing to give back."""


class _ArchiveSource:
    """What both kinds share: blobs by digest are members of the tar."""

    def __init__(self, path: Path, scheme: str) -> None:
        self._tar = TarFile(path)
        self._label = f"{scheme}:{path}"

    def __str__(self) -> str:
        return self._label

    def _name_of(self, digest: Digest) -> str:
        return f"blobs/sha256/{digest.hex}"

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest's bytes, verified."""
        return self.blob(descriptor)

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob, whole and verified."""
        name = self._name_of(descriptor.digest)
        size = self._tar.size(name)
        if size != descriptor.size:
            raise IntegrityError(f"{self}: {name} has {size} bytes, its descriptor says {descriptor.size}")
        data = self._tar.read_range(name, 0, size)
        descriptor.digest.verify(data, f"{self}: {name}")
        return data

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A verified stream of a blob."""
        name = self._name_of(descriptor.digest)
        return verified_stream(self._tar.open(name), descriptor.digest, descriptor.size, f"{self}: {name}")

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a blob, unverified."""
        return self._tar.read_range(self._name_of(digest), offset, length)

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """None: archives hold the image only."""
        return []

    def close(self) -> None:
        """Give back the file."""
        self._tar.close()


class OciArchive(_ArchiveSource):
    """An `oci-archive:` file as ImageSource."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "oci-archive")

    def resolve(self, reference: str) -> Descriptor:
        """A tag's or digest's descriptor; an empty reference is the only image."""
        entries = index_entries(self._tar.read("index.json"), f"{self}: index.json")
        return resolve_in_index(entries, reference, str(self), self._by_digest)

    def _by_digest(self, digest: Digest) -> Descriptor:
        data = self._tar.read(self._name_of(digest))
        digest.verify(data, f"{self}@{digest}")
        return describe_manifest(data, f"{self}@{digest}")


class DockerArchive(_ArchiveSource):
    """A `docker-archive:` file as ImageSource.

    It has no manifest with a digest of its own: one is put together from the config and the layers, for our use only.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "docker-archive")
        self._names: dict[Digest, str] = {}
        self._manifests: dict[Digest, bytes] = {}

    def resolve(self, reference: str) -> Descriptor:
        """The image with this repository tag (empty: the only image)."""
        if reference.startswith("sha256:") and Digest.parse(reference) in self._manifests:
            return describe_manifest(self._manifests[Digest.parse(reference)], str(self))
        entry = self._select(reference)
        try:
            config_name, layers = str(entry["Config"]), [str(name) for name in _listed(entry["Layers"])]
        except (KeyError, TypeError):
            raise ArtifactError(f"{self}: manifest.json lacks Config or Layers") from None
        config = self._tar.read(config_name)
        digest = Digest.of(config)
        self._names[digest] = config_name
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST_TYPE,
            "config": descriptor_to_json(Descriptor(_CONFIG_TYPE, digest, len(config))),
            "layers": [
                descriptor_to_json(self._layer(name, known))
                for name, known in zip(layers, self._diff_ids(config, len(layers)), strict=True)
            ],
        }
        data = json.dumps(document, indent=1).encode()
        described = describe_manifest(data, str(self))
        self._manifests[described.digest] = data
        return described

    def manifest(self, descriptor: Descriptor) -> bytes:
        """The manifest that `resolve` put together."""
        try:
            return self._manifests[descriptor.digest]
        except KeyError:
            raise NotFoundError(f"{self}@{descriptor.digest}: not in this archive") from None

    def _name_of(self, digest: Digest) -> str:
        return self._names.get(digest) or super()._name_of(digest)

    def _select(self, reference: str) -> dict[str, Any]:
        try:
            entries = json.loads(self._tar.read("manifest.json"))
        except (ValueError, RecursionError):
            raise ArtifactError(f"{self}: manifest.json is not JSON") from None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ArtifactError(f"{self}: manifest.json is not a list")
        tags = {str(tag): entry for entry in entries for tag in _listed(entry.get("RepoTags"))}
        if reference:
            names = (reference, f"{reference}:latest", f"docker.io/library/{reference}")
            found: dict[str, Any] | None = next((tags[name] for name in names if name in tags), None)
            if found is None:
                raise NotFoundError(f"{self}:{reference}: no such image", f"there are: {', '.join(sorted(tags))}")
            return found
        if len(entries) != 1:
            raise UsageError(f"{self}: holds {len(entries)} images", f"name one of: {', '.join(sorted(tags))}")
        return cast("dict[str, Any]", entries[0])

    def _diff_ids(self, config: bytes, count: int) -> list[Digest]:
        try:
            texts = json.loads(config)["rootfs"]["diff_ids"]
            digests = [Digest.parse(text) for text in texts]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ArtifactError(f"{self}: the config has no diff_ids") from None
        if len(digests) != count:
            raise ArtifactError(f"{self}: {count} layers, but {len(digests)} diff_ids")
        return digests

    def _layer(self, name: str, diff_id: Digest) -> Descriptor:
        """A layer's descriptor. A plain tar's digest is its diff_id; a compressed one must be hashed."""
        size = self._tar.size(name)
        head = self._tar.read_range(name, 0, min(4, size))
        media_type = next((kind for magic, kind in _LAYER_TYPES if head.startswith(magic)), None)
        digest = diff_id if media_type is None else self._hash(name)
        self._names[digest] = name
        return Descriptor(media_type or _PLAIN_LAYER, digest, size)

    def _hash(self, name: str) -> Digest:
        checksum, stream = hashlib.sha256(), self._tar.open(name)
        while data := stream.read(CHUNK):
            checksum.update(data)
        return Digest(checksum.digest())


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _open_plain(path: Path) -> int:
    """A descriptor of the plain tar: the file itself, or an unnamed temporary one with its decompressed bytes."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    head = os.pread(handle, 4, 0)
    if not any(head.startswith(magic) for magic, _ in _LAYER_TYPES):
        return handle
    try:
        with os.fdopen(handle, "rb") as packed, tempfile.TemporaryFile(dir=os.environ.get("TMPDIR")) as plain:
            opener = gzip.open if head.startswith(b"\x1f\x8b") else zstandard.open
            with opener(packed, "rb") as reader:
                shutil.copyfileobj(reader, plain, CHUNK)
            plain.flush()
            return os.dup(plain.fileno())
    except (gzip.BadGzipFile, EOFError, zstandard.ZstdError) as error:
        raise ArtifactError(f"{path}: cannot decompress the archive ({error})") from None
    except OSError as error:
        raise LoaderError(
            f"{path}: cannot unpack the archive: {error.strerror}", "set TMPDIR to a larger disk"
        ) from None
