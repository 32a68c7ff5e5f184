"""A small ext4 of its own on a loop device: to be filled, aborted, or to lose its power."""

from __future__ import annotations

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
        command = ["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self.image)]
        subprocess.run(command, check=True)

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if any(entry.target == str(self.path) for entry in mountinfo()):
            umount2(str(self.path), MNT_DETACH)

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
