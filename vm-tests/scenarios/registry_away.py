"""The registry goes away in the middle of reading and comes back: readers wait, none fails."""

import time

BOOTS = ("away",)
LIMIT = 240


def host(host):
    """Two images, slow enough that the registry can be stopped in between."""
    from rig.product import published, slow_link

    return slow_link(host, published(host), rate=0.6e6)


def away(guest):
    """Stopped for some seconds while everything is wanted."""
    from lib import expect
    from product import Daemon, Readers, expect_right, loader, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    with guest.step("mount both"):
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
    readers = Readers([mount_point(name) for name in images])
    with guest.step("registry away for 5 s") as record:
        time.sleep(1)
        guest.ask("registry_stop")
        time.sleep(5)
        waiting = record["waiting"] = readers.running()
        expect(waiting, "all readers had ended: the test proves nothing")
        guest.ask("registry_start")
        guest.ask("link_fast")
    with guest.step("every byte, by every reader"):
        expect_right(readers.results(150), images)
    with guest.step("umount"):
        for name in images:
            loader("umount", mount_point(name))
    with guest.step("SIGTERM"):
        daemon.stop()
