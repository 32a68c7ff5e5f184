"""SIGKILL of the worker, again and again, and of the keeper, while eight processes read through a slow link."""

import os
import signal
import time

BOOTS = ("kills",)
LIMIT = 420


def host(host):
    """The registry behind a link that makes reading last long enough to be interrupted."""
    from rig.product import published, slow_link

    task = published(host)
    return slow_link(host, task, rate=0.2e6)


def kills(guest):
    """Readers wait, then get the right bytes."""
    from lib import expect
    from product import Daemon, Readers, expect_right, loader, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    with guest.step("mount both"):
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
    readers = Readers([mount_point(name) for name in images], copies=4)
    for what, rounds, pause in (("loader.worker", 3, 1.0), ("loader.keeper", 2, 2.0)):
        with guest.step(f"SIGKILL {what}, {rounds} times"):
            killed = 0
            for _ in range(rounds):
                time.sleep(pause)
                killed += sum(_kill(pid) for pid in daemon.await_processes(what))
            guest.fact(f"{what} killed", killed)
            guest.fact(f"readers still reading after that ({what})", readers.running())
            expect(killed >= rounds, f"only {killed} processes were there to be killed")
    expect(readers.running(), "all readers had ended before the last kill: the test proves nothing")
    guest.ask("link_fast")
    with guest.step("every byte, by every reader"):
        expect_right(readers.results(240), images)
    with guest.step("umount"):
        for name in images:
            loader("umount", mount_point(name))
    with guest.step("SIGTERM"):
        daemon.stop()


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1
