"""The kernel interface of mounting: fsopen(2), fsconfig(2), fsmount(2), umount2(2), setns(2), mountinfo. No policy.

mount(2) is not here: its options must fit one page, which 127 devices do not, and its errors say nothing.
"""

from mounts.erofs import mount_erofs
from mounts.mountinfo import Mount, mountinfo, parse_mountinfo
from mounts.syscalls import MountError, umount2

__all__ = ["Mount", "MountError", "mount_erofs", "mountinfo", "parse_mountinfo", "umount2"]
