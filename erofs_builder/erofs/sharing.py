"""Have the kernel share page cache by the fingerprints that an image carries: a change of its first block.

An image carries them where no kernel looks: their name is not announced. Kernels before 6.17 would look for the name's
text in the packed inode, and the decoded form is also for kernels that do not know such names. So the node that mounts,
and has tried that its kernel can share, announces them: in a copy of the metadata.
"""

from __future__ import annotations

from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.layout import (
    BLOCK,
    SUPER_OFFSET,
    SUPER_SIZE,
    XATTR_LONG_PREFIX,
    XATTR_PREFIX_START,
    Superblock,
)
from erofs_builder.hot import crc32c_state

_PREFIX = XATTR_LONG_PREFIX.pack(1, on_disk.XATTR_INDEX_FINGERPRINT)
_PREFIX_OFFSET = XATTR_PREFIX_START * 4


def has_fingerprints(erofs: bytes | memoryview) -> bool:
    """Whether metadata carries fingerprints of its files."""
    if len(erofs) < BLOCK:
        return False
    superblock = Superblock.unpack_from(erofs)
    prefix = bytes(erofs[_PREFIX_OFFSET : _PREFIX_OFFSET + XATTR_LONG_PREFIX.size])
    fields = superblock.xattr_prefix_start, superblock.xattr_prefix_count, superblock.ishare_xattr_prefix_id
    return superblock.magic == on_disk.SUPER_MAGIC and prefix == _PREFIX and fields == (XATTR_PREFIX_START, 0, 0)


def announce_fingerprints(erofs: bytes) -> bytes:
    """The first block of metadata that `has_fingerprints`, changed so that `inode_share` works; 7.0 and later."""
    block = bytearray(erofs[:BLOCK])
    superblock = Superblock.unpack_from(erofs)
    compat = on_disk.FEATURE_COMPAT_PLAIN_XATTR_PFX | on_disk.FEATURE_COMPAT_ISHARE_XATTRS
    changed = superblock._replace(
        checksum=0,
        feature_compat=superblock.feature_compat | compat,
        feature_incompat=superblock.feature_incompat | on_disk.FEATURE_INCOMPAT_XATTR_PREFIXES,
        xattr_prefix_count=1,
    )
    block[SUPER_OFFSET : SUPER_OFFSET + SUPER_SIZE] = changed.pack()
    checksum = crc32c_state(0xFFFFFFFF, memoryview(block)[SUPER_OFFSET:BLOCK])
    block[SUPER_OFFSET + 4 : SUPER_OFFSET + 8] = checksum.to_bytes(4, "little")
    return bytes(block)
