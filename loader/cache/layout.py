"""The cache directory: what lies where, and who may touch it.

    ROOT/
      records/state.db             SQLite (WAL): images, their blobs, mounts, last use      state.py
      images/HEX/image.json        the image's record, should the database be lost          records.py
      images/HEX/FORM.payload      metadata payload, whole and verified; what is mounted   payloads.py
      images/HEX/start, trace      lists of frames that a start reads                      starts.py
      blobs/FORM/HEX/table         its frame table (frames.py of the builder)               files.py
      blobs/FORM/HEX/data          sparse file: the blob in this form                       files.py
      blobs/FORM/HEX/ready         bitmap, one bit a frame: its bytes are in `data`, by this table  ready.py
      blobs/FORM/HEX/synced        the bitmap as of the last fdatasync of `data`            ready.py
      blobs/FORM/HEX/sums          decoded: checksums of what was written                   sums.py
      objects/NAME/ready, synced, sums  cachefiles: the same for the kernel's own cache files
      objects/NAME/table           the identity of the table by which it is filled
      cachefiles/                  belongs to the kernel while the cachefiles plane is on
      tmp/                         half-written files; emptied at start
      keeper.json, keeper.added, choice.json, loader.lock, parked.sock                      the keeper's, loader.keeper

FORM is `encoded` or `decoded`, HEX the sha256 of the manifest (images) or of the blob (blobs).

Locks. One worker runs at a time (the keeper sees to it) and only it writes here; other processes read at most.
Inside of the worker: `ReadyMap` has its own lock, held for single bit operations; the flight table (claims.py) has one
lock for all files, held for dictionary operations; the database connection has one, held for one transaction. None is
held over I/O on `data` or over the network, and none is taken while another is held. (Only what replaces `synced` holds
a lock of its own over its syncs, and what removes data holds the collector's, then the one of mounting.) `data` needs
no lock: a frame's bytes are always the same, and only its flight's holder writes or removes them. Files that are
replaced (`synced`, payloads) are written in tmp/, synced and renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK
from erofs_builder.payload import Form


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one cache root."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "records" / "state.db"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def payload(self, manifest: Digest, form: Form) -> Path:
        return self.root / "images" / manifest.hex / f"{form.value}.payload"

    def start_list(self, manifest: Digest, name: str) -> Path:
        return self.root / "images" / manifest.hex / name

    def record(self, manifest: Digest) -> Path:
        return self.root / "images" / manifest.hex / "image.json"

    def blob(self, blob: Digest, form: Form) -> Path:
        return self.root / "blobs" / form.value / blob.hex

    def data(self, blob: Digest, form: Form) -> Path:
        return self.blob(blob, form) / "data"

    def object(self, name: str) -> Path:
        return self.root / "objects" / name

    def writable(self) -> list[Path]:
        """The directories that a worker writes in. The rest of the root is the keeper's."""
        return [self.root / name for name in ("records", "images", "blobs", "objects", "tmp")]

    def prepare(self) -> None:
        """Make the directories and throw away what a killed process left half-written."""
        for directory in self.writable():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.tmp.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def replace_file(path: Path, data: bytes, tmp: Path, *, durable: bool = True) -> None:
    """Write a file so that after a crash either the old or the new one is there, whole (of a `durable` one)."""
    temporary = tmp / f"{os.getpid()}-{os.urandom(6).hex()}"
    try:
        _write_new(temporary, data, durable)
        try:
            temporary.rename(path)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.rename(path)
        if durable:
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_new(path: Path, data: bytes, durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_over(path: Path, data: bytes) -> None:
    """Make a file's bytes right, in place, where they are not: whoever reads this very file finds them. Synced."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_size != len(data):
            os.ftruncate(fd, len(data))
        for offset in range(0, len(data), BLOCK):
            right = data[offset : offset + BLOCK]
            if not _holds(fd, offset, right) and os.pwrite(fd, right, offset) != len(right):
                raise OSError(errno.EIO, f"{path}: a block could not be written")
        os.fsync(fd)
    finally:
        os.close(fd)


def _holds(fd: int, offset: int, right: bytes) -> bool:
    try:
        return os.pread(fd, len(right), offset) == right
    except OSError:  # a sector that cannot be read: writing it often helps
        return False


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a crash."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
