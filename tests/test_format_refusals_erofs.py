"""EROFS metadata that breaks a rule of docs/format.md is refused, by the page's reader and by the project's own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from erofs_builder.erofs.reader import Reader
from erofs_builder.errors import FormatError as OwnFormatError
from erofs_builder.payload import Form, decode_payload
from tests.format_reader import BLOCK, DECODED, ENCODED, FormatError, crc32c
from tests.format_tree import Tree
from tests.support.format_image import Change, Image, changed, flip, make_image, put

FORM = {ENCODED: Form.ENCODED, DECODED: Form.DECODED}
Places = dict[int, dict[str, tuple[int, int]]]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("refusals") / "tree")


def read_both(image: Image, form: int, erofs: bytes) -> Iterator[Callable[[], object]]:
    """The two readers, to be called."""
    payload = replace(image.artifact.payloads[form], erofs=erofs)
    tables = decode_payload(image.payloads[form]).tables
    yield lambda: Tree(payload, image.artifact.blobs).walk()
    yield lambda: Reader(erofs, tables, FORM[form]).read_tree()


def assert_refused(image: Image, form: int, change: Change) -> None:
    """Both readers refuse the metadata after `change`, with the superblock's checksum made right."""
    copy = bytearray(image.artifact.payloads[form].erofs)
    before = bytes(copy)
    change(copy)
    assert bytes(copy) != before
    copy[1028:1032] = bytes(4)
    copy[1028:1032] = struct.pack("<I", crc32c(bytes(copy[1024:BLOCK])) ^ 0xFFFFFFFF)
    ours, theirs = read_both(image, form, bytes(copy))
    with pytest.raises(FormatError):
        ours()
    with pytest.raises(OwnFormatError):
        theirs()


@pytest.mark.parametrize("form", [ENCODED, DECODED])
def test_every_byte_of_the_first_block_is_covered(image: Image, form: int) -> None:
    for offset in range(1024, BLOCK, 61):
        for read in read_both(image, form, changed(image.artifact.payloads[form].erofs, flip(offset))):
            with pytest.raises((FormatError, OwnFormatError)):
                read()


SUPER = 1024
BAD_SUPERBLOCKS = {
    "magic": flip(SUPER),
    "no checksum": put("<I", SUPER + 8, 2),
    "block size": put("<B", SUPER + 12, 13),
    "extension slots": put("<B", SUPER + 13, 1),
    "root": put("<H", SUPER + 14, 60_000),
    "feature": put("<I", SUPER + 80, 0x4 | 0x8 | 0x80),
    "number of devices": put("<H", SUPER + 86, 2),
    "no devices": put("<H", SUPER + 86, 0),
    "directory blocks": put("<B", SUPER + 90, 1),
    "prefixes of attributes": put("<B", SUPER + 91, 1),
    "place of the prefix": put("<I", SUPER + 92, 7),
}


@pytest.mark.parametrize("form", [ENCODED, DECODED])
@pytest.mark.parametrize("rule", BAD_SUPERBLOCKS)
def test_superblocks_that_break_a_rule_are_refused(image: Image, form: int, rule: str) -> None:
    assert_refused(image, form, BAD_SUPERBLOCKS[rule])


@pytest.mark.parametrize("form", [ENCODED, DECODED])
def test_device_slots_that_break_a_rule_are_refused(image: Image, form: int) -> None:
    slot = 128 * struct.unpack_from("<H", image.artifact.payloads[form].erofs, SUPER + 88)[0]
    for change in (flip(slot), flip(slot + 63), flip(slot + 64), put("<I", slot + 68, 0), flip(slot + 72)):
        assert_refused(image, form, change)


