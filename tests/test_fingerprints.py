"""Fingerprints of files: the same for the same bytes in any image, only for bytes that were hashed, seen by nobody."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
from pathlib import Path

import pytest

from erofs_builder import fingerprint
from erofs_builder.erofs.flat import write_flat
from erofs_builder.erofs.layout import BLOCK, Superblock
from erofs_builder.erofs.reader import Reader, read_superblock
from erofs_builder.erofs.sharing import announce_fingerprints, has_fingerprints
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.erofs.xattrs import XattrTable
from erofs_builder.errors import ErofsError, IntegrityError
from erofs_builder.layer import Options
from erofs_builder.model import Node
from erofs_builder.payload import Form
from loader.convert import check
from loader.convert.convert import Request, convert
from loader.convert.progress import NoProgress
from loader.convert.survey import load_tree, survey
from loader.registry.config import RegistryConfig
from loader.registry.find import find_artifact
from loader.registry.open import open_image
from mounts import mount_erofs, umount2
from tests.format_reader import Layout, read_artifact
from tests.format_tree import Entry, Tree
from tests.support import erofs_utils, odd_tree
from tests.support.treediff import compare, scan

forms = pytest.mark.parametrize("form", Form, ids=lambda form: form.value)
ON = Options(fingerprints=1, threads=1)


def publish(root: Path, target: Path, tag: str = "latest", base: str | None = None, options: Options = ON) -> None:
    convert(Request(f"rootfs:{root}", f"oci:{target}:{tag}", base=base, options=options), RegistryConfig())


def entries(target: Path, tag: str = "latest") -> list[dict[bytes, Entry]]:
    """Each form's paths as the second reader sees them."""
    layout = Layout(target)
    artifact = read_artifact(layout, layout.tagged(tag))
    return [Tree(payload, artifact.blobs).walk() for payload in artifact.payloads.values()]


def by_page(pieces: list[bytes | int]) -> bytes:
    """A fingerprint as docs/format.md says it, of pieces or lengths of holes."""
    whole = b"erofs-ondemand file\n"
    for piece in pieces:
        size = piece if isinstance(piece, int) else len(piece)
        whole += size.to_bytes(8, "little") + (bytes(32) if isinstance(piece, int) else hashlib.sha256(piece).digest())
    return hashlib.sha256(whole).digest()[:24]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fingerprints") / "tree"
    root.mkdir()
    noise = random.Random(3).randbytes(3 << 20)
    (root / "noise").write_bytes(noise)
    (root / "twin").write_bytes(noise)
    (root / "small").write_bytes(b"small\n")
    (root / "link").hardlink_to(root / "small")
    (root / "zeros").write_bytes(bytes(9000))
    (root / "empty").touch()
    with open(root / "sparse", "wb") as file:
        file.truncate(5 << 20)
        file.seek(4 << 20)
        file.write(noise[: 1 << 20])
    (root / "dense").write_bytes(bytes(4 << 20) + noise[: 1 << 20])
    return root


@pytest.fixture(scope="module")
def published(root: Path) -> Path:
    publish(root, root.parent / "out")
    return root.parent / "out"


@pytest.mark.root
def test_they_are_the_page_s(root: Path, published: Path) -> None:
    for found in entries(published):
        assert found[b"small"].fingerprint == found[b"link"].fingerprint == by_page([b"small\n"])
        assert found[b"zeros"].fingerprint == by_page([9000])
        assert found[b"empty"].fingerprint == found[b"."].fingerprint == b""
        assert found[b"noise"].fingerprint == found[b"twin"].fingerprint != found[b"small"].fingerprint
        assert found[b"sparse"].fingerprint == found[b"dense"].fingerprint
        assert len({one.fingerprint for one in found.values()}) == 5


@pytest.mark.root
def test_nobody_sees_them(root: Path, published: Path) -> None:
    assert all(not entry.xattrs for found in entries(published) for entry in found.values())


@pytest.mark.root
def test_other_images_have_the_same(root: Path, published: Path, tmp_path: Path) -> None:
    """Packed with other files, at another level, and left to the base."""
    other = tmp_path / "tree"
    other.mkdir()
    for name in ("noise", "small"):
        (other / name).write_bytes((root / name).read_bytes())
    (other / "a new one").write_bytes(b"new")
    publish(other, tmp_path / "own", options=Options(level=1, threads=1, fingerprints=1))
    publish(other, tmp_path / "based", base=f"oci:{published}:latest")
    expected = entries(published)[0]
    for found in entries(tmp_path / "own") + entries(tmp_path / "based"):
        for path in (b"noise", b"small"):
            assert found[path].fingerprint == expected[path].fingerprint


@pytest.mark.root
def test_only_when_asked_for(root: Path, tmp_path: Path) -> None:
    publish(root, tmp_path / "out", options=Options(threads=1))
    assert all(not entry.fingerprint for found in entries(tmp_path / "out") for entry in found.values())
    source, name = open_image(f"oci:{tmp_path / 'out'}:latest", RegistryConfig())
    _, artifact = find_artifact(source, name)
    assert survey(load_tree(source, artifact), 0).fingerprints == 0


