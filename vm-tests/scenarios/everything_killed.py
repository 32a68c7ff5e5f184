"""All processes of the daemon killed at once while reading: errors, never wrong bytes; then served again.

On fanotify in the decoded form the kernel reads holes as zeros once nobody is there: those mounts must be taken away
when the daemon starts. cachefiles mounts are taken away too, because the kernel never revives them.
"""

import os
import time

BOOTS = ("all_at_once",)
LIMIT = 300


def host(host):
    """Two images through a slow link."""
    from rig.product import published, slow_link

    return slow_link(host, published(host), rate=0.4e6)


def all_at_once(guest):
    """What was read right before or after is right; the rest is an error."""
    from lib import expect, run
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
    fails_open = (guest.task["plane"], guest.task["form"]) == ("fanotify", "decoded")
    with guest.step("no reader is stuck"):
        found = readers.results(60)
        guest.fact("readers with an I/O error", sum("error" in digests for _, digests in found))
    if not fails_open:
        with guest.step("no wrong byte"):
            expect_right(found, images, errors_allowed=True)
            expect_right(Readers(targets, copies=1).results(60), images, errors_allowed=True)
    guest.ask("link_fast")
    with guest.step("serve again"):
        daemon = Daemon(guest).start()
    with guest.step("no wrong byte in the old mounts"):
        mounted = [target for target in targets if os.path.ismount(target)]
        taken_away = fails_open or guest.task["plane"] == "cachefiles"
        expect(not (taken_away and mounted), f"still mounted: {mounted}")
        found = Readers(mounted, copies=1).results(120)
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
