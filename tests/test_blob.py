"""The blob writer: what it writes is a zstd stream of aligned frames, the same whatever the threads do."""

from __future__ import annotations

import io
import os
import random
import subprocess
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder.blob import HARD_LEVEL, MAX_FRAME, BlobWriter, padding_for
from erofs_builder.digest import Digest
from erofs_builder.frames import BLOCK, FrameTable
from tests.support.nodes import zstd_decode


def contents(seed: int, count: int) -> list[bytes]:
    """Frames of text-like, zero and incompressible bytes in various sizes."""
    source = random.Random(seed)
    words = [source.randbytes(source.randrange(2, 9)) for _ in range(300)]
    frames = []
    for index in range(count):
        size = source.randrange(1, 40) * BLOCK
        if index % 5 == 0:
            frames.append(source.randbytes(size))
        elif index % 7 == 0:
            frames.append(bytes(size))
        else:
            frames.append(b"".join(source.choices(words, k=size // 4))[:size].ljust(size, b"\0"))
    return frames


def write(frames: list[bytes], *, threads: int = 2, level: int = 3, hard: int = 0) -> tuple[bytes, FrameTable]:
    out = io.BytesIO()
    with BlobWriter(out, threads=threads, level=level, hard=hard) as writer:
        assert [writer.add(frame) for frame in frames] == list(range(len(frames)))
        table = writer.finish()
    return out.getvalue(), table


def test_the_zstd_program_decodes_a_blob(tmp_path: Path) -> None:
    frames = contents(1, 200)
    blob, _ = write(frames)
    path = tmp_path / "blob"
    path.write_bytes(blob)
    subprocess.run(["zstd", "-tq", str(path)], check=True)
    assert zstd_decode(blob) == b"".join(frames)


def test_the_first_bytes_can_be_compressed_harder() -> None:
    frames = contents(4, 40)
    easy, easy_table = write(frames)
    hard, hard_table = write(frames, level=HARD_LEVEL)
    size = sum(map(len, frames[:20]))
    mixed, table = write(frames, hard=size)
    assert mixed[: hard_table[20].encoded_offset] == hard[: hard_table[20].encoded_offset]
    assert mixed[table[20].encoded_offset :] == easy[easy_table[20].encoded_offset :]
    assert write(frames, hard=1 << 30)[0] == hard
    assert write(frames, hard=size, threads=1)[0] == mixed


def test_the_table_describes_the_blob() -> None:
    frames = contents(2, 60)
    blob, table = write(frames)
    assert table.blob_digest == Digest.of(blob)
    assert table.blob_size == len(blob)
    assert FrameTable.decode(table.encode()).encode() == table.encode()
    for frame, content in zip(table, frames, strict=True):
        encoded = blob[frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        assert Digest.of(encoded).raw == frame.digest
        parameters = zstandard.get_frame_parameters(encoded)
        assert parameters.content_size == len(content) == frame.decoded_size
        assert parameters.has_checksum
        assert parameters.window_size <= 1 << 20
        assert zstandard.ZstdDecompressor().decompress(encoded) == content


def test_bytes_do_not_depend_on_threads_or_neighbours() -> None:
    frames = contents(3, 300)
    blobs = {write(frames, threads=threads)[0] for threads in (1, 2, 5)}
    assert len(blobs) == 1
    blob, table = write(frames)
    reversed_blob, reversed_table = write(frames[::-1])
    for frame in table:
        other = reversed_table[len(frames) - 1 - frame.number]
        assert (
            blob[frame.encoded_offset :][: frame.encoded_size]
            == reversed_blob[other.encoded_offset :][: other.encoded_size]
        )


def test_incompressible_frames_of_the_largest_size_fit() -> None:
    blob, table = write([os.urandom(MAX_FRAME)])
    assert table[0].encoded_size > table[0].decoded_size
    assert zstd_decode(blob)


@given(st.integers(1, 3 * BLOCK))
def test_padding(length: int) -> None:
    padding = padding_for(length)
    assert (length + len(padding)) % BLOCK == 0
    assert len(padding) < BLOCK + 8
    if padding:
        assert padding[:4] == b"\x50\x2a\x4d\x18"
        assert int.from_bytes(padding[4:8], "little") == len(padding) - 8


@pytest.mark.parametrize("size", [0, 1, BLOCK + 1, MAX_FRAME + BLOCK])
def test_sizes_that_no_frame_has(size: int) -> None:
    with BlobWriter(io.BytesIO()) as writer, pytest.raises(ValueError, match="cannot hold"):
        writer.add(bytes(size))


class Full:
    """A disk without space."""

    def write(self, data: bytes, /) -> int:
        raise OSError(28, "No space left on device")


def test_an_error_of_the_output_ends_the_writer() -> None:
    with pytest.raises(OSError, match="No space"), BlobWriter(Full()) as writer:
        for frame in contents(4, 300):
            writer.add(frame)
        writer.finish()


class Trickle:
    """An unbuffered file that takes a part of each write."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes, /) -> int:
        self.data += bytes(data[:70_001])
        return min(len(data), 70_001)


def test_short_writes_are_continued() -> None:
    frames = contents(5, 30)
    out = Trickle()
    with BlobWriter(out) as writer:
        for frame in frames:
            writer.add(frame)
        table = writer.finish()
    assert Digest.of(out.data) == table.blob_digest
