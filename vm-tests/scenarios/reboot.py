"""Reboots: after a clean stop the cache serves without the registry; after a power cut it never serves a wrong byte."""

NATIVE = False
BOOTS = ("fill", "cut", "cold")
LIMIT = 240


def host(host):
    """Two images."""
    from rig.product import published

    return published(host)


def fill(guest):
    """Read the first image, all of it, and stop in order."""
    from product import Daemon

    with guest.step("serve, mount and read the first image"):
        daemon = Daemon(guest, "--on-stop", "umount").start()
        _read(guest, "first")
    with guest.step("stop in order"):
        daemon.stop()


def cut(guest):
    """After the clean stop: the first image from the cache. Then the power fails right after the second was read."""
    from product import Daemon

    guest.ask("registry_stop")
    try:
        with guest.step("every byte of the first from the cache, without the registry"):
            Daemon(guest).start()
            _read(guest, "first")
    finally:
        guest.ask("registry_start")
    with guest.step("read the second image, and cut the power before anything of it is synced"):
        _read(guest, "second")
        with open("/proc/meminfo") as stream:
            dirty = next(line for line in stream if line.startswith("Dirty:"))
    guest.fact("kB not yet on the disk at the power cut", int(dirty.split()[1]))
    guest.cut_power()


def cold(guest):
    """After the power cut: what is served is right, from the cache or fetched again."""
    from product import Daemon

    with guest.step("serve after the power cut"):
        daemon = Daemon(guest, "--on-stop", "umount").start()
    before = guest.ask("blob_bytes")
    with guest.step("every byte of both"):
        for name in guest.task["images"]:
            _read(guest, name)
    after = guest.ask("blob_bytes")
    guest.fact("bytes fetched again after the power cut", sum(after.values()) - sum(before.values()))
    with guest.step("SIGTERM"):
        daemon.stop()


def _read(guest, name):
    from product import compare, loader, mount_point

    image = guest.task["images"][name]
    loader("mount", image["reference"], mount_point(name))
    compare(mount_point(name), image["files"])
