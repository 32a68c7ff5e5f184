"""An application's start in a guest over a slow link: ours, then mount.erofs. Not in the matrix."""

BOOTS = ("starts",)
LIMIT = 1800


def starts(guest):
    """Each with nothing cached; the link's counters are the host's."""
    _ours(guest)
    _theirs(guest)


def _ours(guest):
    from product import Daemon, loader, mount_point

    with guest.step("ours"):
        daemon = Daemon(guest).start()
        target = mount_point("ours")
        _start(guest, "ours", target, lambda: loader("mount", guest.task["reference"], target))
        loader("umount", target)
        daemon.stop()


def _theirs(guest):
    import subprocess

    from lib import DISK
    from product import mount_point

    (DISK / "cache").mkdir()
    subprocess.run(["mount", "--bind", DISK / "cache", "/var/cache"], check=True)
    (program, *words) = guest.task["peer"]
    target = mount_point("peer")
    with guest.step("mount.erofs"):
        _start(guest, "peer", target, lambda: subprocess.run([program, *words, target], check=True))
        subprocess.run([program, "-u", target], check=True)


def _start(guest, name, target, mount):
    import sys
    import time

    from product import REPOSITORY, drop_caches

    sys.path.append(str(REPOSITORY))
    from bench.workload import start_application

    drop_caches()
    guest.ask("link_reset")
    begin = time.monotonic()
    mount()
    start_application(target)
    guest.fact(f"{name} seconds", time.monotonic() - begin)
    guest.fact(f"{name} bytes", guest.ask("link_bytes"))
