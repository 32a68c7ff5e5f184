"""Which thread was let through last, and to which bytes: the proof that a cache file may lose some of them.

The kernel asks before it reads, and does not tell when it has read. But it reads in the thread that asked, before that
does anything else. So a read that was allowed has ended once its thread asks again or is no more, and until then the
bytes must stay: a container may be frozen between the answer and the read, for hours. A thread that went on to
something else holds on to the last bytes that it asked for; that is all it costs.

In a memfd, so that a keeper's SIGKILL does not lose it:

    slot    u64 thread (0: free), u64 object, u64 offset, u64 length
    slot 0  u64 0, u64 1 once a thread found no room, u64 1 + the highest slot ever used, u64 0
"""

from __future__ import annotations

import mmap
import os
import struct

CAPACITY = 65536
_SLOT = struct.Struct("=QQQQ")
_PURGE = 1024  # threads, at least, before those that are gone are looked for
SIZE = CAPACITY * _SLOT.size


class Readers:
    """A view of the table in a memfd, which `fd` names and the caller keeps."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != SIZE:
            raise ValueError(f"table of readers of {os.fstat(fd).st_size} bytes, expected {SIZE}")
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._slots: dict[int, int] = {}  # by thread
        self._free: list[int] = []
        _, self._lost, high, _ = _SLOT.unpack_from(self._map)
        self._next = min(max(int(high), 1), CAPACITY)
        for slot in range(1, self._next):
            thread, *_ = _SLOT.unpack_from(self._map, slot * _SLOT.size)
            if thread:
                self._slots[thread] = slot
            else:
                self._free.append(slot)
        self._purge_at = max(_PURGE, 2 * len(self._slots))

    @classmethod
    def create(cls) -> Readers:
        fd = os.memfd_create("erofs-loader-readers", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @property
    def lost(self) -> bool:
        """Whether there were more threads than can be known: nobody can tell any more what is being read."""
        return bool(self._lost)

    @property
    def memory(self) -> mmap.mmap:
        """The table as it lies in memory. Who knows a thread's slot may write there what it reads."""
        return self._map

    def let_through(self, thread: int, object_id: int, offset: int, length: int) -> int:
        """A thread is about to be allowed to read. Its read before has ended, since it has asked again.

        The thread's slot, or 0: it has none.
        """
        if self._lost:
            return 0
        slot = self._slots.get(thread) or (self._take_slot() if thread > 0 else 0)
        if not slot:  # or it is a thread outside of our PID namespace, which has no number here
            self._lost = 1
            self._save_header()
            return 0
        _SLOT.pack_into(self._map, slot * _SLOT.size, thread, object_id, offset, length)
        self._slots[thread] = slot
        return slot

    def last(self, thread: int) -> tuple[int, int, int] | None:
        """Object, offset and length of what a thread was let through to last."""
        slot = self._slots.get(thread)
        if slot is None:
            return None
        _, object_id, offset, length = _SLOT.unpack_from(self._map, slot * _SLOT.size)
        return object_id, offset, length

    def reading(self, object_id: int) -> list[tuple[int, int]]:
        """Start and end of what threads may be reading of an object right now."""
        found = []
        for thread, slot in list(self._slots.items()):
            _, read_object, offset, length = _SLOT.unpack_from(self._map, slot * _SLOT.size)
            if read_object == object_id:
                if _lives(thread):
                    found.append((offset, offset + length))
                else:
                    self._forget(thread)
        return found

    def _take_slot(self) -> int:
        """A free slot; 0 if there is none."""
        if not self._free and len(self._slots) >= min(self._purge_at, CAPACITY - 1):
            for thread in [thread for thread in self._slots if not _lives(thread)]:
                self._forget(thread)
            self._purge_at = max(_PURGE, 2 * len(self._slots))
        if self._free:
            return self._free.pop()
        if self._next == CAPACITY:
            return 0
        self._next += 1
        self._save_header()
        return self._next - 1

    def _forget(self, thread: int) -> None:
        slot = self._slots.pop(thread)
        _SLOT.pack_into(self._map, slot * _SLOT.size, 0, 0, 0, 0)
        self._free.append(slot)

    def _save_header(self) -> None:
        _SLOT.pack_into(self._map, 0, 0, self._lost, self._next, 0)

    def close(self) -> None:
        self._map.close()


def _lives(thread: int) -> bool:
    try:
        os.kill(thread, 0)  # takes the numbers of threads too
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
