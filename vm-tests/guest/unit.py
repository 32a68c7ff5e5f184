"""The installed systemd unit in the guest: its program, file and configuration, and its state on the disk."""

import shutil
import sys
from pathlib import Path

from lib import DISK, expect, run
from product import REPOSITORY, loader_json

NAME = "erofs-loader.service"
PROGRAM = Path("/usr/bin/erofs-loader")
STATE = Path("/var/lib/erofs-loader")
CONFIGURATION = Path("/etc/erofs-loader/config.toml")
WRAPPER = """#!/bin/sh
export PYTHONPATH={tree}
exec {python} -c 'import sys; from loader.cli.loader import main; sys.exit(main())' "$@"
"""
# The host's other services are not wanted here, the watchdog's time is cut to what a test can wait for, and a checkout
# may lie below /var/tmp, which PrivateTmp= hides.
DROP_IN = "[Unit]\nWants=\nAfter=\n[Service]\nWatchdogSec={watchdog}\nStandardError=journal+console\n"
SHOWN = f"BindReadOnlyPaths={REPOSITORY}\n" if REPOSITORY.is_relative_to("/var/tmp") else ""


def install(guest, watchdog=10):
    """What a package would put in place, with the cell's plane and form in the configuration."""
    use_tree(REPOSITORY)
    shutil.copy(REPOSITORY / "systemd" / NAME, "/etc/systemd/system/")
    shutil.copy(REPOSITORY / "systemd" / "erofs-loader.conf", "/etc/tmpfiles.d/")
    drop_in = Path(f"/etc/systemd/system/{NAME}.d/test.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(DROP_IN.format(watchdog=watchdog) + SHOWN)
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(
        f'plane = "{guest.task["plane"]}"\nform = "{guest.task["form"]}"\ninsecure = true\n[fetch]\ndeadline = 60.0\n'
    )
    for place in (DISK / "state", STATE):
        place.mkdir(exist_ok=True)
    run("mount", "--bind", DISK / "state", STATE)
    run("systemctl", "daemon-reload")


def use_tree(tree):
    """Point /usr/bin/erofs-loader at the code in `tree`."""
    PROGRAM.write_text(WRAPPER.format(tree=tree, python=sys.executable))
    PROGRAM.chmod(0o755)


def show(name):
    """A property of the unit."""
    return run("systemctl", "show", "--value", "-p", name, NAME).stdout.strip()


def main_pid():
    """The unit's main process."""
    return int(show("MainPID"))


def journal(lines=25):
    """The end of the unit's journal."""
    return run("journalctl", "--no-pager", "-o", "cat", "-n", lines, "-u", NAME, ok=False).stdout


def systemctl(*words, limit=90):
    """`systemctl WORDS erofs-loader.service`; a failure shows the unit's journal."""
    done = run("systemctl", *words, NAME, ok=False, limit=limit)
    expect(done.returncode == 0, f"systemctl {' '.join(words)}: {done.stderr} {journal()}")


def installed(*words):
    """One `erofs-loader` command of the installed program: seconds, under emulation."""
    return run(PROGRAM, *words)


def tree_of(pid):
    """Where a process of the daemon has its code from."""
    pairs = (pair.partition(b"=") for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return {name.decode(): value.decode() for name, _, value in pairs}.get("PYTHONPATH")


def other_build(target, version):
    """Another build of the product: its packages copied, with another version."""
    target.mkdir()
    for name in ("loader", "erofs_builder", "cachefiles", "confine", "fanotify", "mounts"):
        shutil.copytree(REPOSITORY / name, target / name)
    with (target / "loader" / "__init__.py").open("a") as stream:
        stream.write(f'__version__ = "{version}"\n')


def version():
    """What the daemon's status says."""
    return loader_json("status")["version"]
