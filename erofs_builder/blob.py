"""Data blob: frames in, compressed, padded, hashed and written in order, on several cores.

Bytes depend on the frames' content, the level and the zstd version alone: each frame is compressed by itself, whatever
thread takes it and whatever came before it there.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple, Protocol, cast

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.frames import BLOCK, MAX_DECODED_BLOCKS, MAX_ENCODED_BLOCKS, FrameTable
from erofs_builder.hot import Sha256

DEFAULT_LEVEL = 3
HARD_LEVEL = 19
WINDOW_LOG = 20  # the kernel refuses frames that need a window above 1 MiB
# A frame that does not compress is stored a few bytes longer than it is, and must still fit 1 MiB.
MAX_FRAME = (MAX_ENCODED_BLOCKS - 1) * BLOCK - BLOCK
_BATCH = 2 << 20  # decoded bytes that one thread takes at a time
_HARD_WEIGHT = 8  # fewer where they take long
_SKIPPABLE_MAGIC = b"\x50\x2a\x4d\x18"
_SKIPPABLE_HEADER = 8

Buffer = bytes | bytearray | memoryview
_Setting = tuple[int, bool]  # level, prose
_Frame = tuple[_Setting, Buffer]


class Output(Protocol):
    """Where the blob goes; called in order, from the thread that adds frames."""

    def write(self, data: bytes, /) -> object: ...


class _Encoded(NamedTuple):
    data: bytes
    blocks: list[int]  # that each frame takes


def padding_for(length: int) -> bytes:
    """The skippable frame that brings `length` encoded bytes to a multiple of 4 KiB (none if they are one)."""
    gap = -length % BLOCK
    if gap == 0:
        return b""
    if gap < _SKIPPABLE_HEADER:
        gap += BLOCK
    body = gap - _SKIPPABLE_HEADER
    return _SKIPPABLE_MAGIC + body.to_bytes(4, "little") + bytes(body)


class BlobWriter:
    """Takes frames' contents in order and streams the blob to `out`. A context manager: leaving it ends its threads.

    `pool` has the `threads` that compress, where several writers share them.

    The first `hard` bytes of content, or about as many, are compressed at HARD_LEVEL, which takes ten times as long.
    `add` returns a frame's number at once; the frame is written some batches later. Nothing but those batches is
    held in memory.
    """

    def __init__(
        self,
        out: Output,
        *,
        level: int = DEFAULT_LEVEL,
        threads: int = 2,
        hard: int = 0,
        pool: Executor | None = None,
    ) -> None:
        self._out = out
        self._pool = pool or ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._shared = pool is not None
        self._idle: defaultdict[_Setting, list[zstandard.ZstdCompressor]] = defaultdict(list)
        self._level = level
        self._hard = hard
        self._limit = threads + 2
        self._pending: deque[Future[_Encoded]] = deque()
        self._batch: list[_Frame] = []
        self._batch_size = 0
        self._hash = Sha256()
        self._encoded = array("H")
        self._decoded = array("H")
        self._digests = bytearray()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for pending in self._pending:
            pending.cancel()
        if not self._shared:
            self._pool.shutdown(wait=True)

    def __len__(self) -> int:
        return len(self._decoded)

    def add(self, content: Buffer, *, prose: bool = False) -> int:
        """Append a frame of a multiple of 4 KiB, at most MAX_FRAME; the buffer must not change afterwards.

        `prose` (kinds.Kind) chooses how it is compressed.
        """
        size = len(content)
        if size == 0 or size % BLOCK or size > min(MAX_FRAME, MAX_DECODED_BLOCKS * BLOCK):
            raise ValueError(f"a frame cannot hold {size} bytes")
        self._decoded.append(size // BLOCK)
        level = self._level
        if self._hard > 0:
            self._hard -= size
            level = HARD_LEVEL
        self._batch.append(((level, prose), content))
        self._batch_size += size if level != HARD_LEVEL else _HARD_WEIGHT * size
        if self._batch_size >= _BATCH:
            self._submit()
        return len(self._decoded) - 1

    def finish(self) -> FrameTable:
        """Write what is left; the table of all frames."""
        if self._batch:
            self._submit()
        while self._pending:
            self._collect()
        return FrameTable(Digest(self._hash.digest()), self._encoded, self._decoded, bytes(self._digests))

    def _submit(self) -> None:
        batch, self._batch, self._batch_size = self._batch, [], 0
        while len(self._pending) >= self._limit or (self._pending and self._pending[0].done()):
            self._collect()
        self._pending.append(self._pool.submit(self._work, batch))

    def _collect(self) -> None:
        encoded = self._pending.popleft().result()
        lengths = [blocks * BLOCK for blocks in encoded.blocks]
        places = list(zip(accumulate(lengths, initial=0), lengths, strict=False))
        self._digests += b"".join(self._hash.beside(encoded.data, encoded.data, places))
        self._write(encoded.data)
        self._encoded.extend(encoded.blocks)

    def _write(self, data: bytes) -> None:
        written = self._out.write(data)
        # An unbuffered file may take a part only.
        while isinstance(written, int) and written < len(data):
            data = data[written:]
            written = self._out.write(data)

    def _work(self, batch: list[_Frame]) -> _Encoded:
        parts: list[Buffer] = []
        lengths: list[int] = []
        for setting, frames in groupby(batch, key=itemgetter(0)):
            for encoded in self._compressed(setting, [content for _, content in frames]):
                padding = padding_for(len(encoded))
                parts += (encoded, padding)
                lengths.append(len(encoded) + len(padding))
        return _Encoded(b"".join(parts), [length // BLOCK for length in lengths])

    def _compressed(self, setting: _Setting, frames: list[Buffer]) -> Iterator[memoryview]:
        # A compressor serves one thread at a time; there are never more than threads.
        try:
            compressor = self._idle[setting].pop()
        except IndexError:
            compressor = new_compressor(setting[0], prose=setting[1])
        compressed = compressor.multi_compress_to_buffer(frames, threads=1)
        self._idle[setting].append(compressor)
        return (memoryview(cast(bytes, compressed[index])) for index in range(len(compressed)))


# Level 3 as libzstd has it is made for any length. For frames of some hundred KiB, tables that fit the second level of
# cache and matches of 4 bytes give 0.7 % smaller blobs in the same time (bench/frames.py's image); of prose, which has
# longer matches, they give larger ones.
_TUNED = {3: {"chain_log": 15, "hash_log": 16, "min_match": 4}}


def new_compressor(level: int = DEFAULT_LEVEL, *, prose: bool = False) -> zstandard.ZstdCompressor:
    """A compressor whose frames the kernel can decode: content size and checksum in, window at most 1 MiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        window_log=WINDOW_LOG,
        write_content_size=True,
        write_checksum=True,
        write_dict_id=False,
        **({} if prose else _TUNED.get(level, {})),
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
