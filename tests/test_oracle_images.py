"""Whole images, converted and mounted by the kernel in both forms, equal what other programs unpack."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from bench.node import Node
from erofs_builder.erofs.reader import Reader
from erofs_builder.hints import find_hints
from erofs_builder.hints_codec import decode_hints
from erofs_builder.payload import Form, decode_payload
from loader.registry.config import RegistryConfig
from loader.registry.find import find_artifact
from loader.registry.open import open_image
from tests.format_reader import parse_payload
from tests.images import catalog
from tests.images.adversarial import mend_umoci
from tests.support import erofs_utils, oracles
from tests.support.oracles import assert_same, ignoring_mtimes

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES = ["debian", "small", "adversarial", "layers127"]
FORMS = ["encoded", "decoded"]


class Converted(NamedTuple):
    """A test image: unpacked by umoci, and its artifact."""

    name: str
    tree: Path
    reference: str
    options: list[str]  # of the comparison
    scratch: Path

    def flat(self, form: str) -> Path:
        """The artifact as one flat EROFS file, exported once."""
        file = self.scratch / f"{form}.erofs"
        if not file.exists():
            oracles.run(oracles.BUILDER, "export", self.reference, file, "--form", form)
        return file


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    name = request.param
    scratch = tmp_path_factory.mktemp(name)
    with contextlib.ExitStack() as stack:
        place = scratch / "umoci"
        if name == "debian":
            place.mkdir()
        else:
            stack.enter_context(oracles.tmpfs(place))
        tree = oracles.umoci_unpack(name, place)
        if name == "adversarial":
            mend_umoci(tree)
        reference = oracles.convert(name, scratch / "artifact")
        yield Converted(name, tree, reference, ignoring_mtimes(oracles.undefined_mtimes(name)), scratch)


@pytest.mark.parametrize("form", FORMS)
def test_lazily_served_tree_equals_umoci_unpack(image: Converted, form: str, tmp_path: Path) -> None:
    with Node(tmp_path / "node", "--plane", "fanotify", "--form", form) as node:
        node.mount(image.reference, tmp_path / "mnt")
        try:
            assert_same(image.tree, tmp_path / "mnt", *image.options)
        finally:
            node.umount(tmp_path / "mnt")


@pytest.mark.parametrize("form", FORMS)
def test_flat_export_equals_umoci_unpack(image: Converted, form: str, tmp_path: Path) -> None:
    with oracles.mounted(image.flat(form), tmp_path / "mnt"):
        assert_same(image.tree, tmp_path / "mnt", *image.options)


@pytest.mark.parametrize("form", FORMS)
def test_fsck_extracts_the_same_bytes(image: Converted, form: str, tmp_path: Path) -> None:
    with oracles.tmpfs(tmp_path / "tmpfs"):
        target = tmp_path / "tmpfs" / "extracted"
        erofs_utils.run("fsck.erofs", f"--extract={target}", "--preserve", "--xattrs", image.flat(form))
        _mend_fsck(image.tree, target)
        # fsck.erofs stops at an empty user xattr, and sets the owner last, at which the kernel drops capabilities.
        assert_same(image.tree, target, "--only-xattrs=trusted.,system.", "--ignore-mtime=.", *image.options)


def _mend_fsck(expected: Path, extracted: Path) -> None:
    """Give extracted files the holes at their end: fsck.erofs 1.9 seeks over them and leaves the file short."""
    for path in extracted.rglob("sparse*"):
        for file in [path] if path.is_file() else path.iterdir():
            size, status = (expected / file.relative_to(extracted)).lstat().st_size, file.stat()
            if status.st_size < size:
                os.truncate(file, size)
                os.utime(file, ns=(0, status.st_mtime_ns))


def test_mkfs_of_the_unpacked_tree_reads_the_same(image: Converted, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.erofs"
    erofs_utils.run("mkfs.erofs", "-x1", "--quiet", theirs, image.tree)
    with oracles.mounted(image.flat("encoded"), tmp_path / "a"), oracles.mounted(theirs, tmp_path / "b"):
        assert_same(tmp_path / "b", tmp_path / "a", *image.options)


@pytest.mark.parametrize("form", FORMS)
def test_the_payload_has_the_hints_that_its_tree_gives(image: Converted, form: str) -> None:
    source = open_image(image.reference, RegistryConfig())[0]
    with contextlib.closing(source):
        described = find_artifact(source, "latest")[1].metadata[Form(form)]
        data = zstandard.ZstdDecompressor().decompress(source.blob(described))
    payload = decode_payload(data)
    tree = Reader(payload.erofs, payload.tables, payload.form).read_tree()
    assert decode_hints(payload.hints, payload.tables) == find_hints(tree, payload.tables)
    assert len(parse_payload(data).hints) == len(payload.tables)


def test_check_accepts_the_artifact(image: Converted) -> None:
    oracles.run(oracles.BUILDER, "check", image.reference)


def test_attributes_equal_buildahs(tmp_path: Path) -> None:
    reference = oracles.convert("adversarial", tmp_path / "artifact", "xattrs")
    flat = tmp_path / "flat.erofs"
    oracles.run(oracles.BUILDER, "export", reference, flat, "--form", "encoded")
    layout = catalog.image("adversarial") / "oracle"
    with oracles.mounted(flat, tmp_path / "mnt"), oracles.buildah_mount(layout, "xattrs", tmp_path / "buildah") as tree:
        # containers/storage restores user.* and security.capability, nothing else, and drops empty values.
        known = "user.binary,user.bsd,user.equals,user.long,user.on-directory,security."
        assert_same(tree, tmp_path / "mnt", f"--only-xattrs={known}", "--ignore-root")
