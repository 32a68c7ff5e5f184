"""A file's fingerprint: what tells a kernel that two files of different images have the same bytes (docs/format.md).

Kernels that share page cache between images (7.0 and later) serve one file's readers with the other one's pages when
their fingerprints and sizes are equal, and look at nothing else. So a fingerprint is derived only from pieces that the
builder itself hashed: it is the start of the sha256 of

    "erofs-ondemand file\\n", then for each piece in the file's order le64 length and its sha256 (a hole: 32 zeros)

Its length is a choice against the worst case, somebody who makes both of two files that are not alike: he needs 2^96
hashes to make their fingerprints alike. 128 bits would leave 2^64, which money can buy; 256 would cost 8 bytes a file
more on the wire, and gain nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

SIZE = 24  # bytes
# Of a Debian image's 14,278 files 875 are so large. They hold 79 % of its bytes; their fingerprints are 1.3 bytes an
# inode on the wire, those of all files 20.
LARGE = 64 << 10
_TAG = b"erofs-ondemand file\n"
_HOLE = bytes(32)


def fingerprint(pieces: Iterable[tuple[int, bytes | None]]) -> bytes:
    """The fingerprint of a file of these (length, sha256) pieces, None for a hole; neighbouring holes are one piece."""
    whole = hashlib.sha256(_TAG)
    for length, digest in pieces:
        whole.update(length.to_bytes(8, "little") + (digest or _HOLE))
    return whole.digest()[:SIZE]
