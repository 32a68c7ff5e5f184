"""One cache file: a blob in one form, its frame table, which frames are there, and the way to write more."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.errors import FrameTableError, IntegrityError
from erofs_builder.frames import Frame, FrameTable
from erofs_builder.payload import Form
from loader.cache.layout import Layout, replace_file
from loader.cache.ready import NotTakenError, ReadyMap
from loader.cache.state import ImageRecord
from loader.cache.sums import Sums
from loader.cache.writer import Writer
from loader.keeper.presence import Presence

log = logging.getLogger(__name__)

_EVICTED_MEANWHILE = 5  # times


class CacheFile:
    """A blob in one form in one place. Compared by identity: there is one of these per place in a worker.

    `trusted` says whether a set bit is proof that the kernel can read the frame. It is for our own files. A
    cachefiles object may have been thrown away by the kernel, so there only what this worker wrote counts, and a READ
    of a frame that was ready earlier means that it is gone.
    """

    def __init__(
        self, key: str, form: Form, table: FrameTable, ready: ReadyMap, *, trusted: bool,
        sums: Sums | None = None,
    ) -> None:  # fmt: skip
        self.key = key
        self.form = form
        self.table = table
        self.ready = ready
        self.trusted = trusted
        self.sums = sums
        self.writer: Writer | None = None
        self.object: int | None = None
        self.completed = False  # the keeper was told
        self.refuted = False  # complete, each frame as its table says, and yet not the blob
        self._written = set[int]()
        self.used = array("I", bytes(4 * len(table)))  # by frame: when it was read last, in seconds since the epoch
        self._presence: Presence | None = None  # what the keeper sees of `ready`
        self._presence_lock = threading.Lock()
        self._doubtful = False  # whether the disk did not take what came last, and that is not forgotten yet
        self._checkpointing = threading.Lock()
        self._known = False  # whether the keeper was told of frames that are read

    @property
    def blob(self) -> Digest:
        return self.table.blob_digest

    @property
    def decoded(self) -> bool:
        return self.form is Form.DECODED

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.table.decoded_size if self.decoded else self.table.blob_size

    def __str__(self) -> str:
        return self.key

    def touch(self, frames: range) -> None:
        """A reader asked for these frames just now: for a while we need not hear of others who do."""
        now = int(time.time())
        for frame in frames:
            self.used[frame] = now
        if self._presence is not None and frames:
            begin, end = self.place(self.table[frames.start])[0], sum(self.place(self.table[frames.stop - 1]))
            with self._presence_lock:
                if self._presence is not None:
                    self._presence.know(begin, end - begin)
                    self._known = True

    def listen(self) -> None:
        """The while is over: who reads frames is to be heard of again."""
        if self._known:
            with self._presence_lock:
                self._known = False
                if self._presence is not None:
                    self._presence.forget_known()

    def covering(self, offset: int, length: int) -> range:
        """Frames under [offset, offset + length) of this file."""
        return self.table.covering(offset, length, decoded=self.decoded)

    def has(self, frame: int) -> bool:
        """Whether a reader of this frame need not wait."""
        return self.ready[frame] if self.trusted else frame in self._written

    def place(self, frame: Frame) -> tuple[int, int]:
        """Offset and size of a frame in this file."""
        if self.decoded:
            return frame.decoded_offset, frame.decoded_size
        return frame.encoded_offset, frame.encoded_size

    def write(self, frame: Frame, data: bytes | memoryview) -> None:
        """Put a verified frame in its place; only then it is ready."""
        offset, size = self.place(frame)
        writer = self.writer
        if writer is None:
            raise OSError(errno.EBADF, f"{self.key} is not open")
        if len(data) != size:
            raise ValueError(f"frame {frame.number} of {self.key}: {len(data)} bytes for {size}")
        writer.write(offset, data)
        self.written(frame, data)

    def written(self, frame: Frame, data: bytes | memoryview) -> None:
        """A verified frame's bytes are in its place: it is ready. OSError: there is no room to say so."""
        if self.sums is not None:
            self.sums.set(frame.number, data)
        if not self.trusted:
            self._written.add(frame.number)
        self.used[frame.number] = int(time.time())
        self.ready.set(frame.number)
        if self._presence is not None:
            self._set_present(frame)

    def share(self, presence: Presence | None) -> None:
        """Let the keeper see what is ready: it then answers by itself. None: it asks for everything."""
        with self._presence_lock:
            old, self._presence = self._presence, presence
            if old is not None:
                old.close()
            if presence is not None and self.trusted:
                for first, last in self.ready.runs():
                    offset, end = self.place(self.table[first])[0], sum(self.place(self.table[last]))
                    presence.set(offset, end - offset)

    def _set_present(self, frame: Frame) -> None:
        with self._presence_lock:
            if self._presence is not None and self.ready[frame.number]:
                self._presence.set(*self.place(frame))

    def forget(self, frames: Iterable[int]) -> None:
        """These frames are not what they should be, or go away: from here on whoever reads them waits."""
        wrong = set(frames)
        self._written -= wrong
        with self._presence_lock:
            if self._presence is not None:
                for frame in wrong:
                    self._presence.clear(*self.place(self.table[frame]))
            self.ready.clear(wrong)

    def restore(self, frames: Iterable[int]) -> None:
        """These frames did not go away after all. One for whose bit there is no room counts as gone."""
        for number in frames:
            try:
                self.ready.set(number)
            except OSError as error:
                log.warning("frame %d of %s has to be fetched again: %s", number, self.key, error)
                continue
            self._set_present(self.table[number])

    @property
    def safe(self) -> bool:
        """Whether all that is ready survives a crash."""
        return not self.ready.dirty and not self._doubtful

    def checkpoint(self) -> None:
        """Make what is ready survive a crash. (A cachefiles object is the kernel's to sync.)"""
        with self._checkpointing:
            writer = self.writer
            if self.safe or writer is None:
                return
            if not self.trusted:
                self.ready.checkpoint(None)
                return
            if self._doubtful:  # a sync would find nothing wrong any more
                self._disown()
                self._doubtful = False
                return
            with writer.descriptor() as fd:
                try:
                    self.ready.checkpoint(fd)
                except NotTakenError:  # the page cache may have it yet, and then holes
                    self._doubtful = True  # what was just being written is ready in a moment: once more next time
                    self._disown()
                    raise

    def _disown(self) -> None:
        """Forget what was never synced."""
        with self._presence_lock:
            lost = self.ready.unsynced()
            if self._presence is not None:
                for frame in lost:
                    self._presence.clear(*self.place(self.table[frame]))
            self.ready.disown(lost)

    def detach(self) -> None:
        """The kernel's object is gone."""
        self.share(None)
        writer, self.writer, self.object = self.writer, None, None
        if writer is not None:
            writer.close()
        self._written.clear()

    def close(self) -> None:
        """No object of the kernel will be of this file again: give back all that is open.

        Not left to the collection of garbage, for a fetch under way may hold the file for long.
        """
        self.detach()
        self.ready.close()
        if self.sums is not None:
            self.sums.close()


