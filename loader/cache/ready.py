"""Ready bitmaps: which frames of a cache file are there and verified.

    0   magic         8  b"EROFSRM\\x02"
    8   boot id      16  the boot in which `ready` was written
    24  frame count   4
    28  reserved      4
    32  table        32  identity of the frame table by which the frames were verified
    64  bits             frame n is bit n % 8 of byte n // 8

Bits of another frame table count for nothing: its author may have said of a blob what he liked.

`ready` is mapped into memory to be read. Within one boot the page cache holds both it and the data file, so it is right
whatever process was killed, in whatever moment; unless the disk does not take what it is given (NotTakenError). It is
changed by writes: where a file system copies on write, there may be no room for a byte that changes; a write says so, a
store into a map would end the process. After a reboot only what was synced counts: `synced` is a copy that is written
after an fdatasync of the data file, and `ready` starts again from it. (A clean stop syncs, so nothing is lost.)
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from loader.cache.layout import replace_file

_HEADER = struct.Struct("<8s16sI4x32s")
HEADER_SIZE = _HEADER.size
_MAGIC = b"EROFSRM\x02"


def boot_id() -> bytes:
    """This boot's identity, 16 bytes."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


class NotTakenError(OSError):
    """The disk did not take what was written. The kernel says that once: the next sync finds nothing wrong."""


