"""Reboots: after a clean stop the cache serves without the registry; after a power cut it never serves a wrong byte."""

BOOTS = ("fill", "warm", "cold")
LIMIT = 240


def host(host):
    """Two images."""
    from rig.product import published

    return published(host)


def fill(guest):
    """Fill the cache and stop in order."""
    from product import Daemon, compare, loader, mount_point

    with guest.step("serve, mount, read"):
        daemon = Daemon(guest, "--on-stop", "umount").start()
        for name, image in guest.task["images"].items():
            loader("mount", image["reference"], mount_point(name))
            compare(mount_point(name), image["files"])
    with guest.step("stop in order"):
        daemon.stop()


def warm(guest):
    """After the clean stop: everything from the cache. Then the power fails."""
    from product import Daemon, compare, loader, mount_point

    guest.ask("registry_stop")
    try:
        with guest.step("serve without the registry"):
            Daemon(guest).start()
        with guest.step("every byte from the cache"):
            for name, image in guest.task["images"].items():
                loader("mount", image["reference"], mount_point(name))
                compare(mount_point(name), image["files"])
    finally:
        guest.ask("registry_start")
    guest.cut_power()


def cold(guest):
    """After the power cut: what is served is right, from the cache or fetched again."""
    from product import Daemon, compare, loader, mount_point

    with guest.step("serve after the power cut"):
        daemon = Daemon(guest, "--on-stop", "umount").start()
    before = guest.ask("blob_bytes")
    with guest.step("every byte"):
        for name, image in guest.task["images"].items():
            loader("mount", image["reference"], mount_point(name))
            compare(mount_point(name), image["files"])
    after = guest.ask("blob_bytes")
    guest.fact("bytes fetched again after the power cut", sum(after.values()) - sum(before.values()))
    with guest.step("SIGTERM"):
        daemon.stop()
