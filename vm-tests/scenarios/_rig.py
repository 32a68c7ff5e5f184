"""What the rig itself must get right: tests/test_vm.py runs these, the matrix does not."""

import os
import time
from pathlib import Path


def passes(guest):
    """A step, a fact, a question to the host."""
    with guest.step("ask"):
        guest.fact("sum", guest.ask("add", 2, 3))


def fails(guest):
    """An expectation that does not hold."""
    from lib import expect

    with guest.step("wrong"):
        expect(False, "as it should")


def panics(guest):
    """The kernel is gone before any result."""
    Path("/proc/sysrq-trigger").write_text("c")


def hangs(guest):
    """Never ends."""
    while True:
        time.sleep(60)


def forges(guest):
    """Console output and a wrong nonce are no result."""
    os.write(2, b'{"end": {"ok": true}}\n')
    guest.task["nonce"] = "0" * 16
    guest.end(ok=True)


def writes(guest):
    """Try to write into the host."""
    from lib import expect

    with guest.step("read-only"):
        try:
            (Path(guest.task["folder"]) / "task.json").write_text("")
        except OSError as error:
            expect(error.errno == 30, f"errno {error.errno}")
        else:
            expect(False, "the host's file system can be written")


def leaves(guest):
    """Processes, one with a session of its own, files, and a mount."""
    import subprocess

    from lib import DISK, run

    with guest.step("leave something"):
        for place in (DISK, Path("/run"), Path("/tmp")):
            (place / "left").mkdir()
        subprocess.Popen(["sleep", "1000"], cwd=DISK)
        subprocess.Popen(["sleep", "1000"], cwd=DISK, start_new_session=True)
        run("mount", "-t", "tmpfs", "left", DISK / "left")


def finds_nothing(guest):
    """What `leaves` left is gone."""
    from lib import DISK, expect, run

    with guest.step("look"):
        found = [str(place) for place in (DISK, Path("/run"), Path("/tmp")) if (place / "left").exists()]
        expect(not found, f"left below {found}")
        expect("left" not in run("cat", "/proc/mounts").stdout, "still mounted")
        running = run("pgrep", "sleep", ok=False).stdout
        expect(not running, f"still running: {running}")
