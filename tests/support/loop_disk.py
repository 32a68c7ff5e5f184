"""A small file system of its own on a loop device: to be filled, aborted, to lose its power, or to have a quota."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from mounts import mountinfo, umount2
from mounts.syscalls import MNT_DETACH

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2  # neither data nor journal goes to the disk any more, as when the power fails


class LoopDisk:
    """Mounted at `directory`/disk inside of the `with` block."""

    def __init__(self, directory: Path, size: int) -> None:
        self.image, self.path = directory / "disk.img", directory / "disk"
        self.path.mkdir(parents=True)
        with self.image.open("wb") as stream:
            stream.truncate(size)
        self.format()

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if any(entry.target == str(self.path) for entry in mountinfo()):
            umount2(str(self.path), MNT_DETACH)

    def format(self) -> None:
        command = ["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self.image)]
        subprocess.run(command, check=True)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.path)], check=True)

    def lose_power(self) -> None:
        """Everything that is not on the disk by now is lost; the file system is mounted again as it is found then."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)
        umount2(str(self.path), 0)
        self.mount()

    def remount_read_only(self) -> bool:
        """`mount -o remount,ro`, and whether the kernel did it."""
        command = ["mount", "-o", "remount,ro", str(self.path)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def abort(self) -> None:
        """As after an error of the device: what is there can be read, nothing can be written."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.path)], check=True)

    def fill(self) -> Path:
        """Use up all room; the file that does."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        stream.write(bytes(size))
                        os.fdatasync(stream.fileno())
                except OSError:
                    pass
        return ballast


class FailingDisk(LoopDisk):
    """A disk that takes nothing new once `fail` was called: it lies in a tmpfs that is full then. Without a journal, so
    that the file system goes on, as with a device that has lost some of its sectors."""

    def __init__(self, directory: Path, size: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "disk", str(directory)], check=True)
        self._device = directory
        super().__init__(directory, size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        umount2(str(self._device), MNT_DETACH)

    def format(self) -> None:
        command = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "nodiscard", str(self.image)]
        subprocess.run(command, check=True)

    def fail(self) -> None:
        """Sectors that were never written cannot be from now on."""
        with (self._device / "ballast").open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(1 << 20))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def mend(self) -> None:
        (self._device / "ballast").unlink()


class QuotaDisk(LoopDisk):
    """A btrfs, whose directory `limited` may hold `limit` bytes: what is more is refused with EDQUOT."""

    def __init__(self, directory: Path, limit: int) -> None:
        super().__init__(directory, 160 << 20)  # it is never full itself
        self._limit = limit
        self.limited = self.path / "limited"

    def __enter__(self) -> Self:
        super().__enter__()
        self._btrfs("quota", "enable", self.path)
        self._btrfs("subvolume", "create", self.limited)
        self.set_limit(str(self._limit))
        return self

    def format(self) -> None:
        subprocess.run(["mkfs.btrfs", "-q", str(self.image)], check=True, capture_output=True)

    def set_limit(self, limit: str) -> None:
        """Bytes, or `none`."""
        self._btrfs("qgroup", "limit", limit, self.limited)

    def room(self) -> int:
        """Bytes that are left of the limit, as far as they are accounted for."""
        self._btrfs("filesystem", "sync", self.path)
        lines = self._btrfs("qgroup", "show", "-re", "--raw", "-F", self.limited).splitlines()
        used, limit = lines[-1].split()[1], lines[-1].split()[3]
        return int(limit) - int(used)

    def fill(self, leave: int = 0) -> Path:
        """Use up the limit, but for `leave` bytes; the file that does."""
        ballast = self.limited / "ballast"
        with ballast.open("wb", buffering=0) as stream:
            try:
                while (room := self.room() - leave) >= 4096:
                    stream.write(bytes(min(room, 1 << 20) & -4096))
            except OSError as error:
                assert error.errno == errno.EDQUOT
        return ballast

    @staticmethod
    def _btrfs(*arguments: str | Path) -> str:
        done = subprocess.run(["btrfs", *arguments], check=True, capture_output=True, text=True)
        return done.stdout
