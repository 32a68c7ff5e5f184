"""The EROFS reader on malformed metadata: always an error that says what is wrong, never a crash, hang or flood."""

from __future__ import annotations

import stat
import tracemalloc
from collections.abc import Callable
from struct import pack_into

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofs_builder.digest import Digest
from erofs_builder.erofs import layout
from erofs_builder.erofs.inodes import read_directory, read_inode
from erofs_builder.erofs.reader import Reader, read_superblock
from erofs_builder.erofs.source import Source
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import ErofsError
from erofs_builder.frames import FrameTable
from erofs_builder.hot import crc32c_state
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.payload import Form
from tests.support import odd_tree

forms = pytest.mark.parametrize("form", Form, ids=lambda form: form.value)


def small_image(form: Form) -> tuple[bytearray, list[FrameTable]]:
    """One file of each sort, with names that say which."""
    blob = Blob(FrameTable(Digest(bytes(32)), [2, 1, 5], [2, 8, 9], bytes(96)))
    children = {
        b"alone": Node(stat.S_IFREG, size=8192, extents=(Extent(blob, 0, 0, 8192),)),
        b"cut": Node(stat.S_IFREG, size=8192 + 9, extents=(Extent(blob, 0, 0, 8192), Extent(blob, 2, 0, 9))),
        b"dir": Node(stat.S_IFDIR | 0o755, children={b"%d" % number: Node(stat.S_IFREG) for number in range(400)}),
        b"link": Node(stat.S_IFLNK | 0o777, target=b"target"),
        b"one": Node(stat.S_IFREG, size=9, extents=(Extent(blob, 1, 0, 9),)),
        b"two": Node(stat.S_IFREG, size=9, extents=(Extent(blob, 1, 4096, 9),), xattrs={b"user.a": b"b"}),
    }
    root = Node(stat.S_IFDIR | 0o755, children=children)
    metadata = write_metadata(root, form, [blob])
    return bytearray(metadata.erofs), [table for table in [blob.table] if table]


def seal(image: bytearray) -> bytes:
    """The image with a right checksum, as a forger would make it."""
    image[1028:1032] = bytes(4)
    image[1028:1032] = crc32c_state(0xFFFFFFFF, image[1024:4096]).to_bytes(4, "little")
    return bytes(image)


def offset_of(image: bytearray, form: Form, name: bytes) -> int:
    superblock = read_superblock(bytes(image), form)
    source = Source(bytes(image))
    root = read_inode(source, superblock, superblock.rootnid)
    return next(entry.nid for entry in read_directory(source, superblock, root) if entry.name == name) << 5


def read(image: bytes, tables: list[FrameTable], form: Form) -> Node:
    return Reader(image, tables, form).read_tree()


@forms
def test_the_sound_image_reads(form: Form) -> None:
    image, tables = small_image(form)
    assert read(seal(image), tables, form).children


SUPERBLOCK_DAMAGE: dict[str, tuple[int, bytes, str]] = {
    "magic": (1024, b"\0", "magic"),
    "checksum flag": (1032, b"\0", "checksum"),
    "block size": (1036, b"\x09", "block"),
    "extension slots": (1037, b"\x01", "extension"),
    "root": (1038, b"\xff\xff", "inode 65535"),
    "nanoseconds": (1056, b"\xff\xff\xff\xff", "blocks"),
    "blocks": (1060, b"\x01\0\0\0", "1 blocks"),
    "incompat": (1104, b"\x80\0\0\0", "features"),
    "devices": (1110, b"\x02", "2 device slots"),
    "device table": (1112, b"\xff\xff", "device slot 0"),
    "directory blocks": (1114, b"\x01", "directory block size"),
}


@forms
@pytest.mark.parametrize("what", SUPERBLOCK_DAMAGE)
def test_superblock(form: Form, what: str) -> None:
    image, tables = small_image(form)
    offset, data, message = SUPERBLOCK_DAMAGE[what]
    image[offset : offset + len(data)] = data
    with pytest.raises(ErofsError, match=message):
        read(seal(image), tables, form)


