"""EROFS on-disk structures and constants, named as in the kernel's fs/erofs/erofs_fs.h. All integers little-endian.

Only what this project writes or reads: 4 KiB blocks, plain directories, chunk-based files and the classic full index
of compressed ones. `struct.Struct` sizes are the format's; tests/test_erofs_layout.py pins them.
"""

from __future__ import annotations

import stat
from struct import Struct
from typing import NamedTuple

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
NULL_ADDR = 0xFFFFFFFF  # a hole's block address
U32_MAX = 0xFFFFFFFF

SUPER_OFFSET = 1024
SUPER_SIZE = 128
SUPER_MAGIC = 0xE0F5E1E2
ISLOT_BITS = 5  # inodes lie in slots of 32 bytes; a nid counts them

FEATURE_COMPAT_SB_CHKSUM = 0x1
FEATURE_COMPAT_MTIME = 0x2
FEATURE_COMPAT_XATTR_FILTER = 0x4
FEATURE_COMPAT_PLAIN_XATTR_PFX = 0x10
FEATURE_COMPAT_ISHARE_XATTRS = 0x20
FEATURE_INCOMPAT_ZERO_PADDING = 0x1
FEATURE_INCOMPAT_COMPR_CFGS = 0x2
FEATURE_INCOMPAT_CHUNKED_FILE = 0x4
FEATURE_INCOMPAT_DEVICE_TABLE = 0x8
FEATURE_INCOMPAT_FRAGMENTS = 0x20  # also says that frames may be shared (DEDUPE)
FEATURE_INCOMPAT_XATTR_PREFIXES = 0x40

INODE_LAYOUT_COMPACT = 0
INODE_LAYOUT_EXTENDED = 1
INODE_FLAT_PLAIN = 0
INODE_COMPRESSED_FULL = 1
INODE_FLAT_INLINE = 2
INODE_CHUNK_BASED = 4
DATALAYOUT_BIT = 1

CHUNK_FORMAT_BLKBITS_MASK = 0x1F
CHUNK_FORMAT_INDEXES = 0x20

FT_REG_FILE, FT_DIR, FT_CHRDEV, FT_BLKDEV, FT_FIFO, FT_SOCK, FT_SYMLINK = range(1, 8)
FILE_TYPES = {
    stat.S_IFREG: FT_REG_FILE,
    stat.S_IFDIR: FT_DIR,
    stat.S_IFCHR: FT_CHRDEV,
    stat.S_IFBLK: FT_BLKDEV,
    stat.S_IFIFO: FT_FIFO,
    stat.S_IFSOCK: FT_SOCK,
    stat.S_IFLNK: FT_SYMLINK,
}
NAME_MAX = 255
SYMLINK_MAX = 4095

XATTR_IBODY_HEADER_SIZE = 12
XATTR_PREFIXES = (  # index, prefix; the two ACL names have no suffix
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
)
# Lustre's: the format has it, no kernel lists or gives away what is in it.
XATTR_INDEX_FINGERPRINT = 5
XATTR_PREFIX_START = 255  # in units of 4 bytes: where the one long prefix lies, right before the superblock
XATTR_FILTER_SEED = 0x25BBE08F
XATTR_FILTER_DEFAULT = 0xFFFFFFFF
XATTR_VALUE_MAX = 0xFFFF
XATTR_SHARED_MAX = 255

Z_COMPRESSION_ZSTD = 3
Z_ZSTD_WINDOW_BITS = 20  # no frame may need a window above 1 MiB
Z_ADVISE_BIG_PCLUSTER_1 = 0x2
Z_ADVISE_FRAGMENT_PCLUSTER = 0x20
Z_LI_PARTIAL_REF = 0x8000
Z_LCLUSTER_HEAD1 = 1
Z_LCLUSTER_NONHEAD = 2
Z_LI_D0_CBLKCNT = 0x800
Z_FRAGMENT_WHOLE = 1 << 63  # in the map header: the whole file lies in the packed inode
Z_INDEX_OFFSET = 16  # map header and 8 reserved bytes, from the 8-aligned end of inode and xattrs

Z_LCLUSTER_BITS_MAX = 4  # records that each cover up to 64 KiB, the reach of a 16-bit clusterofs

DEVICE_SLOT_SIZE = 128
DEVICE_SLOTS_MAX = 8192  # their table ends within 1 MiB, so that the root inode's nid fits 16 bits

SUPER = Struct("<IIIBBHQqIIII16s16sIHHHBBIQBBHIQQ")
INODE_COMPACT = Struct("<HHHHIIIIHHI")
INODE_EXTENDED = Struct("<HHHHQIIIIqII16x")
DIRENT = Struct("<QHBB")
DEVICE_SLOT = Struct("<64sIIHH52x")
XATTR_IBODY_HEADER = Struct("<IB7x")
XATTR_ENTRY = Struct("<BBH")
XATTR_LONG_PREFIX = Struct("<HBx")  # length of base index and infix; the infix is empty
CHUNK_INDEX = Struct("<HHI")  # blkaddr_hi, device_id, blkaddr_lo
Z_MAP_HEADER = Struct("<IHBB")  # fragmentoff, advise, algorithmtype, clusterbits
Z_LCLUSTER_INDEX = Struct("<HHI")  # advise, clusterofs, blkaddr
Z_LCLUSTER_NONHEAD_INDEX = Struct("<HHHH")  # advise, clusterofs, delta[0], delta[1]
Z_ZSTD_CFGS = Struct("<HBB4x")  # size 6; then format, windowlog - 10


class Superblock(NamedTuple):
    """The 128 bytes at offset 1024."""

    magic: int
    checksum: int
    feature_compat: int
    blkszbits: int
    sb_extslots: int
    rootnid: int
    inos: int
    epoch: int
    fixed_nsec: int
    blocks: int
    meta_blkaddr: int
    xattr_blkaddr: int
    uuid: bytes
    volume_name: bytes
    feature_incompat: int
    available_compr_algs: int
    extra_devices: int
    devt_slotoff: int
    dirblkbits: int
    xattr_prefix_count: int
    xattr_prefix_start: int
    packed_nid: int
    xattr_filter_reserved: int
    ishare_xattr_prefix_id: int
    reserved: int
    build_time: int
    rootnid_8b: int
    reserved2: int

    def pack(self) -> bytes:
        return SUPER.pack(*self)

    @classmethod
    def unpack_from(cls, data: bytes | memoryview, offset: int = SUPER_OFFSET) -> Superblock:
        return cls._make(SUPER.unpack_from(data, offset))


def blocks_of(size: int) -> int:
    """How many blocks `size` bytes take."""
    return (size + BLOCK - 1) >> BLOCK_BITS


def encode_rdev(major: int, minor: int) -> int:
    """A device number as i_u holds it (the kernel's new_encode_dev)."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_rdev(value: int) -> tuple[int, int]:
    """(major, minor) of an i_u device number."""
    return (value >> 8) & 0xFFF, (value & 0xFF) | ((value >> 12) & 0xFFF00)
