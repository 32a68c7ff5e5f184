"""R5's distance to the possible: what compression and digests alone take, of the same bytes, on all processors."""

from __future__ import annotations

import gzip
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from erofs_builder.blob import new_compressor
from erofs_builder.decompress import plain_chunks

_SAMPLE = 96 << 20
_FRAME = 256 << 10


def alone(tar: Path, blobs: int, packed: int) -> dict[str, float]:
    """Seconds of the work that no builder of frames can leave out, nothing of it waiting for another part.

    Of plain layers (`plain`): every byte compressed and hashed twice (as a layer, as a piece), every byte of the blobs
    twice (as a frame, as a blob). Of gzip layers (`gzip`) also decompressed, and hashed as they are.
    """
    with open(tar, "rb") as file:
        sample = file.read(_SAMPLE)
    size, scale = tar.stat().st_size, tar.stat().st_size / len(sample)
    frames = [sample[at : at + _FRAME] for at in range(0, len(sample), _FRAME)]
    compressor = new_compressor()
    compressing = scale * _seconds(lambda: [compressor.compress(frame) for frame in frames])
    hashing = _seconds(lambda: hashlib.sha256(sample).digest()) / len(sample)
    small = gzip.compress(sample[: _SAMPLE // 8], 6)
    inflating = 8 * scale * _seconds(lambda: sum(map(len, plain_chunks(_Bytes(small)))))
    processors = os.cpu_count() or 1
    plain = compressing + hashing * 2 * (size + blobs)
    return {"plain": plain / processors, "gzip": (plain + inflating + hashing * packed) / processors}


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int, /) -> bytes:
        part, self._data = self._data[:size], self._data[size:]
        return part


def _seconds(work: Callable[[], object]) -> float:
    """The least of some runs."""
    taken = []
    for _ in range(3):
        begin = time.monotonic()
        work()
        taken.append(time.monotonic() - begin)
    return min(taken)
