"""Clean up after sessions that died: their mounts and their processes, known by the session's base directory."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

_NOTE = ".session"
_MNT_DETACH = 2


def note_session(base: Path, process: int | None = None) -> None:
    """Remember in `base` which process (by default this) the session is: pid and start time, as pids come again."""
    process = process or os.getpid()
    (base / _NOTE).write_text(f"{process} {_start_time(process)}")


def sweep_dead_sessions(parent: Path) -> list[str]:
    """Clean up below every base directory in `parent` whose session is dead; returns what was unmounted or ended."""
    done: list[str] = []
    for note in parent.glob(f"*/{_NOTE}"):
        pid, _, started = note.read_text().partition(" ")
        if not pid.isdigit() or _start_time(int(pid)) != started:
            done += unmount_below(note.parent) + _end_processes_of(note.parent)
            note.unlink(missing_ok=True)
    return done


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def mounts_below(base: Path) -> list[str]:
    """The mount points at or below `base`, the innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
        if point == str(base) or point.startswith(f"{base}/"):
            points.append(point)
    return points[::-1]


def unmount_below(base: Path) -> list[str]:
    """Detach whatever is mounted at or below `base`, the innermost first; returns the mount points."""
    libc = ctypes.CDLL(None, use_errno=True)
    points = mounts_below(base)
    for point in points:
        # Lazily: a daemon that is gone or stuck must not hold the sweep up.
        libc.umount2(os.fsencode(point), _MNT_DETACH)
    return points


def _end_processes_of(base: Path) -> list[str]:
    ended = []
    needle = os.fsencode(base) + b"/"
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes()
            if needle in command or needle in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                ended.append(command.replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    if ended:
        time.sleep(0.2)  # lets the kernel release their mounts and sockets
    return ended