def test_checksum() -> None:
    image, tables = small_image(Form.DECODED)
    image[4095] ^= 1
    with pytest.raises(ErofsError, match="checksum"):
        read(bytes(image), tables, Form.DECODED)


@forms
def test_tables_must_be_those_of_the_slots(form: Form) -> None:
    image, (table,) = small_image(form)
    other = FrameTable(Digest(b"x" * 32), [2, 1, 5], [2, 8, 9], bytes(96))
    for tables in ([], [table, table], [other]):
        with pytest.raises(ErofsError, match="slot"):
            read(bytes(image), tables, form)


def test_the_forms_are_told_apart() -> None:
    for form, other in ((Form.ENCODED, Form.DECODED), (Form.DECODED, Form.ENCODED)):
        image, tables = small_image(form)
        with pytest.raises(ErofsError):
            read(bytes(image), tables, other)


Damage = Callable[[bytearray, int], None]


def field(kind: str, offset: int, value: int) -> Damage:
    return lambda image, inode: pack_into("<" + kind, image, inode + offset, value)


INODE_DAMAGE: dict[str, tuple[Form, bytes, Damage]] = {
    "layout": (Form.ENCODED, b"one", field("H", 0, 3 << 1)),
    "format": (Form.ENCODED, b"one", field("H", 0, 1 << 5)),
    "compact mtime": (Form.DECODED, b"one", field("I", 12, 1)),
    "mode": (Form.DECODED, b"one", field("H", 4, 0)),
    "type": (Form.DECODED, b"one", field("H", 4, stat.S_IFIFO)),
    "links": (Form.DECODED, b"one", field("H", 6, 2)),
    "size": (Form.DECODED, b"one", field("I", 8, 0xFFFFFFFF)),
    "chunk format": (Form.DECODED, b"one", field("I", 16, 1)),
    "chunk device": (Form.DECODED, b"one", field("H", 34, 2)),
    "chunk address": (Form.DECODED, b"one", field("I", 36, 19)),
    "chunk high": (Form.DECODED, b"one", field("H", 32, 1)),
    "chunk in a frame": (Form.DECODED, b"cut", field("I", 36, 1)),
    "fragment": (Form.ENCODED, b"one", field("Q", 32, 1 << 63 | 1)),
    "fragment beyond": (Form.ENCODED, b"one", field("Q", 32, 1 << 63 | 17 * 4096)),
    "fragment across": (Form.ENCODED, b"one", field("I", 8, 9 * 4096)),
    "advise": (Form.ENCODED, b"alone", field("H", 36, 0)),
    "algorithm": (Form.ENCODED, b"alone", field("B", 38, 0)),
    "cluster bits": (Form.ENCODED, b"alone", field("B", 39, 5)),
    "cluster size": (Form.ENCODED, b"alone", field("B", 39, 4)),
    "first record": (Form.ENCODED, b"alone", field("H", 48, 2)),
    "address": (Form.ENCODED, b"alone", field("I", 52, 0xFFFFFF)),
    "address of metadata": (Form.ENCODED, b"alone", field("I", 52, 1)),
    "encoded length": (Form.ENCODED, b"alone", field("H", 60, 0x801)),
    "look ahead": (Form.ENCODED, b"alone", field("H", 62, 0)),
    "look ahead beyond": (Form.ENCODED, b"alone", field("H", 62, 9)),
    "symlink size": (Form.DECODED, b"link", field("I", 8, 0)),
    "long symlink": (Form.DECODED, b"link", field("I", 8, 4096)),
    "symlink NUL": (Form.DECODED, b"link", field("B", 33, 0)),
    "symlink layout": (Form.DECODED, b"link", field("H", 0, layout.INODE_CHUNK_BASED << 1)),
    "directory size": (Form.DECODED, b"dir", field("I", 8, 5000)),
    "directory block": (Form.DECODED, b"dir", field("I", 16, 0xFFFF)),
    "directory overlap": (Form.DECODED, b"dir", field("I", 16, 0)),
    "xattr body": (Form.DECODED, b"two", field("H", 2, 1)),
    "xattrs beyond": (Form.DECODED, b"two", field("H", 2, 0xFFFF)),
    "xattr shared": (Form.DECODED, b"two", field("B", 36, 255)),
    "xattr namespace": (Form.DECODED, b"two", field("B", 45, 9)),
    "xattr value": (Form.DECODED, b"two", field("H", 46, 500)),
}


