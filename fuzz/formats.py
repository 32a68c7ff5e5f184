"""Targets for what this project writes itself and reads back from a registry: tables, payloads, indexes, images."""

from __future__ import annotations

import json
import stat
import struct
from functools import lru_cache
from itertools import chain

from erofs_builder import fingerprint
from erofs_builder.contents import decode_contents, encode_contents
from erofs_builder.digest import Digest
from erofs_builder.erofs.reader import Reader
from erofs_builder.erofs.sharing import announce_fingerprints, has_fingerprints
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import FormatError, FrameTableError, IntegrityError
from erofs_builder.frames import BLOCK, FrameTable
from erofs_builder.hints import MOST_PACKAGES
from erofs_builder.hints_codec import decode_hints, encode_hints
from erofs_builder.hot import crc32c, crc32c_state
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.payload import ALIGNMENT, Form, decode_payload, encode_payload
from erofs_builder.pieces import base_pieces
from erofs_builder.tree import walk
from loader.artifact import PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.convert.load import load_contents, load_payload
from loader.errors import LoaderError
from loader.registry.base import Descriptor
from loader.worker.payloads import verified_payload

ALLOWED = (FormatError, IntegrityError, LoaderError)
_TRAILER = 48


def sealed(data: bytes) -> bytes:
    """The data with their last four bytes replaced by a right checksum, as a forger would."""
    return data[:-4] + struct.pack("<I", crc32c(data[:-4]))


def frame_table(data: bytes) -> None:
    """A frame table, as it is and with a right checksum."""
    for attempt in (data, sealed(data)):
        try:
            table = FrameTable.decode(attempt)
        except FrameTableError:
            continue
        assert table.encode() == attempt
        for decoded in (False, True):
            size = table.decoded_size if decoded else table.blob_size
            assert list(table.covering(0, size, decoded=decoded)) == list(range(len(table)))
        assert all(frame.encoded_size and frame.decoded_size for frame in table)


def contents(data: bytes) -> None:
    """A content index, as it is and with a right checksum, and what a base makes of it."""
    table = FrameTable(Digest(bytes(32)), [1, 2], [3, 2047], bytes(64))
    for attempt in (data, sealed(data)):
        try:
            index = decode_contents(attempt)
        except FormatError:
            continue
        assert decode_contents(encode_contents(index)) is not None
        found = base_pieces(index, {digest: Blob(table, from_base=True) for digest, _ in index})
        for piece in found.values():
            assert piece.offset + piece.length <= table[piece.frame].decoded_size


def payload(data: bytes) -> None:
    """A metadata payload: input is tables and trailer, behind one block of metadata, padded as it must be."""
    body, trailer = data[:-44], data[-44:]
    head = bytes(ALIGNMENT) + body
    whole = head + bytes(-(len(head) + _TRAILER) % ALIGNMENT) + sealed(trailer.rjust(44, b"\0") + bytes(4))
    for attempt in (data, whole):
        try:
            found = decode_payload(attempt)
        except FormatError:
            continue
        again = decode_payload(encode_payload(found.form, found.erofs, list(found.tables), found.hints))
        assert [table.encode() for table in again.tables] == [table.encode() for table in found.tables]
        assert again.hints == found.hints


def hints(data: bytes) -> None:
    """Hints about two blobs, of 40 frames and of one: what a node holds of them is small, and comes back the same."""
    tables = [FrameTable(Digest(bytes(32)), [1] * frames, [1] * frames, bytes(32 * frames)) for frames in (40, 1)]
    found = decode_hints(data, tables)
    assert decode_hints(encode_hints(found, tables), tables) == found
    for each, table in zip(found, tables, strict=True):
        named = [*each.groups, *each.packages, *each.companions, *chain.from_iterable(each.companions.values())]
        assert all(0 <= frame < len(table) for frame in named)
        assert all(0 <= group.start < group.stop <= len(table) for group in each.groups.values())
        assert all(len(known) <= MOST_PACKAGES for known in each.packages.values())


class _Source:
    """Answers every blob with what its descriptor brings along, or with the same bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __str__(self) -> str:
        return "fuzz"

    def blob(self, descriptor: Descriptor) -> bytes:
        return self._data if descriptor.data is None else descriptor.data


def artifact(data: bytes) -> None:
    """An artifact's manifest, and what is done with the descriptors in it."""
    manifest = Artifact.decode(data)
    again = Artifact.decode(manifest.encode())
    assert again.blobs == manifest.blobs and again.metadata == manifest.metadata
    for blob in manifest.blobs:
        assert 0 <= blob.size < 1 << 63 and len(blob.digest.raw) == 32
        assert "/" not in blob.digest.hex and "." not in blob.digest.hex
    source = _Source(b"\x28\xb5\x2f\xfd")
    for form in Form:
        try:
            load_payload(source, manifest, form)  # type: ignore[arg-type]
        except ALLOWED:
            pass
    load_contents(source, manifest)  # type: ignore[arg-type]


