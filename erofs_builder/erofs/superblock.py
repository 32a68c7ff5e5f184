"""The head of an image: superblock, compression configuration, device table, checksum."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.layout import BLOCK, BLOCK_BITS, DEVICE_SLOT, DEVICE_SLOT_SIZE, SUPER_OFFSET, SUPER_SIZE
from erofs_builder.errors import UnsupportedError
from erofs_builder.hot import crc32c_state
from erofs_builder.model import Blob
from erofs_builder.payload import Form, device_tag

_HEAD_END = SUPER_OFFSET + SUPER_SIZE
_UUID_START, _UUID_END = SUPER_OFFSET + 48, SUPER_OFFSET + 64


class Fields(NamedTuple):
    """What the superblock says of the tree."""

    inos: int
    epoch: int
    fixed_nsec: int
    root_nid: int
    packed_nid: int
    xattr_blkaddr: int
    fingerprints: bool


@dataclass(slots=True)
class Devices:
    """The blobs in the order of their slots; with `table` off they follow the metadata in the same file."""

    form: Form
    blobs: list[Blob]
    table: bool
    metadata_blocks: int = 0
    end: int = 0
    blocks: dict[Blob, int] = field(default_factory=dict)
    unified: dict[Blob, int] = field(default_factory=dict)
    addresses: dict[Blob, tuple[int, int]] = field(default_factory=dict)  # what indexes say: (device id, first block)

    def place(self, metadata_blocks: int) -> None:
        """Give each blob its unified address: behind the metadata, one after the other."""
        self.metadata_blocks = position = metadata_blocks
        for number, blob in enumerate(self.blobs, 1):
            self.unified[blob] = position
            self.blocks[blob] = blob_blocks(blob, self.form)
            # The classic index has no device ids. Chunk indexes do: kernels before 6.4 want them with a device table.
            use_id = self.table and self.form is Form.DECODED
            self.addresses[blob] = (number, 0) if use_id else (0, position)
            position += self.blocks[blob]
        if position > on_disk.U32_MAX:
            raise UnsupportedError(f"{position << BLOCK_BITS} bytes of blobs are more than EROFS can address")
        self.end = position


def blob_blocks(blob: Blob, form: Form) -> int:
    """Blocks of a blob as it lies in the cache."""
    if blob.table is None:
        raise ValueError("a blob is not complete")
    return (blob.table.blob_size if form is Form.ENCODED else blob.table.decoded_size) >> BLOCK_BITS


def _table_offset(form: Form) -> int:
    start = _HEAD_END + (on_disk.Z_ZSTD_CFGS.size if form is Form.ENCODED else 0)
    return -(-start // DEVICE_SLOT_SIZE) * DEVICE_SLOT_SIZE


def devices_end(form: Form, devices: Devices) -> int:
    """Where the head ends and inodes may start."""
    if len(devices.blobs) > on_disk.DEVICE_SLOTS_MAX:
        raise UnsupportedError(f"{len(devices.blobs)} blobs in one image, more than {on_disk.DEVICE_SLOTS_MAX}")
    return _table_offset(form) + (len(devices.blobs) * DEVICE_SLOT_SIZE if devices.table else 0)


def write_head(image: bytearray, form: Form, fields: Fields, devices: Devices) -> None:
    """Fill in the head of an image that is complete but for it; UUID and checksum are derived from all its bytes."""
    with_table = devices.table and bool(devices.blobs)
    offset = _table_offset(form)
    if with_table:
        for number, blob in enumerate(devices.blobs):
            tag = device_tag(form, blob.digest).encode()
            slot = DEVICE_SLOT.pack(tag, devices.blocks[blob], devices.unified[blob], 0, 0)
            image[offset + number * DEVICE_SLOT_SIZE : offset + (number + 1) * DEVICE_SLOT_SIZE] = slot
    if form is Form.ENCODED:
        on_disk.Z_ZSTD_CFGS.pack_into(image, _HEAD_END, 6, 0, on_disk.Z_ZSTD_WINDOW_BITS - 10)
    if fields.fingerprints:
        prefix = on_disk.XATTR_LONG_PREFIX.pack(1, on_disk.XATTR_INDEX_FINGERPRINT)
        image[on_disk.XATTR_PREFIX_START * 4 : SUPER_OFFSET] = prefix
    superblock = _superblock(form, fields, devices, with_table)
    image[SUPER_OFFSET:_HEAD_END] = superblock.pack()
    image[_UUID_START:_UUID_END] = _uuid(image)
    checksum = crc32c_state(0xFFFFFFFF, memoryview(image)[SUPER_OFFSET:BLOCK])
    image[SUPER_OFFSET + 4 : SUPER_OFFSET + 8] = checksum.to_bytes(4, "little")


def _superblock(form: Form, fields: Fields, devices: Devices, with_table: bool) -> on_disk.Superblock:
    compressed = form is Form.ENCODED
    incompat = on_disk.FEATURE_INCOMPAT_CHUNKED_FILE
    if with_table:
        incompat |= on_disk.FEATURE_INCOMPAT_DEVICE_TABLE
    if compressed:
        incompat |= on_disk.FEATURE_INCOMPAT_ZERO_PADDING | on_disk.FEATURE_INCOMPAT_COMPR_CFGS
        incompat |= on_disk.FEATURE_INCOMPAT_FRAGMENTS
    return on_disk.Superblock(
        magic=on_disk.SUPER_MAGIC,
        checksum=0,
        feature_compat=on_disk.FEATURE_COMPAT_SB_CHKSUM
        | on_disk.FEATURE_COMPAT_MTIME
        | on_disk.FEATURE_COMPAT_XATTR_FILTER,
        blkszbits=BLOCK_BITS,
        sb_extslots=0,
        rootnid=fields.root_nid,
        inos=fields.inos,
        epoch=fields.epoch,
        fixed_nsec=fields.fixed_nsec,
        blocks=devices.metadata_blocks if devices.table else devices.end,
        meta_blkaddr=0,
        xattr_blkaddr=fields.xattr_blkaddr,
        uuid=bytes(16),
        volume_name=bytes(16),
        feature_incompat=incompat,
        available_compr_algs=1 << on_disk.Z_COMPRESSION_ZSTD if compressed else 0,
        extra_devices=len(devices.blobs) if with_table else 0,
        devt_slotoff=_table_offset(form) // DEVICE_SLOT_SIZE if with_table else 0,
        dirblkbits=0,
        xattr_prefix_count=0,
        xattr_prefix_start=on_disk.XATTR_PREFIX_START if fields.fingerprints else 0,  # off until sharing.py
        packed_nid=fields.packed_nid,
        xattr_filter_reserved=0,
        ishare_xattr_prefix_id=0,
        reserved=0,
        build_time=0,
        rootnid_8b=0,
        reserved2=0,
    )


def _uuid(image: bytearray) -> bytes:
    """A version 8 UUID (custom: derived from content) of everything but itself and the checksum, both zero now."""
    uuid = bytearray(hashlib.sha256(image).digest()[:16])
    uuid[6] = 0x80 | uuid[6] & 0x0F
    uuid[8] = 0x80 | uuid[8] & 0x3F
    return bytes(uuid)
