"""A layer's compression: told by its first bytes, read in bounded steps, refused when cut off or damaged."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
from collections.abc import Callable

import pytest
import zstandard

from erofs_builder import decompress
from erofs_builder.decompress import CHUNK, plain_chunks
from erofs_builder.errors import TarError

PLAIN = random.Random(1).randbytes(300_000) + bytes(5 << 20) + b"tail" * 1000


class Dribble:
    """A stream that gives a few bytes at a time, like a socket."""

    def __init__(self, data: bytes, step: int) -> None:
        self._inner = io.BytesIO(data)
        self._step = step

    def read(self, size: int, /) -> bytes:
        return self._inner.read(min(size, self._step))


def program(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


def members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[at : at + 700_000]) for at in range(0, len(data), 700_000))


def frames_and_skippables(data: bytes) -> bytes:
    skippable = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    parts = [skippable + compressor.compress(data[at : at + 700_000]) for at in range(0, len(data), 700_000)]
    return b"".join(parts) + skippable


COMPRESSIONS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip program": program("gzip", "-1c"),
    "gzip members": members,
    "gzip padded with zeros": lambda data: gzip.compress(data) + bytes(5000),
    "zstd": zstandard.compress,
    "zstd program": program("zstd", "-cq", "-T1"),
    "zstd long": program("zstd", "-cq", "--long=27", "-1"),
    "zstd frames": frames_and_skippables,
}


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS.keys())
@pytest.mark.parametrize("step", [1 << 30, 977, 1])
@pytest.mark.parametrize("inflate", ["isal", "zlib"])
def test_round_trip(
    compress: Callable[[bytes], bytes], step: int, inflate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if inflate == "zlib":
        monkeypatch.setattr(decompress, "_new_inflater", decompress._ZlibInflater)
    data = PLAIN if step > 1 else PLAIN[299_000:400_000]
    stream = Dribble(compress(data), step)
    chunks = list(plain_chunks(stream))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= max(CHUNK, 1 << 20)
    assert stream.read(1) == b""


@pytest.mark.parametrize("inflate", ["isal", "zlib"])
@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if name not in ("plain", "gzip padded with zeros")])
def test_cut_off(name: str, inflate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if inflate == "zlib":
        monkeypatch.setattr(decompress, "_new_inflater", decompress._ZlibInflater)
    data = COMPRESSIONS[name](PLAIN[200_000:400_000])
    for missing in (1, 2, 5, 9, 1000, len(data) - 20, len(data) - 6):
        if name == "zstd frames" and missing == 11:
            continue
        with pytest.raises(TarError, match="cut off"):
            list(plain_chunks(io.BytesIO(data[:-missing])))


@pytest.mark.parametrize("inflate", ["isal", "zlib"])
@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"x" * 1000) + b"trailing",
        gzip.compress(b"x" * 1000)[:-8] + bytes(8),
        b"\x1f\x8b\x08\0" + b"\xff" * 100,
        zstandard.compress(b"x" * 1000) + b"trailing",
        zstandard.ZstdCompressor(write_checksum=True).compress(b"x" * 1000)[:-4] + bytes(4),
        b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
    ],
    ids=["gzip trailer", "gzip crc", "gzip noise", "zstd trailer", "zstd checksum", "zstd noise"],
)
def test_damage(data: bytes, inflate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if inflate == "zlib":
        monkeypatch.setattr(decompress, "_new_inflater", decompress._ZlibInflater)
    with pytest.raises(TarError, match="gzip|zstd"):
        list(plain_chunks(io.BytesIO(data)))


def test_a_window_of_2_gib_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(TarError, match="zstd"):
        list(plain_chunks(io.BytesIO(compressor.compress(b"x") + compressor.flush())))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_bomb_comes_in_bounded_pieces(compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(bytes(64 << 20))
    chunks = plain_chunks(io.BytesIO(bomb))
    assert max(len(chunk) for chunk in chunks) <= CHUNK