def compressed_payload(data: bytes) -> None:
    """A payload's zstd stream under a manifest that promises 128 KiB."""
    descriptor = Descriptor("", Digest.of(data), len(data), {PAYLOAD_SIZE_ANNOTATION: str(2 * ALIGNMENT)})
    manifest = Artifact([], {Form.ENCODED: descriptor})
    plain, payload = verified_payload(data, descriptor, manifest, Form.ENCODED)
    assert len(plain) == 2 * ALIGNMENT and not payload.tables


@lru_cache(maxsize=2)
def sound_image(form: Form) -> tuple[bytes, tuple[FrameTable, ...]]:
    """A small image with one of everything, and its frame tables."""
    blob = Blob(FrameTable(Digest(bytes(32)), [2, 1, 5], [2, 8, 9], bytes(96)))
    attributes = {b"user.a": b"b", b"security.capability": b"\1" * 20}
    children = {
        b"alone": Node(stat.S_IFREG, size=8192, extents=(Extent(blob, 0, 0, 8192),)),
        b"cut": Node(stat.S_IFREG, size=8201, extents=(Extent(blob, 0, 0, 8192), Extent(blob, 2, 0, 9))),
        b"dev": Node(stat.S_IFCHR, rdev=(1, 3), xattrs=attributes),
        b"dir": Node(stat.S_IFDIR | 0o755, children={b"%80d" % number: Node(stat.S_IFREG) for number in range(60)}),
        b"hole": Node(stat.S_IFREG, size=1 << 40, extents=(Extent(None, 0, 0, 1 << 40),)),
        b"link": Node(stat.S_IFLNK | 0o777, target=b"target"),
        b"mixed": Node(stat.S_IFREG, size=16384, extents=(Extent(None, 0, 0, 8192), Extent(blob, 0, 0, 8192))),
        b"one": Node(stat.S_IFREG, size=9, extents=(Extent(blob, 1, 0, 9),)),
        b"two": Node(stat.S_IFREG, size=9, extents=(Extent(blob, 1, BLOCK, 9),), xattrs=attributes),
    }
    children[b"two too"] = children[b"two"]
    for name in (b"cut", b"one", b"two"):
        children[name].fingerprint = name.ljust(fingerprint.SIZE)
    metadata = write_metadata(Node(stat.S_IFDIR | 0o755, children=children), form, [blob])
    return metadata.erofs, tuple(table for table in [blob.table] if table)


def erofs(data: bytes) -> None:
    """EROFS metadata: the input patches a sound image (offset 2, length 1, bytes), the checksum is made right."""
    form = Form.DECODED if data[:1] < b"\x80" else Form.ENCODED
    sound, tables = sound_image(form)
    image = bytearray(sound)
    at = 1
    while at + 3 <= len(data):
        offset, length = struct.unpack_from("<HB", data, at)
        patch = data[at + 3 : at + 3 + length % 16 + 1]
        # Where it matters is at the front: superblock, device slots, inodes, dirents.
        image[offset : offset + len(patch)] = patch
        at += 3 + len(patch)
    image = image[: len(sound)]
    image[1028:1032] = bytes(4)
    image[1028:1032] = crc32c_state(0xFFFFFFFF, image[1024:BLOCK]).to_bytes(4, "little")
    root = Reader(bytes(image), tables, form).read_tree()
    for path, node in walk(root):
        assert b"\0" not in path and b".." not in path.split(b"/")
        check_extents(node)
        assert len(node.fingerprint) in (0, fingerprint.SIZE)
    if has_fingerprints(bytes(image)):
        assert len(announce_fingerprints(bytes(image))) == BLOCK


def check_extents(node: Node) -> None:
    """A file's extents lie in frames that exist, and add up to its size."""
    assert sum(extent.length for extent in node.extents) == node.size
    for extent in node.extents:
        assert extent.length > 0
        if extent.blob is not None:
            assert extent.blob.table is not None
            assert extent.frame_offset >= 0
            assert extent.frame_offset + extent.length <= extent.blob.table[extent.frame].decoded_size


def json_like(document: object) -> bytes:
    """A document as bytes, for seeds."""
    return json.dumps(document).encode()
