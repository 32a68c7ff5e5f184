"""One frame of zeros, kept in the metadata: the encoded form's holes are read from it, so they need no fetching.

The classic full index has no holes of its own. A hole of up to 2,047 blocks is a (partial) reference to this frame,
which takes one block: RLE blocks of 128 KiB.
"""

from __future__ import annotations

from functools import lru_cache
from struct import pack

from erofs_builder.erofs.layout import BLOCK

ZERO_FRAME_BLOCKS = 2047  # as many as the index can express
_CONTENT_SIZE = ZERO_FRAME_BLOCKS * BLOCK
_CONTENT_XXH64_LOW = 0x7EC624CB  # the low 32 bits of XXH64 over that many zeros
_RLE_BLOCK = 128 * 1024


@lru_cache(maxsize=1)
def zero_frame() -> bytes:
    """A zstd frame that decodes to 2,047 blocks of zeros, padded to one block by a skippable frame."""
    # Frame header: checksum flag, 4-byte content size, window descriptor 1 MiB.
    parts = [pack("<IBBI", 0xFD2FB528, 0x84, (20 - 10) << 3, _CONTENT_SIZE)]
    for start in range(0, _CONTENT_SIZE, _RLE_BLOCK):
        size = min(_RLE_BLOCK, _CONTENT_SIZE - start)
        last = start + size == _CONTENT_SIZE
        parts.append(pack("<I", last | 1 << 1 | size << 3)[:3] + b"\0")
    parts.append(pack("<I", _CONTENT_XXH64_LOW))
    frame = b"".join(parts)
    padding = BLOCK - len(frame) - 8
    return frame + pack("<II", 0x184D2A50, padding) + bytes(padding)
