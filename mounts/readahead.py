"""How far the kernel reads ahead on EROFS file systems that are no block devices, by their backing devices' names.

Which backing device belongs to which mount is nowhere to be read: only that one is new after a mount.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_DEVICES = Path("/sys/class/bdi")


def backing_devices() -> set[str]:
    """The names of all that there are."""
    return {path.name for path in _DEVICES.glob("erofs-*")}


def get_readahead(device: str) -> int:
    """The readahead in KiB. OSError: the file system is gone."""
    return int(_knob(device).read_text())


def set_readahead(device: str, kib: int) -> int:
    """Set the readahead; what it was. OSError: the file system is gone, or this is not allowed here."""
    before = get_readahead(device)
    _knob(device).write_text(str(kib))
    return before


def _knob(device: str) -> Path:
    return _DEVICES / device / "read_ahead_kb"


def restore_readahead(device: str, kib: int) -> None:
    """Set it if the file system is still there, and nobody else has set it since it was 0."""
    with contextlib.suppress(OSError):
        if get_readahead(device) == 0:
            set_readahead(device, kib)
