"""The fanotify plane of the keeper: the group, the writers and marks of cache files, and the events.

Two rules keep it from failing open. A writer is opened before its mark, and the mark is there before anything mounts
the file. And an event is allowed only when the file really has the bytes: data in it is verified data, so a hole in
the range that was asked for is an error whatever the worker said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import fanotify
from loader.keeper.bounds import open_below
from loader.keeper.events import Events, Seen
from loader.keeper.fdstore import FdStore
from loader.keeper.journal import CAPACITY, Entry, Journal
from loader.keeper.presence import Presence, create
from loader.keeper.readers import Readers
from loader.keeper.requests import Pending, Present, Repeats, RequestTable
from loader.keeper.state import Object, State

log = logging.getLogger(__name__)
GROUP = "group"
JOURNAL = "journal"
READERS = "readers"
# Events that were read, but not yet in the journal when the last keeper died, came in one read(2) and took the lowest
# free numbers: below the count of what was open. Next to journaled events that is so much for each object (its writer,
# its bitmap's map, a bitmap on its way to the worker), and less than so much for all else.
_OPEN_OF_OBJECT = 3
_OPEN_ELSE = 4096


class FanotifyPlane:
    """See the module. `fds` are descriptors handed down; those that belong to this plane are taken out of it."""

    name = "fanotify"

    def __init__(self, store: FdStore, state: State, requests: RequestTable, fds: dict[str, int]) -> None:
        self._store, self._state, self._requests = store, state, requests
        self.counters = {"events": 0, "present": 0, "allowed": 0, "denied": 0, "holes": 0, "orphans": 0}
        self.writers: dict[int, int] = {}
        self._presence: dict[int, Presence] = {}
        self._by_inode: dict[tuple[int, int], int] = {}
        self.fencing = False  # allow truncations: our own
        took_over = GROUP in fds and JOURNAL in fds
        if took_over:
            self.group, self._journal = fds.pop(GROUP), Journal(fds.pop(JOURNAL))
            self._deny_unjournaled()
        else:
            self._drop_halves(fds)
            self.group, self._journal = fanotify.init(), Journal.create()
            store.store(GROUP, self.group)
            store.store(JOURNAL, self._journal.fd)
        known = took_over and READERS in fds
        self._readers = Readers(fds.pop(READERS)) if known else Readers.create()
        if not known:
            store.store(READERS, self._readers.fd)
        self._events = Events(self.group, self._journal.memory, self._readers.memory)
        for item in list(state.objects.values()):
            item.readers_unknown |= not known
            self._reattach(item, fds)
        if took_over:
            self._adopt_journaled()

    def fileno(self) -> int:
        return self.group

    def handed_down(self) -> dict[str, int]:
        """What another keeper needs to go on, by the names it looks for."""
        own = {GROUP: self.group, JOURNAL: self._journal.fd, READERS: self._readers.fd}
        return own | self._state.writers_by_name(self.writers)

    # Objects

    def create(self, name: str, path: str, form: str, size: int) -> Object:
        """Open the writer of a cache file, then mark it. The same path again gives the same object."""
        for item in self._state.objects.values():
            if item.path == path and self._is_file(item):
                if fcntl.fcntl(self.writers[item.id], fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                    raise OSError(errno.EROFS, "could not be fenced: remove it first", path)
                item.released = False
                self._show(item)
                if item.complete:
                    self.mark(item.id)
                return item
        writer = open_below(self._state.path.parent / "blobs", path, os.O_RDWR)
        if not 0 <= size <= os.fstat(writer).st_size:  # else what is recorded fits into no bitmap, with any worker
            os.close(writer)
            raise OSError(errno.EINVAL, f"frames of {size} bytes do not fit", path)
        item = self._state.new_object(self.name, name=name, path=path, form=form, size=size)
        try:
            self._store.store(item.store_name, writer)
            self._state.save_added([item])
            fanotify.mark_fd(self.group, writer)
        except BaseException:
            os.close(writer)
            del self._state.objects[item.id]
            self._store.discard(item.store_name)
            self._state.save()
            raise
        self._attach(item, writer)
        return item

    def lend(self, object_id: int) -> int | None:
        """A descriptor of the bitmap in which the next worker will say what is there; None if there is no room."""
        item = self._state.objects[object_id]
        try:
            fd = create(item.size)
            try:
                self._presence[object_id] = Presence(fd)
            except BaseException:
                os.close(fd)
                raise
        except (OSError, ValueError, OverflowError) as error:
            log.error("object %d: no bitmap: %s", object_id, error)
            self._presence.pop(object_id, None)
            fd = None
        self._show(item)
        return fd

    def mark(self, object_id: int) -> None:
        item, writer = self._lookup(object_id)
        fanotify.mark_fd(self.group, writer)
        item.readers_unknown |= item.complete  # while it had no mark they did not ask
        item.complete = False
        self._state.save()

    def complete(self, object_id: int) -> None:
        """Remove the mark of a file that is whole. EINVAL when it has a hole."""
        item, writer = self._lookup(object_id)
        if has_hole(writer, 0, item.size):
            raise OSError(errno.EINVAL, "the file has holes", item.path)
        item.complete = True
        self._state.save()
        self._unmark(writer)

    def release(self, object_id: int) -> None:
        item, writer = self._lookup(object_id)
        users = [record.target for record in self._state.mounts.values() if object_id in record.objects]
        if users:
            raise OSError(errno.EBUSY, f"mounted at {', '.join(users)}", item.path)
        if item.mounted and item.holes_read_as_zeros:
            item.released = True  # a mount that went lazily may still read it: its holes stay errors
            self._show(item)
            self._state.save()
        else:
            self._unmark(writer)
            self._forget(item, writer)

    def guards(self, name: str) -> bool:
        """Whether an object of this name was released, but is still marked."""
        return any(item.released and item.name == name for item in self._state.objects.values())

    def idle(self, object_id: int, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Which of these ranges (start, end) no thread waits for or may be reading: their numbers in order.

        True for as long as the worker lets nobody read there.
        """
        item, _ = self._lookup(object_id)
        if item.complete or item.readers_unknown or self._readers.lost:
            return []
        busy = self._readers.reading(object_id)
        busy += [(pending.offset, pending.offset + pending.length) for pending in self._requests.of(object_id)]
        return [
            number
            for number, (start, end) in enumerate(ranges)
            if all(end <= first or last <= start for first, last in busy)
        ]

    def drop_unlinked(self) -> None:
        """Let go of released objects whose file has no name any more. The mark stays with the inode: it denies."""
        for item in [item for item in self._state.objects.values() if item.released]:
            if os.fstat(self.writers[item.id]).st_nlink == 0:
                self._forget(item, self.writers[item.id])

    def _forget(self, item: Object, writer: int) -> None:
        del self._state.objects[item.id]
        self._presence.pop(item.id, None)
        self._events.drop(_inode(writer))
        self._by_inode.pop(_inode(writer), None)
        os.close(self.writers.pop(item.id))
        self._state.save()
        self._store.discard(item.store_name)

    def _is_file(self, item: Object) -> bool:
        """Whether an object's writer is the file that its path names now."""
        try:
            status = Path(item.path).lstat()
        except FileNotFoundError:
            return False
        return self._by_inode.get((status.st_dev, status.st_ino)) == item.id

    # Events

    def read(self, worker: int = -1, epoll: int = -1) -> Iterator[Pending | Present | Repeats]:
        """The new requests. Events that need no worker are answered here; it is told of some, others are counted.

        With `worker`, its socket, most are sent as soon as they are journaled. With `epoll`, which waits for the group
        and all else, it goes on while there is nothing but events to count, a quarter of a second at most. ValueError:
        what came is malformed, and only another keeper can answer it (`_deny_unjournaled`). It finds what came before
        in the journal.
        """
        try:
            seen = list(self._events.take(worker, self._requests.following, epoll))
        except BlockingIOError:
            seen = []
        except OSError as error:  # the kernel could not hand the event over, and has denied it
            log.error("fanotify: read: %s", error)
            return
        found = [self._note(event) if isinstance(event, Seen) else self._record(event) for event in seen]
        yield from (each for each in found if each is not None)
        told, repeats = self._events.left_out()
        if number := told + repeats.number:
            self.counters.update({name: self.counters[name] + number for name in ("events", "present", "allowed")})
        if repeats.number:
            yield repeats

    def _note(self, event: Seen) -> Pending | Present:
        """What was done about an event that is seen to."""
        self.counters["events"] += 1
        if not event.present:
            return self._requests.add(
                event.object, event.offset, event.length, event.fd, thread=event.thread, sent=event.sent
            )
        self.counters["present"] += 1
        self._allowed(event.fd, event.failed)
        return Present(event.object, event.offset, event.length)

    def _allowed(self, fd: int, failed: int) -> None:
        if not failed:
            self.counters["allowed"] += 1
        elif failed != errno.ENOENT:  # ENOENT: answered by the keeper before this one
            log.error("fanotify: answer to %d: %s", fd, os.strerror(failed))

    def answer(self, pending: Pending, error: int) -> None:
        """Answer a request that was taken from the table: allow, or deny."""
        if not error and self._allow(pending):
            return
        if not error and self._hole_in(pending):
            self.counters["holes"] += 1
            log.error("object %d: the worker left a hole in [%d, +%d)", pending.object, pending.offset, pending.length)
            error = errno.EIO
        self._end(pending, error)

    def answer_by_presence(self, pending: Pending) -> None:
        """Without a worker: what is there may be read, what is not is an error."""
        self._end(pending, errno.EIO if self._hole_in(pending) else 0)

    def _allow(self, pending: Pending) -> bool:
        """Allow what is as it should be; False: nothing was done."""
        writer = self.writers.get(pending.object)
        if writer is None:
            return False
        failed = self._events.allow(
            pending.token, writer, pending.thread, pending.object, pending.offset, pending.length
        )
        if failed is not None:
            self._allowed(pending.token, failed)
        return failed is not None

    def _end(self, pending: Pending, error: int) -> None:
        if error:
            self._respond(pending.token, error)
        else:
            self._let_through(pending.token, pending.thread, pending.object, pending.offset, pending.length)

    def _let_through(self, fd: int, thread: int, object_id: int, offset: int, length: int) -> None:
        """Allow an event; from now on `_events` knows where it is written what the thread reads.

        One that the keeper before this one has allowed already says nothing new: its thread may have gone on since.
        """
        before = self._readers.last(thread)
        if slot := self._readers.let_through(thread, object_id, offset, length):
            self._events.know(thread, slot)
        if not self._respond(fd, 0) and before is not None:
            self._readers.let_through(thread, *before)

    def _record(self, event: fanotify.Event) -> Pending | Present | Repeats | None:
        """Journal an event, or answer it when it need not or cannot be asked of a worker."""
        self.counters["events"] += 1
        if event.mask & fanotify.Q_OVERFLOW:
            log.error("fanotify: queue overflow: readers went through unanswered")
            return None
        if event.fd < 0:
            log.error("fanotify: no descriptor for an event (%s), denied", errno.errorcode.get(-event.fd, event.fd))
            return None
        try:
            object_id = self._by_inode[_inode(event.fd)]
            if self._state.objects[object_id].released:
                raise OSError(errno.EIO, "nobody serves this object any more")
            offset, length = self._clip(object_id, event)
            if length > 0 and self._is_present(object_id, offset, length):
                known = self._presence[object_id].knows(offset, length)
                self._let_through(event.fd, event.pid, object_id, offset, length)
                self.counters["present"] += 1
                return Repeats(1, length) if known else Present(object_id, offset, length)
            if length > 0:
                self._journal.add(Entry(event.fd, object_id, offset, length, event.pid))
                return self._requests.add(object_id, offset, length, event.fd, thread=event.pid)
            # Beyond the frames there is nothing to wait for; but a truncation (length 0 on the wire) is refused.
            self._respond(event.fd, errno.EPERM if event.length == 0 and not self.fencing else 0)
        except Exception as error:
            log.error("fanotify: event denied: %r", error)
            self._respond(event.fd, errno.EIO)
        return None

    def _clip(self, object_id: int, event: fanotify.Event) -> tuple[int, int]:
        size = self._state.objects[object_id].size
        if event.offset is None or event.length is None:
            return 0, size
        return event.offset, max(0, min(event.offset + event.length, size) - event.offset) if event.length else 0

    def _is_present(self, object_id: int, offset: int, length: int) -> bool:
        """Whether the worker says that all of it is there, and the file has no hole in it."""
        presence = self._presence.get(object_id)
        if presence is None or not presence.has(offset, length):
            return False
        return not has_hole(self.writers[object_id], offset, length)

    def _hole_in(self, pending: Pending) -> bool:
        writer = self.writers.get(pending.object)
        try:
            return writer is None or has_hole(writer, pending.offset, pending.length)
        except OSError as error:
            log.error("object %d: %s", pending.object, error)
            return True

    def _respond(self, fd: int, error: int) -> bool:
        """Write the one answer, then free the number: in this order, so that it never names two events.

        False: it was answered before.
        """
        new = True
        try:
            fanotify.answer(self.group, fd, error)
            self.counters["denied" if error else "allowed"] += 1
        except OSError as failure:
            if new := failure.errno != errno.ENOENT:  # ENOENT: answered by the keeper before this one
                log.error("fanotify: answer to %d: %s", fd, failure)
        if fd < CAPACITY:
            self._journal.clear(fd)
        os.close(fd)
        return new

    # Taking over

    def _drop_halves(self, fds: dict[str, int]) -> None:
        """Let go of what is no use alone: the last keeper died before it had stored all three, so nothing was mounted.

        Before the new ones are stored, which have the same names.
        """
        for name in (GROUP, JOURNAL, READERS):
            if name in fds:
                self._store.remove(name)
                os.close(fds.pop(name))

    def _deny_unjournaled(self) -> None:
        """Deny the events that the last keeper had read, but not yet written down. EROFS asks again for most."""
        journaled = {entry.fd for entry in self._journal.entries()}
        for fd in unanswered(self._journal, len(self._state.objects)):
            if fd not in journaled:
                with contextlib.suppress(OSError):
                    fanotify.answer(self.group, fd, errno.EIO)
                    self.counters["orphans"] += 1

    def refuse_orphans(self) -> None:
        """In the place of a keeper that was killed, and nothing to serve with: deny whatever it had read."""
        self._readers = Readers(self._readers.fd)  # as that keeper left them
        for pending in self._requests.take_all():
            os.close(pending.token)
        for entry in list(self._journal.entries()):
            self._journal.clear(entry.fd)
        self._deny_unjournaled()

    def _adopt_journaled(self) -> None:
        for entry in self._journal.entries():
            self._requests.add(entry.object, entry.offset, entry.length, entry.fd, thread=entry.thread)
        log.warning("took over %d requests", len(self._requests))

    def _reattach(self, item: Object, fds: dict[str, int]) -> None:
        """Bring an object of the state back: with its descriptor, or, when all had died, by opening it again."""
        if item.plane != self.name:
            return
        writer = fds.pop(item.store_name, None)
        try:
            if writer is None:
                writer = _open_again(item)
                self._store.store(item.store_name, writer)
            if not item.complete:
                fanotify.mark_fd(self.group, writer)
            self._attach(item, writer)
        except OSError as error:
            log.error("object %d is lost: %s", item.id, error)
            del self._state.objects[item.id]

    def _attach(self, item: Object, writer: int) -> None:
        self.writers[item.id] = writer
        self._by_inode[_inode(writer)] = item.id
        self._show(item)

    def _show(self, item: Object) -> None:
        """Have the plain events of an object seen to without Python: as it is now."""
        writer = self.writers[item.id]
        if item.released or not 0 <= item.size < 1 << 63:
            self._events.drop(_inode(writer))
        else:
            self._events.put(_inode(writer), item.id, item.size, writer, self._presence.get(item.id))

    def _lookup(self, object_id: int) -> tuple[Object, int]:
        if object_id not in self.writers:
            raise OSError(errno.ENOENT, f"no object {object_id}")
        return self._state.objects[object_id], self.writers[object_id]

    def _unmark(self, writer: int) -> None:
        try:
            fanotify.unmark_fd(self.group, writer)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def _open_again(item: Object) -> int:
    """The writer; or for a released object, which the fence could not truncate, just what takes to mark it."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(item.path, os.O_RDWR | flags)
    except OSError:
        if not item.released:
            raise
        return os.open(item.path, os.O_RDONLY | flags)


def unanswered(journal: Journal, objects: int) -> range:
    """The numbers of all events that keepers with so many objects may have left without an answer."""
    return range(min(journal.high + _OPEN_OF_OBJECT * objects + _OPEN_ELSE, CAPACITY))


def reserve_journaled(fds: dict[str, int]) -> None:
    """Occupy the numbers of journaled events, so that no new event gets one. Before anything else opens descriptors.

    A handed-down descriptor that has such a number is moved.
    """
    if JOURNAL not in fds:
        return
    journal = Journal(fds[JOURNAL])
    numbers = {entry.fd for entry in journal.entries()}
    journal.close()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    parked = [null]
    for name, fd in list(fds.items()):
        while fds[name] in numbers:
            copy = os.dup(fd)
            if copy in numbers:
                parked.append(copy)
            else:
                fds[name] = copy
    for number in numbers - {null}:  # it may have got one itself, and cannot be copied onto itself
        os.dup2(null, number, inheritable=False)
    for fd in parked:
        if fd not in numbers:
            os.close(fd)


def has_hole(fd: int, offset: int, length: int) -> bool:
    """Whether a file has a hole in [offset, offset + length); what is beyond its end counts as one."""
    if length <= 0:
        return False
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE) < offset + length
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
