"""A layer as the registry holds it → plain tar bytes. Its first bytes say what it is, never a media type."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, Protocol, cast

import zstandard

from erofs_builder.errors import TarError

CHUNK = 1 << 20
_FIRST_STEP = 4096
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = 0x184D2A50  # and the 15 after it
# A decoder allocates the window that a frame declares: bound it. Every level, and `--long=27`, stay below.
_ZSTD_WINDOW_LIMIT = 1 << 27


class Stream(Protocol):
    """Where a layer comes from; `read(n)` gives 1 to n bytes, or none at the end."""

    def read(self, size: int, /) -> bytes: ...


class _Inflater(Protocol):
    """One gzip member, decoded in bounded steps (the interface of bz2.BZ2Decompressor)."""

    needs_input: bool
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def plain_chunks(stream: Stream) -> Iterator[bytes]:
    """The stream's plain bytes in pieces of at most 1 MiB; the stream is read to its very end.

    gzip (any number of members), zstd (any number of frames) and plain bytes are told apart by their magic. TarError
    names the compression and the compressed offset when the stream is malformed or cut off.
    """
    head = b""
    while len(head) < 4 and (more := stream.read(CHUNK)):
        head += more
    if not is_compressed(head):
        return _plain(head, stream)
    return (_gunzip if head[:2] == _GZIP_MAGIC else _unzstd)(head, stream)


def is_compressed(head: bytes) -> bool:
    """Whether a stream that begins with these bytes (4, unless it is shorter) is not taken for plain."""
    magic = int.from_bytes(head[:4], "little")
    return head[:2] == _GZIP_MAGIC or magic == _ZSTD_MAGIC or magic & ~15 == _SKIPPABLE_MAGIC


def _plain(head: bytes, stream: Stream) -> Iterator[bytes]:
    while head:
        yield head
        head = stream.read(CHUNK)


class _Feed:
    """A stream in pieces of any size, with a way to give back what was not used."""

    def __init__(self, head: bytes, stream: Stream) -> None:
        self._stream = stream
        self._views = [memoryview(head)]  # the last one is next
        self.offset = len(head)  # of the stream below

    def take(self, size: int) -> bytes:
        """1 to `size` bytes, none at the end."""
        while self._views:
            view = self._views.pop()
            if len(view) > size:
                self._views.append(view[size:])
            if view:
                return bytes(view[:size])
        data = self._stream.read(CHUNK)
        self.offset += len(data)
        if len(data) > size:
            self._views.append(memoryview(data)[size:])
        return data[:size]

    def give_back(self, data: bytes) -> None:
        self._views.append(memoryview(data))


def _gunzip(head: bytes, stream: Stream) -> Iterator[bytes]:
    feed = _Feed(head, stream)
    while _at_member(feed):
        member = _new_inflater()
        # A decoder copies what it is given and what it leaves: many tiny members in large pieces would take quadratic
        # time. So each member gets a little at first, and then ever more.
        step = _FIRST_STEP
        data = feed.take(step)
        while not member.eof:
            try:
                plain = member.decompress(data, CHUNK)
            except _INFLATE_ERRORS as error:
                raise TarError(f"gzip: {error} (before compressed offset {feed.offset})") from None
            if plain:
                yield plain
            data = b""
            if member.needs_input and not member.eof:
                step = min(2 * step, CHUNK)
                data = feed.take(step)
                if not data:
                    raise TarError(f"gzip: the stream is cut off at compressed offset {feed.offset}")
        feed.give_back(member.unused_data)


def _at_member(feed: _Feed) -> bool:
    """Whether another member follows, or the end. Zeros may pad the end, as gzip(1) allows."""
    while head := feed.take(2):
        if len(head) < 2:
            head += feed.take(1)
        if head == _GZIP_MAGIC:
            feed.give_back(head)
            return True
        if head.strip(b"\0"):
            raise TarError(f"gzip: other bytes behind the last member (before compressed offset {feed.offset})")
        _skip_zeros(feed)
    return False


def _skip_zeros(feed: _Feed) -> None:
    while data := feed.take(CHUNK):
        if rest := data.lstrip(b"\0"):
            feed.give_back(rest)
            return


class _ZlibInflater:
    """The standard library's zlib behind the `_Inflater` interface."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.needs_input = True
        self.eof = False
        self.unused_data = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.eof = self._decoder.eof
        self.unused_data = self._decoder.unused_data
        # A full output may leave more in the decoder even when it has taken all of its input.
        self.needs_input = not self._decoder.unconsumed_tail and len(plain) < max_length
        return plain


_INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error, EOFError)
try:
    from isal import igzip_lib
except ImportError:  # no wheel for this machine: the same bytes, at a third of the speed

    def _new_inflater() -> _Inflater:
        return _ZlibInflater()
else:
    _INFLATE_ERRORS = (*_INFLATE_ERRORS, cast(type[Exception], igzip_lib.error))

    def _new_inflater() -> _Inflater:
        decoder: _Inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return decoder


class _ZstdWalk:
    """Passes a zstd stream through and follows its frames and blocks, so that a cut-off end is noticed."""

    def __init__(self, head: bytes, stream: Stream) -> None:
        self._head = head
        self._stream = stream
        self._parse = self._magic
        self._need = 4
        self._pending = b""
        self._skip = 0
        self._checksum = 0
        self.offset = 0

    @property
    def complete(self) -> bool:
        """Whether the bytes so far end where a frame does."""
        return self._parse == self._magic and self._need == 4 and not self._pending and not self._skip

    def read(self, size: int = -1) -> bytes:
        data = self._head or self._stream.read(size)
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
        self.offset += len(data)
        self._follow(data)
        return data

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._need - len(self._pending), len(data) - at)
                self._pending += data[at : at + step]
                if len(self._pending) == self._need:
                    self._parse()
            at += step

    def _expect(self, parse: object, need: int, skip: int = 0) -> None:
        self._parse, self._need, self._skip, self._pending = parse, need, skip, b""  # type: ignore[assignment]

    def _magic(self) -> None:
        magic = int.from_bytes(self._pending[:4], "little")
        if magic & ~15 == _SKIPPABLE_MAGIC:
            if self._need < 8:
                self._need = 8
                return
            self._expect(self._magic, 4, int.from_bytes(self._pending[4:], "little"))
        elif self._need < 5:
            self._need = 5
        else:
            descriptor = self._pending[4]
            single = descriptor >> 5 & 1
            size_bytes = (single, 2, 4, 8)[descriptor >> 6]
            self._checksum = 4 if descriptor & 4 else 0
            self._expect(self._block, 3, (1 - single) + (0, 1, 2, 4)[descriptor & 3] + size_bytes)

    def _block(self) -> None:
        header = int.from_bytes(self._pending, "little")
        length = 1 if header >> 1 & 3 == 1 else header >> 3
        if header & 1:
            self._expect(self._magic, 4, length + self._checksum)
        else:
            self._expect(self._block, 3, length)


def _unzstd(head: bytes, stream: Stream) -> Iterator[bytes]:
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT)
    source = _ZstdWalk(head, stream)
    reader = context.stream_reader(cast(IO[bytes], source), read_size=1 << 17, read_across_frames=True, closefd=False)
    while True:
        try:
            plain = reader.read(CHUNK)
        except zstandard.ZstdError as error:
            raise TarError(f"zstd: {error} (before compressed offset {source.offset})") from None
        if not plain:
            break
        yield plain
    if not source.complete:
        raise TarError(f"zstd: the stream is cut off at compressed offset {source.offset}")