class ReadyMap:
    """One cache file's bits. Thread-safe; a bit is set by whoever wrote the frame's bytes, after they are written."""

    def __init__(self, directory: Path, frames: int, tmp: Path, boot: bytes | None = None, *, table: bytes) -> None:
        """`table` is the frame table's identity."""
        self.frames = frames
        self._table = table
        self._directory = directory
        self._tmp = tmp
        self._lock = threading.Lock()
        self._syncing = threading.Lock()  # held while `synced` is replaced, so that no older one comes last
        self._boot = boot or boot_id()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        synced = self._read("synced", None) or bytes((frames + 7) // 8)
        bits = self._read("ready", self._boot)
        if bits is None:
            bits = synced
            replace_file(directory / "ready", self._encoded(bits), tmp, durable=False)
        self._fd = os.open(directory / "ready", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._map: mmap.mmap | bytes = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._count = sum(byte.bit_count() for byte in bits)
        self._dirty = bits != synced  # bits were set since the last checkpoint, be it by a process that was killed
        self._changes = 0  # bits that were set
        self._disowned = set[int]()  # frames whose bits stand, and count for nothing

    def __getitem__(self, frame: int) -> bool:
        stands = self._map[HEADER_SIZE + (frame >> 3)] >> (frame & 7) & 1
        return bool(stands) and not (self._disowned and frame in self._disowned)

    @property
    def count(self) -> int:
        """How many frames are ready."""
        return self._count

    @property
    def complete(self) -> bool:
        return self._count == self.frames

    @property
    def dirty(self) -> bool:
        """Whether frames became ready since the last checkpoint."""
        return self._dirty

    def runs(self) -> Iterator[tuple[int, int]]:
        """The first and last frame of each unbroken run of ready ones."""
        first = None
        for frame in range(self.frames):
            if self[frame]:
                first = frame if first is None else first
            elif first is not None:
                yield first, frame - 1
                first = None
        if first is not None:
            yield first, self.frames - 1

    def set(self, frame: int) -> None:
        """The frame's bytes are in the data file. OSError: there is no room to say so, and it does not count."""
        position, bit = HEADER_SIZE + (frame >> 3), 1 << (frame & 7)
        with self._lock:
            byte = self._map[position]
            if not self[frame] and not self._closed:
                os.pwrite(self._fd, bytes((byte | bit,)), position)
                self._disowned.discard(frame)
                self._count += 1
                self._changes += 1
                self._dirty = True

    def clear(self, frames: Iterable[int]) -> None:
        """The frames' bytes are about to go away. Durable before this returns, so that they may go."""
        with self._syncing:
            with self._lock:
                if self._closed:
                    return
                for frame in frames:
                    position, bit = HEADER_SIZE + (frame >> 3), 1 << (frame & 7)
                    byte = self._map[position]
                    if byte & bit:
                        os.pwrite(self._fd, bytes((byte & ~bit,)), position)
                        self._count -= frame not in self._disowned
                        self._disowned.discard(frame)
                kept = self._map[HEADER_SIZE:]
            synced = self._read("synced", None)
            if synced is not None:
                remaining = bytes(old & new for old, new in zip(synced, kept, strict=True))
                if remaining != synced:
                    self._clear_synced(remaining)

    def _clear_synced(self, bits: bytes) -> None:
        """In place, for a full disk has no room for another file. Torn by a crash, it is right too: old bits are of
        frames that have not gone yet."""
        with (self._directory / "synced").open("r+b") as stream:
            stream.seek(HEADER_SIZE)
            stream.write(bits)
            stream.flush()
            os.fdatasync(stream.fileno())

    def checkpoint(self, data: int | None) -> None:
        """Sync the data file (a descriptor) and record which of its frames will survive a crash. NotTakenError: the
        disk did not take what is new."""
        with self._syncing:
            with self._lock:
                if self._closed:
                    return
                bits, changes = self._bits(), self._changes
            if data is not None:
                _sync(data)
            replace_file(self._directory / "synced", self._encoded(bits), self._tmp)
            with self._lock:
                self._dirty = changes != self._changes

    def unsynced(self) -> list[int]:
        """Frames that are ready and would not survive a crash."""
        with self._syncing:
            with self._lock:
                bits = self._bits()
            try:
                synced = self._read("synced", None) or bytes(len(bits))
            except OSError:
                synced = bytes(len(bits))
        return [frame for frame in range(self.frames) if bits[frame >> 3] & ~synced[frame >> 3] & 1 << (frame & 7)]

    def disown(self, frames: Iterable[int]) -> None:
        """The frames' bytes are lost, which were never synced. Bits that cannot be cleared count for nothing while this
        is open."""
        with self._lock:
            for frame in [frame for frame in frames if self[frame] and not self._closed]:
                position, bit = HEADER_SIZE + (frame >> 3), 1 << (frame & 7)
                self._count -= 1
                try:
                    os.pwrite(self._fd, bytes((self._map[position] & ~bit,)), position)
                except OSError:
                    self._disowned.add(frame)

    def _bits(self) -> bytes:
        """Those that count."""
        bits = bytearray(self._map[HEADER_SIZE:])
        for frame in self._disowned:
            bits[frame >> 3] &= ~(1 << (frame & 7))
        return bytes(bits)

    def close(self) -> None:
        """Give the file back. Who still holds the map sees what was ready, and changes nothing any more."""
        with self._syncing, self._lock:
            mapped, self._map = self._map, bytes(self._map)
        if isinstance(mapped, mmap.mmap):
            mapped.close()
            os.close(self._fd)

    @property
    def _closed(self) -> bool:
        return isinstance(self._map, bytes)

    def _encoded(self, bits: bytes) -> bytes:
        return _HEADER.pack(_MAGIC, self._boot, self.frames, self._table) + bits

    def _read(self, name: str, boot: bytes | None) -> bytes | None:
        """The bits of a file, or None if it is not there, of another boot (where that matters), or damaged."""
        try:
            data = (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None
        if len(data) != HEADER_SIZE + (self.frames + 7) // 8:
            return None
        magic, written_in, frames, table = _HEADER.unpack_from(data)
        if magic != _MAGIC or (frames, table) != (self.frames, self._table):
            return None
        if boot is not None and written_in != boot:
            return None
        bits = data[HEADER_SIZE:]
        if self.frames % 8 and bits[-1] >> (self.frames % 8):
            return None
        return bits


def _sync(data: int) -> None:
    try:
        os.fdatasync(data)
    except OSError as error:
        raise NotTakenError(error.errno, error.strerror) from None
