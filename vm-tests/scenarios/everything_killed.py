"""All processes of the daemon killed at once while reading: errors or waiting, never wrong bytes; then served again."""

import time

BOOTS = ("all_at_once",)
LIMIT = 300


def host(host):
    """Two images through a slow link."""
    from rig.product import published, slow_link

    return slow_link(host, published(host), rate=1.0e6)


def all_at_once(guest):
    """What was read right before or after is right; the rest is an error."""
    from lib import run
    from product import Daemon, Readers, compare, expect_right, loader, mount_point

    images = guest.task["images"]
    targets = [mount_point(name) for name in images]
    with guest.step("serve and mount"):
        daemon = Daemon(guest).start()
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
    readers = Readers(targets)
    time.sleep(2)
    with guest.step("SIGKILL everything") as record:
        record["readers"] = readers.running()
        daemon.kill_all()
    with guest.step("no wrong byte"):
        found = readers.results(60)
        guest.fact("readers with an I/O error", sum("error" in digests for _, digests in found))
        expect_right(found, images, errors_allowed=True)
    with guest.step("no wrong byte while no daemon runs"):
        expect_right(Readers(targets, copies=1).results(60), images, errors_allowed=True)
    with guest.step("serve again"):
        daemon = Daemon(guest).start()
    with guest.step("no wrong byte in the old mounts"):
        found = Readers(targets, copies=1).results(120)
        guest.fact("old mounts that work again", sum("error" not in digests for _, digests in found))
        expect_right(found, images, errors_allowed=True)
    with guest.step("mount anew"):
        for name, image in images.items():
            loader("umount", mount_point(name), ok=False)
            run("umount", "-l", mount_point(name), ok=False)
            loader("mount", image["reference"], mount_point(name))
    with guest.step("every byte"):
        for name, image in images.items():
            compare(mount_point(name), image["files"])
            loader("umount", mount_point(name))
    with guest.step("SIGTERM"):
        daemon.stop()
