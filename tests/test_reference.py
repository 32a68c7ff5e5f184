"""References: what people type, and what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from loader.errors import UsageError
from loader.registry.reference import (
    DockerArchiveReference,
    LayoutReference,
    RegistryReference,
    RootfsReference,
    parse_reference,
)

HEX = "ab" * 32
DIGEST = Digest(bytes.fromhex(HEX))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", RegistryReference("docker.io", "library/debian", "latest")),
        ("docker://debian:12", RegistryReference("docker.io", "library/debian", "12")),
        ("index.docker.io/me/app", RegistryReference("docker.io", "me/app", "latest")),
        ("me/app:v1", RegistryReference("docker.io", "me/app", "v1")),
        ("localhost/app", RegistryReference("localhost", "app", "latest")),
        ("localhost:5000/a/b:c", RegistryReference("localhost:5000", "a/b", "c")),
        ("[::1]:5000/a", RegistryReference("[::1]:5000", "a", "latest")),
        (f"quay.io/a/b@sha256:{HEX}", RegistryReference("quay.io", "a/b", None, DIGEST)),
        (f"docker://quay.io/a/b:t@sha256:{HEX}", RegistryReference("quay.io", "a/b", "t", DIGEST)),
        ("oci:dir", LayoutReference("oci", Path("dir"))),
        ("oci:/a/dir:docker.io/x:latest", LayoutReference("oci", Path("/a/dir"), "docker.io/x:latest")),
        (f"oci:dir@sha256:{HEX}", LayoutReference("oci", Path("dir"), None, DIGEST)),
        ("oci-archive:x.tar:tag", LayoutReference("oci-archive", Path("x.tar"), "tag")),
        ("docker-archive:x.tar:debian:12", DockerArchiveReference(Path("x.tar"), "debian:12")),
        ("rootfs:/srv/root", RootfsReference(Path("/srv/root"))),
    ],
)
def test_parses(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "docker://",
        "UPPER/case",
        "host.example/",
        "host.example/a:b:c",
        "a b",
        "a@sha256:12",
        "a@md5:ffff",
        "-bad.example/a",
        "host.example:port/a",
        "ftp://host/a",
        "oci:",
        "oci:dir@sha256:zz",
        "docker-archive:",
        "rootfs:",
        "a:" + "t" * 129,
        "a" * 256,
        "a/../b",
        "a:\x00",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@pytest.mark.parametrize("text", ["docker-daemon:nginx", "containers-storage:x", "dir:/etc", "ostree:", "ftp://h/a"])
def test_schemes_of_others_are_no_repositories(text: str) -> None:
    with pytest.raises(UsageError, match="unknown scheme") as caught:
        parse_reference(text)
    assert caught.value.hint == "use docker://, oci:, oci-archive:, docker-archive: or rootfs:"


@pytest.mark.parametrize("text", ["docker:dind", "docker://dir:1", "h.example/dir:1", "dir", "rootfs"])
def test_repositories_may_have_such_names(text: str) -> None:
    assert isinstance(parse_reference(text), RegistryReference)


@pytest.mark.parametrize("text", ["/srv/layout", "./layout:tag", "../layout", "."])
def test_a_path_needs_its_scheme(text: str) -> None:
    with pytest.raises(UsageError, match="a path alone") as caught:
        parse_reference(text)
    assert caught.value.hint is not None and "a layout is oci:DIR" in caught.value.hint


def test_name_and_text() -> None:
    by_both = parse_reference(f"host.example/a:t@sha256:{HEX}")
    assert isinstance(by_both, RegistryReference)
    assert by_both.name == f"sha256:{HEX}"
    assert str(by_both) == f"docker://host.example/a:t@sha256:{HEX}"
    for text in ("docker://host.example/a:t", "oci:dir:t", "rootfs:/x", "docker-archive:x:y"):
        assert str(parse_reference(text)) == text