@pytest.fixture(scope="module")
def places(image: Image) -> Places:
    """By form and path: where the inode lies, and where what maps its data does."""
    found: Places = {}
    for form, payload in image.artifact.payloads.items():
        tree = Tree(payload, image.artifact.blobs)
        nids = {path.decode(): entry.nid for path, entry in tree.walk().items()}
        found[form] = {path: (32 * nid, -(-tree.inode(nid).body // 8) * 8) for path, nid in nids.items()}
    return found


BAD_INODES = {
    "format": ("noise", put("<B", 0, 0x25)),
    "layout": ("noise", put("<B", 0, 1 | 6 << 1)),
    "type": ("noise", put("<H", 4, 0o177644)),
    "directory that is none": ("noise", put("<H", 4, 0o040755)),
    "file that is a directory": ("directory", put("<H", 4, 0o100755)),
    "links": ("directory/a", flip(44)),
    "nanoseconds": ("noise", put("<I", 40, 10**9)),
}


@pytest.mark.parametrize("form", [ENCODED, DECODED])
@pytest.mark.parametrize("rule", BAD_INODES)
def test_inodes_that_break_a_rule_are_refused(image: Image, places: Places, form: int, rule: str) -> None:
    path, change = BAD_INODES[rule]
    inode, _ = places[form][path]
    assert_refused(image, form, at(inode, change))


def at(offset: int, change: Change) -> Change:
    """`change` with its offsets counted from `offset`."""

    def moved(data: bytearray) -> None:
        part = data[offset : offset + 4096]
        change(part)
        data[offset : offset + len(part)] = part

    return moved


BAD_MAPS = {
    "advise": ("noise", put("<H", 4, 0x2 | 0x10)),
    "algorithm": ("noise", put("<B", 6, 2)),
    "cluster bits": ("noise", put("<B", 7, 5)),
    "type of a record": ("noise", put("<H", 16, 3)),
    "no first record": ("noise", put("<H", 16, 2)),
    "address": ("noise", flip(20)),
    "address nowhere": ("noise", put("<I", 20, 0xFFFFFF00)),
    "blocks": ("noise", flip(28)),
    "blocks not said": ("noise", put("<H", 28, 1)),
    "a place behind the packed inode": ("directory/a", put("<Q", 0, 1 << 63 | 1 << 40)),
    "a tail behind the packed inode": ("tail", put("<I", 0, 0xFFFF_0000)),
}


@pytest.mark.parametrize("rule", BAD_MAPS)
def test_maps_that_break_a_rule_are_refused(image: Image, places: Places, rule: str) -> None:
    path, change = BAD_MAPS[rule]
    assert_refused(image, ENCODED, at(places[ENCODED][path][1], change))


BAD_CHUNKS = {
    "device 0": put("<H", 2, 0),
    "device 2": put("<H", 2, 2),
    "behind the device": put("<I", 4, 1 << 20),
    "a position above 32 bits": put("<H", 0, 1),
}


@pytest.mark.parametrize("rule", BAD_CHUNKS)
def test_chunk_indexes_that_break_a_rule_are_refused(image: Image, places: Places, rule: str) -> None:
    assert_refused(image, DECODED, at(places[DECODED]["noise"][1], BAD_CHUNKS[rule]))


def test_other_chunk_formats_are_refused(image: Image, places: Places) -> None:
    inode, _ = places[DECODED]["noise"]
    for change in (put("<H", 16, 0), put("<H", 16, 0x60)):
        assert_refused(image, DECODED, at(inode, change))


@pytest.mark.parametrize("form", [ENCODED, DECODED])
def test_directories_that_break_a_rule_are_refused(image: Image, places: Places, form: int) -> None:
    """The directory's five entries lie behind its inode, which has no attributes: 12 bytes each, then the names."""
    erofs = image.artifact.payloads[form].erofs
    start = places[form]["directory"][0] + (64 if erofs[places[form]["directory"][0]] & 1 else 32)
    assert erofs[start + 60 : start + 69] == b"...ablink"
    order, slash, nul = flip(start + 63, 2), put("<B", start + 63, 0x2F), put("<B", start + 64, 0)
    offset, none, dot, kind = flip(start + 8), put("<H", start + 8, 0), flip(start), put("<B", start + 34, 2)
    nowhere = put("<Q", start + 36, 1 << 40)
    for change in (order, slash, nul, offset, none, dot, kind, nowhere):
        assert_refused(image, form, change)
