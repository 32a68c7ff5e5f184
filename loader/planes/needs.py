"""What each plane and form needs of a kernel, and what a canary's failure says is missing."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.payload import Form
from loader.planes.canary import CanaryFailed
from mounts import mountinfo


@dataclass(frozen=True, slots=True)
class Missing:
    """What is missing, and what a person can do about it."""

    what: str
    remedy: str


ANOTHER_KERNEL = (
    "boot Linux 6.14 or later (Debian 13: linux-image-amd64 from trixie-backports), or a kernel of 5.19 to 7.1 that is "
    "built with CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND"
)
OTHER_FORM = "use the decoded form here"
_ROOT = Missing("the right to try it (CAP_SYS_ADMIN)", "run it as root")
_EROFS = Missing("EROFS in this kernel (CONFIG_EROFS_FS)", "load the module: modprobe erofs")
_ZSTD = Missing(
    "zstd in this kernel's EROFS (CONFIG_EROFS_FS_ZIP, CONFIG_EROFS_FS_ZIP_ZSTD; 6.10 and later)", OTHER_FORM
)
_FANOTIFY = Missing("fanotify permission events (CONFIG_FANOTIFY, CONFIG_FANOTIFY_ACCESS_PERMISSIONS)", ANOTHER_KERNEL)
_PRE_ACCESS = Missing(
    "pre-content events, FAN_PRE_ACCESS (CONFIG_FANOTIFY_ACCESS_PERMISSIONS; 6.14 and later)", ANOTHER_KERNEL
)
_FILE_BACKED = Missing("file-backed EROFS mounts (CONFIG_EROFS_FS_BACKED_BY_FILE)", ANOTHER_KERNEL)
_DEVICE = Missing(
    "/dev/cachefiles (CONFIG_FSCACHE, CONFIG_CACHEFILES)",
    f"load the module: modprobe cachefiles; if that does not help, {ANOTHER_KERNEL}",
)
_ON_DEMAND_GONE = (7, 1, 8)  # for what to do, never for what works
_ON_DEMAND = Missing("cachefiles on-demand mode (CONFIG_CACHEFILES_ONDEMAND; 5.19 to 7.1)", ANOTHER_KERNEL)
_FSID = Missing("EROFS over fscache (CONFIG_EROFS_FS_ONDEMAND; 5.19 to 7.1)", ANOTHER_KERNEL)
_BUSY = Missing("/dev/cachefiles, which another daemon has", "stop the other daemon, or ask it: erofs-loader status")
_SHARE = Missing(
    "page cache sharing in this kernel's EROFS (CONFIG_EROFS_FS_PAGE_CACHE_SHARE; 7.0 and later)",
    "nothing but memory: every image keeps its own copy of what is read",
)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def explain(failure: CanaryFailed, plane: str, form: Form, root: Path) -> Missing:
    """What a canary's failure on this plane and form means."""
    number = failure.error.errno if failure.error else None
    if number in (errno.EPERM, errno.EACCES):
        return _ROOT
    if failure.step == "share" and (number in _UNSUPPORTED or number is None):
        return _SHARE
    known = _fanotify(failure.step, number, root) if plane == "fanotify" else _cachefiles(failure.step, number)
    if known is None and failure.step == "mount":
        known = _mount(number, plane, form, str(failure))
    return known or Missing(f"something unforeseen: {failure}", "please report this, with the kernel's version and log")


def _fanotify(step: str, number: int | None, root: Path) -> Missing | None:
    if step == "group" and number in _UNSUPPORTED:
        return _FANOTIFY
    if step == "mark" and number == errno.EINVAL:
        return _PRE_ACCESS
    if step == "mark" and number == errno.EOPNOTSUPP:
        return Missing(
            f"a file system with pre-content events under {root} ({file_system(root)} has none)",
            "put the cache on ext4, xfs or btrfs: --root",
        )
    return None


def _cachefiles(step: str, number: int | None) -> Missing | None:
    if step == "device":
        if number == errno.EBUSY:
            return _BUSY
        return _DEVICE if _may_have_on_demand() else _ON_DEMAND  # the module alone would not help there
    if step == "bind" and number in _UNSUPPORTED:
        return _ON_DEMAND
    return _FSID if step == "fsid" else None


def _mount(number: int | None, plane: str, form: Form, text: str) -> Missing | None:
    if number == errno.ENODEV:
        return _EROFS
    if "algorithm" in text or "compress" in text.lower():
        return _ZSTD
    if plane == "fanotify" and number == errno.ENOTBLK:
        return _FILE_BACKED
    if plane == "cachefiles" and (number in (errno.ENOTBLK, errno.ENOENT) or "fsid" in text):
        return _FSID
    return _ZSTD if form is Form.ENCODED and number in _UNSUPPORTED else None


def _may_have_on_demand() -> bool:
    """Whether the module, once loaded, could have it. Debian's kernels, for one, have the module and not the mode."""
    try:
        built = Path(f"/boot/config-{os.uname().release}").read_text()
    except OSError:
        built = "CONFIG_CACHEFILES_ONDEMAND=y"
    return release() < _ON_DEMAND_GONE and "CONFIG_CACHEFILES_ONDEMAND=y" in built


def release() -> tuple[int, ...]:
    """The running kernel's version, as numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release.partition("-")[0].partition("+")[0]))


def file_system(path: Path) -> str:
    """The type of the file system that a path is on, by the longest mount point above it."""
    resolved = str(path.resolve())
    found = [mount for mount in mountinfo() if f"{resolved}/".startswith(mount.target.rstrip("/") + "/")]
    return max(found, key=lambda mount: len(mount.target)).fstype if found else "unknown"
