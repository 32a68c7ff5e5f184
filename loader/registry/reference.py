"""References: how a person names an image.

    [docker://][HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]   a registry; HOST defaults to docker.io, TAG to latest
    oci:DIR[:NAME][@DIGEST]                              an OCI image layout
    oci-archive:FILE[:NAME]                              a tar of one
    docker-archive:FILE[:NAME]                           what `docker save` writes
    rootfs:DIR                                           a directory tree

DIR and FILE end at the first colon, as skopeo and umoci have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError
from loader.errors import UsageError

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*)(?::[0-9]{1,5})?\Z"
)
_MAX_REPOSITORY = 255
# Of skopeo and podman: taken for Docker Hub's, such a name would only be "not found" there.
_OTHER_SCHEMES = ("atomic", "containers-storage", "dir", "docker-daemon", "ostree", "sif", "tarball")


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """A manifest in a registry's repository. With both tag and digest the digest decides."""

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """What `ImageSource.resolve` takes: the digest, else the tag."""
        return str(self.digest) if self.digest else self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"docker://{self.host}/{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """A manifest in an OCI layout directory (`oci`) or in a tar of one (`oci-archive`); no name: the only image."""

    scheme: str
    path: Path
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """What `ImageSource.resolve` takes; empty for the only image."""
        return str(self.digest) if self.digest else self.tag or ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.scheme}:{self.path}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class DockerArchiveReference:
    """An image in a `docker save` tar; no name: the only one."""

    path: Path
    name: str = ""

    def __str__(self) -> str:
        return f"docker-archive:{self.path}" + (f":{self.name}" if self.name else "")


@dataclass(frozen=True, slots=True)
class RootfsReference:
    """A directory whose tree is the image."""

    path: Path

    def __str__(self) -> str:
        return f"rootfs:{self.path}"


Reference = RegistryReference | LayoutReference | DockerArchiveReference | RootfsReference


def parse_reference(text: str) -> Reference:
    """Parse any reference; UsageError says what is wrong with it."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("oci", "oci-archive"):
        return _layout(scheme, rest, text)
    if colon and scheme == "docker-archive":
        path, _, name = rest.partition(":")
        _require(bool(path), text, "a file name must follow docker-archive:")
        return DockerArchiveReference(Path(path), name)
    if colon and scheme == "rootfs":
        _require(bool(rest), text, "a directory must follow rootfs:")
        return RootfsReference(Path(rest))
    if ("://" in text and scheme != "docker") or (colon and scheme in _OTHER_SCHEMES):
        raise UsageError(
            f"reference {text!r}: unknown scheme {scheme!r}",
            "use docker://, oci:, oci-archive:, docker-archive: or rootfs:",
        )
    if is_path(text):
        raise UsageError(
            f"reference {text!r}: a path alone is no reference",
            "a layout is oci:DIR, a tar of one oci-archive:FILE, a directory tree rootfs:DIR",
        )
    return parse_registry_reference(text)


def is_path(text: str) -> bool:
    """Whether a text is written as a path, which no reference is."""
    return text.startswith(("/", "."))


def parse_registry_reference(text: str) -> RegistryReference:
    """Parse a registry reference, with or without `docker://`."""
    rest, digest = _split_digest(text.removeprefix("docker://"), text)
    head, slash, tail = rest.partition("/")
    if slash and (any(mark in head for mark in ".:[") or head == "localhost"):
        host, path = head, tail
    else:
        host, path = DEFAULT_HOST, rest
    repository, colon, tag = path.partition(":")
    if host in (DEFAULT_HOST, "index.docker.io", "registry-1.docker.io"):
        host = DEFAULT_HOST
        repository = repository if "/" in repository else f"library/{repository}"
    _require(bool(_HOST.match(host)), text, f"{host!r} is not a host name")
    _require(
        bool(_REPOSITORY.match(repository)) and len(repository) <= _MAX_REPOSITORY,
        text,
        f"{repository!r} is not a repository name (lower case letters, digits, . _ - and /)",
    )
    _require(not colon or bool(_TAG.match(tag)), text, f"{tag!r} is not a tag")
    return RegistryReference(host, repository, tag or (None if digest else DEFAULT_TAG), digest)


def _layout(scheme: str, rest: str, text: str) -> LayoutReference:
    rest, digest = _split_digest(rest, text)
    path, _, tag = rest.partition(":")
    _require(bool(path), text, f"a path must follow {scheme}:")
    return LayoutReference(scheme, Path(path), tag or None, digest)


def _split_digest(rest: str, text: str) -> tuple[str, Digest | None]:
    head, at, digest = rest.rpartition("@")
    if not at:
        return rest, None
    try:
        return head, Digest.parse(digest)
    except FormatError as error:
        raise UsageError(f"reference {text!r}: {error}") from None


def _require(condition: bool, text: str, problem: str) -> None:
    if not condition:
        raise UsageError(f"reference {text!r}: {problem}")
