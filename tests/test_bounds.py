"""Paths that must not lead out: of the worker's calls, and of what images, registries and names say."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.layout import Layout
from loader.keeper.bounds import check_mount, open_below
from tests.support.keeper_rig import Daemon, make_image

DIGEST = "a" * 64


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "blobs/encoded").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "images/payload").touch()
    (root / "blobs/encoded/data").touch()
    (root / "keeper.json").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    (root / "blobs/link").symlink_to(tmp_path / "outside")
    (root / "blobs/filelink").symlink_to(tmp_path / "outside/file")
    os.mkfifo(root / "blobs/fifo")
    return root


def test_a_file_below(root: Path) -> None:
    os.close(open_below(root / "blobs", f"{root}/blobs/encoded/data", os.O_RDWR))


@pytest.mark.parametrize(
    "path",
    [
        "{root}/keeper.json",
        "{root}/blobs",
        "{root}/blobs/../keeper.json",
        "{root}/blobs/encoded/../../keeper.json",
        "{root}/blobs/link/file",
        "{root}/blobs/filelink",
        "{root}/blobs/encoded",
        "{root}/blobs/fifo",
        "{root}/blobs/missing",
        "/etc/passwd",
        "blobs/encoded/data",
        "",
    ],
)
def test_no_other_file(root: Path, path: str) -> None:
    with pytest.raises(OSError) as caught:
        open_below(root / "blobs", path.format(root=root), os.O_RDWR)
    assert caught.value.errno in (errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)


def test_mounts_read_only_what_is_the_caches(root: Path) -> None:
    payload, data = f"{root}/images/payload", f"{root}/blobs/encoded/data"
    check_mount(root, payload, [data], ["cache_strategy=disabled"], [data])
    check_mount(root, "none", [], [], [])
    for source, devices, options in (
        ("/dev/sda", [data], []),
        (data, [data], []),
        (payload, ["/dev/sda"], []),
        (payload, [data], ["device=/dev/sda"]),
        (payload, [data], ["fsoffset=4096"]),
        (payload, [data], ["source=/dev/sda"]),
    ):
        with pytest.raises(OSError) as caught:
            check_mount(root, source, devices, options, [data])
        assert caught.value.errno == errno.EPERM


@pytest.mark.root
class TestKeeper:
    """The same through a running keeper, as a worker asks."""

    @pytest.fixture
    def daemon(self, tmp_path: Path) -> Iterator[Daemon]:
        made = Daemon(tmp_path)
        made.start()
        yield made
        made.close()

    def test_no_descriptor_of_a_foreign_file(self, daemon: Daemon, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(bytes(4096))
        for path in (str(victim), f"{daemon.root}/blobs/../../victim", f"{daemon.root}/keeper.json", "/etc/passwd"):
            answer = daemon.call("create", name="x", path=path, form="encoded", size=4096)
            assert answer["errno"] == errno.EPERM, answer

    def test_no_mount_of_a_foreign_file(self, daemon: Daemon, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image", Form.ENCODED)
        (tmp_path / "mnt").mkdir()
        for body in ({"source": str(image.metadata)}, {"source": "none", "options": ["device=/etc/passwd"]}):
            answer = daemon.call("mount", **{"target": str(tmp_path / "mnt"), "objects": [], **body})
            assert answer["errno"] == errno.EPERM, answer
        assert daemon.call("status")["mounts"] == []


@pytest.mark.parametrize(
    "text", [f"sha256:../../{DIGEST}", f"sha256:{DIGEST}/../x", "sha256:..", f"sha256:{DIGEST[:-1]}/", f"../{DIGEST}"]
)
def test_a_digest_is_never_a_path(text: str) -> None:
    with pytest.raises(Exception, match="digest"):
        Digest.parse(text)


def test_cache_paths_stay_in_the_cache(tmp_path: Path) -> None:
    layout, digest = Layout(tmp_path), Digest.parse(f"sha256:{DIGEST}")
    for form in Form:
        for path in (layout.payload(digest, form), layout.data(digest, form), layout.blob(digest, form)):
            assert path.resolve().is_relative_to(tmp_path)
