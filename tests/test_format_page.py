"""docs/format.md, tried: a reader written from that page alone shows images as they are, in both forms."""

from __future__ import annotations

import hashlib
import stat
import subprocess
from pathlib import Path

import pytest

from tests.format_data import CHUNKS, FRAGMENT_INODE
from tests.format_reader import (
    BLOB_TYPE,
    DECODED,
    ENCODED,
    FORMS,
    Artifact,
    FormatError,
    Layout,
    check_contents,
    crc32c,
    read_artifact,
)
from tests.format_tree import Entry, Tree
from tests.support import treediff
from tests.support.format_trees import make_directory, make_layers
from tests.support.oracles import BUILDER, run

Opened = tuple[Artifact, dict[int, Tree]]
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
}


def _as_scanned(found: dict[bytes, Entry]) -> dict[bytes, treediff.Entry]:
    """What the reader found, in the terms of a scan of a directory."""
    first: dict[int, bytes] = {}
    scanned = {}
    for path, entry in sorted(found.items()):
        kind = KINDS[stat.S_IFMT(entry.mode)]
        one = treediff.Entry(kind, oct(stat.S_IMODE(entry.mode)), f"{entry.uid}:{entry.gid}", entry.mtime)
        one.xattrs, one.rdev, one.target = entry.xattrs, entry.rdev, entry.target
        if kind != "directory":
            one.links, one.nlink = first.setdefault(entry.nid, path), entry.nlink
        if kind == "file":
            one.size = entry.size
            one.content = entry.content if one.links == path else None
        scanned[path] = one
    return scanned


def _read(layout: Path, tag: str = "latest") -> Opened:
    """An artifact with its trees by form; every rule of the page is checked on the way."""
    opened = Layout(layout)
    artifact = read_artifact(opened, opened.tagged(tag))
    for blob in artifact.blobs:
        blob.check()
    assert artifact.contents is not None
    check_contents(artifact.contents, {blob.table.digest: blob for blob in artifact.blobs})
    assert set(artifact.payloads) == set(FORMS)
    return artifact, {form: Tree(payload, artifact.blobs) for form, payload in artifact.payloads.items()}


def _assert_forms(trees: dict[int, Tree], expected: dict[bytes, treediff.Entry]) -> None:
    for form, tree in trees.items():
        assert (form, treediff.compare(expected, _as_scanned(tree.walk()))) == (form, [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("format") / "tree"
    make_directory(root)
    return root


@pytest.fixture(scope="module")
def converted(directory: Path) -> Path:
    layout = directory.parent / "artifact"
    run(BUILDER, "convert", f"rootfs:{directory}", f"oci:{layout}:latest")
    return layout


@pytest.fixture(scope="module")
def opened(converted: Path) -> Opened:
    return _read(converted)


@pytest.mark.root
def test_a_directory_reads_the_same_in_both_forms(directory: Path, opened: Opened) -> None:
    _assert_forms(opened[1], treediff.scan(directory))


@pytest.mark.root
def test_every_way_that_data_can_lie_occurs(opened: Opened) -> None:
    """The comparison above says something of a rule only if the image needs the rule."""
    encoded = opened[1][ENCODED]
    nids = {path: entry.nid for path, entry in encoded.walk().items()}

    def header(path: bytes) -> tuple[int, int]:
        """The fragment's bit (1) or the tail's (2), and the cluster bits."""
        low = encoded.map_header(nids[path])
        return (1, 0) if low & FRAGMENT_INODE else (2 * bool(low >> 32 & 0x20), low >> 56)

    assert header(b"many/a file with a long name 0001") == (1, 0)
    assert encoded.map_header(encoded.packed_nid) >> 56 >= 3
    assert header(b"few zeros") == (0, 0)
    assert header(b"noise") == (0, 4)
    assert header(b"noise, odd") == (2, 4)
    assert header(b"large clusters")[0] == 2
    assert header(b"large clusters")[1] > 0
    assert encoded.inode(nids[b"large hole"]).layout == CHUNKS
    assert [extent.blob for extent in encoded.extents(nids[b"holes"])].count(None) > 1
    shared = [{(one.blob, one.frame) for one in encoded.extents(nids[path])} for path in (b"noise", b"noise, cut")]
    assert shared[0] & shared[1]


@pytest.mark.root
def test_layers_read_as_umoci_unpacks_them(tmp_path: Path) -> None:
    source = make_layers(tmp_path / "image")
    run("umoci", "unpack", "--image", f"{source}:latest", tmp_path / "bundle")
    run(BUILDER, "convert", f"oci:{source}:latest", f"oci:{source}:lazy")
    layout = Layout(source)
    subject = layout.tagged("latest")["digest"]
    assert list(layout.referrers(subject)) == [layout.tagged("lazy")]
    artifact, trees = _read(source, "lazy")
    assert artifact.subject == subject
    assert len(artifact.blobs) == 2, "the third layer's content is in the first one's blob"
    _assert_forms(trees, treediff.scan(tmp_path / "bundle" / "rootfs"))


def test_an_image_without_data_has_no_blob(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "empty").touch()
    (root / "link").symlink_to("empty")
    run(BUILDER, "convert", f"rootfs:{root}", f"oci:{tmp_path / 'out'}:latest")
    artifact, trees = _read(tmp_path / "out")
    assert artifact.blobs == []
    _assert_forms(trees, treediff.scan(root))


def test_an_image_with_a_base_names_the_base_s_blobs(tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "out"
    root.mkdir()
    (root / "old").write_bytes(hashlib.shake_128(b"old").digest(1_500_000))
    run(BUILDER, "convert", f"rootfs:{root}", f"oci:{out}:latest")
    (root / "new").write_bytes(b"new")
    run(BUILDER, "convert", f"rootfs:{root}", f"oci:{out}:second", "--base", f"oci:{out}:latest")
    base, _ = _read(out)
    artifact, trees = _read(out, "second")
    assert {blob.table.digest for blob in base.blobs} < {blob.table.digest for blob in artifact.blobs}
    _assert_forms(trees, treediff.scan(root))


@pytest.mark.root
def test_a_blob_is_a_zstd_stream(converted: Path, opened: Opened) -> None:
    """`zstd -d` gives what the decoded form's device holds."""
    artifact, manifest = opened[0], Layout(converted).manifest("latest")
    names = [layer["digest"].removeprefix("sha256:") for layer in manifest["layers"] if layer["mediaType"] == BLOB_TYPE]
    for name, blob in zip(names, artifact.blobs, strict=True):
        path = converted / "blobs" / "sha256" / name
        plain = subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
        assert plain == b"".join(blob.content(frame) for frame in range(len(blob.table.blocks)))
        assert len(plain) == blob.table.decoded_size
        subprocess.run(["zstd", "-tq", path], check=True)


@pytest.mark.root
def test_both_forms_have_the_same_frame_tables(opened: Opened) -> None:
    artifact, _ = opened
    assert artifact.payloads[ENCODED].tables == artifact.payloads[DECODED].tables


def test_crc32c_is_the_page_s() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_no_such_tag_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"manifests": []}')
    with pytest.raises(FormatError):
        Layout(tmp_path).tagged("latest")
