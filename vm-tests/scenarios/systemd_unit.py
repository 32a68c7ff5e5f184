"""systemd as PID 1, the installed unit: reload, restart, crash, watchdog and upgrade under load."""

import os
import signal
import time
from pathlib import Path

SYSTEMD = True
NATIVE = False
ONCE = "plane"
BOOTS = ("under_load",)
LIMIT = 600
EXPOSURE = 3.0


def host(host):
    """Two images; a slow link that lets reading last through it all."""
    from rig.product import published, slow_link

    return slow_link(host, published(host), rate=0.12e6)


def under_load(guest):
    """Everything that may happen to a unit while eight processes read."""
    import unit
    from lib import expect, run, wait_for
    from product import Readers, expect_right, loader, mount_point

    images = guest.task["images"]
    unit.install(guest)
    with guest.step("systemd-analyze verify and security"):
        run("systemd-analyze", "verify", "--man=no", unit.NAME)
        table = run("systemd-analyze", "security", "--no-pager", unit.NAME).stdout
        exposure = float(table.strip().splitlines()[-1].split(":")[1].split()[0])
        guest.fact("exposure", exposure)
        expect(exposure <= EXPOSURE, f"exposure {exposure}")
    with guest.step("systemctl start (Type=notify)"):
        unit.systemctl("start")
        unit.installed("status")
    with guest.step("mount both"):
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
        guest.fact("descriptors in the store", int(unit.show("NFileDescriptorStore")))
    readers = Readers([mount_point(name) for name in images], copies=4)
    with guest.step("systemctl reload"):
        before = unit.main_pid()
        unit.systemctl("reload")
        expect(unit.main_pid() == before, "the main process changed")
    with guest.step("systemctl restart"):
        unit.systemctl("restart")
        expect(unit.main_pid() != before, "the main process did not change")
        loader("status")
    with guest.step("SIGKILL the main process"):
        _replaced(unit, wait_for, lambda pid: os.kill(pid, signal.SIGKILL))
    _never_gives_up(guest, unit)
    with guest.step("the watchdog ends a main process that hangs"):
        _replaced(unit, wait_for, lambda pid: os.kill(pid, signal.SIGSTOP))
    _upgrade(guest, unit)
    guest.fact("readers still reading after all that", readers.running())
    guest.ask("link_fast")
    with guest.step("every byte, by every reader"):
        expect_right(readers.results(240), images)
    with guest.step("umount and stop"):
        for name in images:
            loader("umount", mount_point(name))
        unit.systemctl("stop")
        expect(unit.show("Result") == "success", f"result {unit.show('Result')}: {unit.journal()}")


def _never_gives_up(guest, unit):
    """A unit that failed would lose its descriptors."""
    from lib import expect, wait_for
    from product import loader

    with guest.step("SIGKILL the main process, six times with a second between"):
        for _ in range(6):
            wait_for(unit.main_pid, 30, "the unit was given up", pause=0.2)
            os.kill(unit.main_pid(), signal.SIGKILL)
            time.sleep(1)
        _active(unit, wait_for)
        loader("status")
        guest.fact("restarts", int(unit.show("NRestarts")))
    with guest.step("SIGKILL the main process with a mistake in the configuration"):
        right = unit.CONFIGURATION.read_text()
        unit.CONFIGURATION.write_text("deadline = [")
        before = unit.main_pid()
        os.kill(before, signal.SIGKILL)
        _active(unit, wait_for, before)
        unit.CONFIGURATION.write_text(right)
        loader("status")
        expect("started with the settings of before" in unit.journal(200), unit.journal())


def _upgrade(guest, unit):
    from lib import expect

    with guest.step("upgrade to another build"):
        other = Path("/run/other-build")
        unit.other_build(other, "99.1")
        unit.use_tree(other)
        unit.systemctl("restart")
        expect(unit.version() == "99.1", f"version {unit.version()}")
        expect(unit.tree_of(unit.main_pid()) == str(other), f"the code is {unit.tree_of(unit.main_pid())}")


def _replaced(unit, wait_for, harm):
    from product import loader

    before = unit.main_pid()
    harm(before)
    _active(unit, wait_for, before)
    loader("status")


def _active(unit, wait_for, before=0):
    wait_for(
        lambda: unit.main_pid() not in (0, before) and unit.show("ActiveState") == "active",
        90,
        "the unit did not come back",
        pause=0.5,  # each look is a program of systemd's
    )
