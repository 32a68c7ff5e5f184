"""The demo in a guest: mount a Debian image over a slow link and start an application from it. Not in the matrix.

With `peer` in the task, a command that lacks the mount point, the same by mount.erofs afterwards.
"""

BOOTS = ("starts",)
LIMIT = 900


def starts(guest):
    """Serve, mount, start, with nothing cached."""
    from product import Daemon, loader, mount_point

    with guest.step("serve"):
        daemon = Daemon(guest).start()
    target = mount_point("debian")
    _start(guest, target, lambda: loader("mount", guest.task["reference"], target), "")
    loader("umount", target)
    daemon.stop()
    if guest.task.get("peer"):
        _peer_starts(guest)


def _peer_starts(guest):
    import subprocess

    from lib import DISK
    from product import mount_point

    cache = DISK / "cache"
    cache.mkdir()
    subprocess.run(["mount", "--bind", cache, "/var/cache"], check=True)  # it can be told no other place
    command, target = guest.task["peer"], mount_point("peer")
    _start(guest, target, lambda: subprocess.run([*command, target], check=True), "peer ")
    subprocess.run([command[0], "-u", target], check=True)


def _start(guest, target, mount, of):
    """The link's counters are the host's; facts are named `of`."""
    import sys
    import time

    from product import REPOSITORY, drop_caches

    sys.path.append(str(REPOSITORY))
    from bench.workload import start_application

    drop_caches()
    guest.ask("link_reset")
    begin = time.monotonic()
    with guest.step(f"{of}mount"):
        mount()
    guest.fact(f"{of}ready", time.monotonic() - begin)
    with guest.step(f"{of}start"):
        start_application(target)
    guest.fact(f"{of}output", time.monotonic() - begin)
    guest.fact(f"{of}fetched", guest.ask("link_bytes"))