@pytest.mark.parametrize("what", INODE_DAMAGE)
def test_inodes(what: str) -> None:
    form, name, damage = INODE_DAMAGE[what]
    image, tables = small_image(form)
    damage(image, offset_of(image, form, name))
    with pytest.raises(ErofsError):
        read(seal(image), tables, form)


def test_a_directory_below_itself() -> None:
    image, tables = small_image(Form.DECODED)
    superblock = read_superblock(bytes(image), Form.DECODED)
    inner = offset_of(image, Form.DECODED, b"dir")
    first_dirent = int.from_bytes(image[inner + 16 : inner + 20], "little") * 4096 + 2 * 12
    pack_into("<QHB", image, first_dirent, superblock.rootnid, *_second_and_type(image, first_dirent))
    with pytest.raises(ErofsError, match="another name of directory"):
        read(seal(image), tables, Form.DECODED)


def _second_and_type(image: bytearray, dirent: int) -> tuple[int, int]:
    return int.from_bytes(image[dirent + 8 : dirent + 10], "little"), layout.FT_DIR


def test_overlapping_directories_do_not_multiply() -> None:
    """A thousand directories that share one large block of names would be read a thousand times over."""
    inner = [Node(stat.S_IFDIR | 0o755, children={b"%04d" % at: Node(stat.S_IFREG) for at in range(200)})]
    inner += [Node(stat.S_IFDIR | 0o755, children={b"n" * 200: Node(stat.S_IFREG)}) for _ in range(1000)]
    root = Node(stat.S_IFDIR | 0o755, children={b"%04d" % at: node for at, node in enumerate(inner)})
    image = bytearray(write_metadata(root, Form.DECODED, []).erofs)
    source, superblock = Source(bytes(image)), read_superblock(bytes(image), Form.DECODED)
    entries = read_directory(source, superblock, read_inode(source, superblock, superblock.rootnid))[2:]
    for entry in entries[1:]:
        image[(entry.nid << 5) : (entry.nid << 5) + 32] = image[(entries[0].nid << 5) : (entries[0].nid << 5) + 32]
    with pytest.raises(ErofsError):
        read(seal(image), [], Form.DECODED)


_IMAGES: dict[Form, tuple[bytes, list[FrameTable]]] = {}


def odd_image(form: Form) -> tuple[bytes, list[FrameTable]]:
    if form not in _IMAGES:
        tree = odd_tree.build(entries=50)
        metadata = write_metadata(tree.root, form, [sample.blob for sample in tree.samples])
        _IMAGES[form] = metadata.erofs, [blob.table for blob in metadata.blobs if blob.table]
    return _IMAGES[form]


flips = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
)


@forms
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(flips=flips)
def test_damaged_images_end_in_an_error_or_a_tree(form: Form, flips: list[tuple[float, bytes]]) -> None:
    data, tables = odd_image(form)
    # Most of an image is index; half of the damage goes to the first quarter, where the inodes are.
    image = bytearray(data)
    for place, value in flips:
        offset = 1032 + int(place * place * (len(image) - 1040))
        image[offset : offset + len(value)] = value
    try:
        root = read(seal(image), tables, form)
    except ErofsError:
        return
    assert root.is_dir


@forms
@settings(deadline=None, max_examples=100)
@given(size=st.integers(0, 1 << 16))
def test_truncated_images(form: Form, size: int) -> None:
    data, tables = odd_image(form)
    with pytest.raises(ErofsError):
        read(data[:size], tables, form)


@forms
def test_memory_is_bounded_by_the_image(form: Form) -> None:
    data, tables = odd_image(form)
    tracemalloc.start()
    try:
        read(data, tables, form)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(data)
