"""The cache's disk is full: errors or right bytes, nobody stuck; with space again everything is right."""

import os

BOOTS = ("full",)
LIMIT = 300
LEFT = 3 << 17


def host(host):
    """Two images that need more than the space left."""
    from rig.product import published

    return published(host)


def _readable(target):
    from product import digest_tree

    try:
        digest_tree(target)
    except OSError:
        return False
    return True


def full(guest):
    """All but a few megabytes are taken by another file."""
    from lib import DISK, wait_for
    from product import Daemon, Readers, compare, expect_right, loader, mount_point

    images = guest.task["images"]
    targets = [mount_point(name) for name in images]
    with guest.step("serve and mount"):
        daemon = Daemon(guest, "--deadline", "6").start()  # its patience with the full disk
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
    ballast = DISK / "ballast"
    with ballast.open("wb") as stream:
        free = os.statvfs(DISK).f_bavail * os.statvfs(DISK).f_frsize
        os.posix_fallocate(stream.fileno(), 0, free - LEFT)
    with guest.step("no wrong byte and no stuck reader on a full disk"):
        found = Readers(targets).results(180)
        guest.fact("readers with an I/O error", sum("error" in digests for _, digests in found))
        expect_right(found, images, errors_allowed=True)
    ballast.unlink()
    with guest.step("reads work when there is space again"):  # an outage is over when the next attempt succeeds
        wait_for(lambda: all(_readable(target) for target in targets), 90, "reads still fail")
    with guest.step("every byte"):
        for name, image in images.items():
            compare(mount_point(name), image["files"])
    with guest.step("umount and SIGTERM"):
        for name in images:
            loader("umount", mount_point(name))
        daemon.stop()