def prepare_blob(layout: Layout, form: Form, table: FrameTable) -> Path:
    """Make a blob's directory and its sparse data file of full length; the path of the file.

    Must not be called for a file that is marked: truncating one asks this very daemon.
    """
    directory = layout.blob(table.blob_digest, form)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if has_another_table(layout, form, table):
        log.warning("%s: what is cached was verified by another frame table: removed", directory)
        _forget_contents(directory)
    store_table(layout, form, table)
    data = directory / "data"
    size = table.decoded_size if form is Form.DECODED else table.blob_size
    fd = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(fd).st_size != size:  # new, or lost: the keeper fences a file by taking its length and name
            for name in ("ready", "synced", "sums"):
                (directory / name).unlink(missing_ok=True)
            os.ftruncate(fd, size)
    finally:
        os.close(fd)
    return data


def another_table(table: FrameTable, others: Iterable[ImageRecord]) -> IntegrityError:
    """An image's table of a blob is not the one by which its cache file is filled.

    A blob's digest says nothing of how an image cuts it: who could have another image's file filled by his own table
    could give it any bytes.
    """
    names = ", ".join(image.name for image in others) or "none is known"
    return IntegrityError(
        f"blob {table.blob_digest}: this image has another frame table of it than what is in use, so one of the images"
        f" is not what it says: unmount or remove the others ({names}), or this one (what was unmounted stays in use"
        " while a mount namespace lives that was made before)"
    )


def has_another_table(layout: Layout, form: Form, table: FrameTable) -> bool:
    """Whether the blob's directory belongs to another frame table."""
    return _stored_table(layout.blob(table.blob_digest, form)) not in (None, table.encode())


def _stored_table(directory: Path) -> bytes | None:
    try:
        return (directory / "table").read_bytes()
    except FileNotFoundError:
        return None


def _forget_contents(directory: Path) -> None:
    """Not while it is open. What says that something is there goes first: whoever is killed in between has lost bytes,
    and believes none."""
    for name in ("synced", "ready", "sums", "data", "table"):
        (directory / name).unlink(missing_ok=True)


def store_table(layout: Layout, form: Form, table: FrameTable, *, over: bool = True) -> None:
    """Keep a frame table next to its blob, so that a restarted worker serves it without the image's payload.

    Without `over`, one that is there stays: what is cached belongs to it. Not synced: after a crash of the machine,
    whoever mounts the image stores it from the payload, which is.
    """
    path = layout.blob(table.blob_digest, form) / "table"
    encoded, stored = table.encode(), _stored_table(path.parent)
    if stored == encoded or (stored is not None and not over):
        return
    for attempt in range(_EVICTED_MEANWHILE):
        try:
            replace_file(path, encoded, layout.tmp, durable=False)
            return
        except FileNotFoundError:  # no image was known to need it yet, and it went: once more
            if attempt == _EVICTED_MEANWHILE - 1:
                raise


def bind_object(directory: Path, table: FrameTable, tmp: Path) -> None:
    """cachefiles: note by which frame table the kernel's cache file of an object is filled; FrameTableError if that was
    another one, for what the kernel has of it cannot be taken back while it is opened."""
    path, digest = directory / "table", table.identity.hex().encode()
    try:
        bound = path.read_bytes()
    except FileNotFoundError:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, digest, tmp)
        return
    if bound != digest:
        raise FrameTableError(
            f"blob {table.blob_digest}: the kernel's cache file was filled by another image's frame table; with the"
            f" daemon stopped, empty cachefiles/ and objects/ below {directory.parent.parent}"
        )


def load_table(layout: Layout, form: Form, blob: Digest) -> FrameTable:
    """The stored frame table of a blob; FrameTableError if there is none or it is damaged."""
    path = layout.blob(blob, form) / "table"
    try:
        table = FrameTable.decode(path.read_bytes())
    except FileNotFoundError:
        raise FrameTableError(f"no frame table is stored for {blob} ({form.value})") from None
    if table.blob_digest != blob:
        raise FrameTableError(f"{path}: it is the table of {table.blob_digest}")
    return table
