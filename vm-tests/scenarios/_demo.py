"""The demo in a guest: mount a Debian image over a slow link and start an application from it. Not in the matrix."""

BOOTS = ("starts",)
LIMIT = 900


def starts(guest):
    """Serve, mount, start; the link's counters are the host's."""
    import sys
    import time

    from product import REPOSITORY, Daemon, drop_caches, loader, mount_point

    sys.path.append(str(REPOSITORY))
    from bench.workload import start_application

    with guest.step("serve"):
        daemon = Daemon(guest).start()
    target = mount_point("debian")
    drop_caches()
    guest.ask("link_reset")
    begin = time.monotonic()
    with guest.step("mount"):
        loader("mount", guest.task["reference"], target)
    guest.fact("ready", time.monotonic() - begin)
    with guest.step("start"):
        start_application(target)
    guest.fact("output", time.monotonic() - begin)
    guest.fact("fetched", guest.ask("link_bytes"))
    loader("umount", target)
    daemon.stop()