@pytest.mark.root
def test_check_holds_them_against_the_content(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = open_image(f"oci:{published}:latest", RegistryConfig())
    _, artifact = find_artifact(source, name)
    assert survey(load_tree(source, artifact), 0).fingerprints == 6  # of inodes
    report = check.check_artifact(source, artifact, NoProgress())
    assert (report.fingerprints, report.damage) == (6, [])

    with monkeypatch.context() as patch:  # as in a rebuilt layout: only the files of zeros are made of what is known
        patch.setattr(check, "_pieces_by_frame", lambda *_: [{} for _ in artifact.blobs])
        assert check.check_artifact(source, artifact, NoProgress()).fingerprints == 1

    def forged(*arguments: object) -> object:
        tree = load_tree(*arguments)  # type: ignore[arg-type]
        children = tree.root.children or {}
        children[b"small"].fingerprint = children[b"noise"].fingerprint
        return tree

    monkeypatch.setattr(check, "load_tree", forged)
    with pytest.raises(IntegrityError, match="link: its fingerprint"):
        check.check_artifact(source, artifact, NoProgress())


@forms
def test_announcing_changes_the_superblock_alone(form: Form) -> None:
    odd = odd_tree.build(10)
    erofs = write_metadata(odd.root, form, [sample.blob for sample in odd.samples]).erofs
    assert has_fingerprints(erofs)
    block = announce_fingerprints(erofs)
    before, after = read_superblock(erofs, form), Superblock.unpack_from(block)
    assert after.feature_compat == before.feature_compat | 0x30
    assert after.feature_incompat == before.feature_incompat | 0x40
    assert (after.xattr_prefix_start, after.xattr_prefix_count, after.ishare_xattr_prefix_id) == (255, 1, 0)
    assert block[1020:1024] == b"\1\0\5\0"
    assert block[:1024] == erofs[:1024] and block[1152:] == erofs[1152:BLOCK]
    assert not has_fingerprints(block)


@pytest.mark.root
@forms
def test_others_read_what_is_announced(form: Form, tmp_path: Path) -> None:
    """fsck.erofs checks prefixes and checksum; the kernel, whether it can share or not, shows the tree as it is."""
    odd = odd_tree.build(10)
    out = io.BytesIO()
    encoded = {sample.blob: bytes(sample.encoded) for sample in odd.samples}
    write_flat(odd.root, form, list(encoded), lambda blob: io.BytesIO(encoded[blob]), out)
    flat = tmp_path / "flat"
    flat.write_bytes(announce_fingerprints(out.getvalue()) + out.getvalue()[BLOCK:])
    assert "ishare_xattrs" in erofs_utils.run("dump.erofs", "-s", flat)
    erofs_utils.run("fsck.erofs", "--extract", flat)
    target = tmp_path / "mnt"
    target.mkdir()
    mount_erofs(flat, [], ["cache_strategy=disabled"], target)
    try:
        assert compare(odd.expected(), scan(target)) == []
    finally:
        umount2(target)


def test_what_has_none() -> None:
    for data in (b"", bytes(BLOCK), os.urandom(BLOCK)):
        assert not has_fingerprints(data)
    plain = write_metadata(Node(stat.S_IFDIR | 0o755, children={}), Form.DECODED, []).erofs
    assert not has_fingerprints(plain)


def test_no_room_is_left_for_one() -> None:
    table = XattrTable()
    full = {b"user.%d" % number: bytes(65523) for number in range(4)}
    table.add(full)
    table.layout()
    assert table.body(full, bytes(fingerprint.SIZE)) == table.body(full)


@pytest.mark.parametrize(
    "node",
    [
        Node(stat.S_IFREG, fingerprint=bytes(24)),
        Node(stat.S_IFDIR, children={}, fingerprint=bytes(24)),
        Node(stat.S_IFLNK, target=b"t", fingerprint=bytes(24)),
        Node(stat.S_IFREG, size=1, fingerprint=bytes(23)),
    ],
)
def test_a_fingerprint_belongs_to_a_file_with_bytes(node: Node) -> None:
    with pytest.raises(ValueError, match="fingerprints"):
        write_metadata(Node(stat.S_IFDIR, children={b"n": node}), Form.DECODED, [])


@forms
def test_malformed_ones_are_refused(form: Form) -> None:
    odd = odd_tree.build(10)
    metadata = write_metadata(odd.root, form, [sample.blob for sample in odd.samples])
    tables = [blob.table for blob in metadata.blobs if blob.table]
    entry = b"\0\5\x18\0"
    assert metadata.erofs.count(entry) > 10
    shorter = metadata.erofs.replace(entry, b"\0\5\x14\0")
    for erofs in (shorter, metadata.erofs.replace(entry, b"\1\5\x17\0")):
        with pytest.raises(ErofsError):
            Reader(erofs, tables, form).read_tree()
