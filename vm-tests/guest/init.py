"""PID 1 of the guest: prepare the machine, run one function of a scenario, report, power off.

The root is the host's file system, read-only. What is written goes to tmpfs (/run, /tmp) or to the scratch disk
(/run/disk).
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
RB_POWER_OFF = 0x4321FEDC
MODULE_INIT_COMPRESSED_FILE = 4
SYS_FINIT_MODULE = 313
LIBC = ctypes.CDLL(None, use_errno=True)
MOUNTS = (
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", ""),
    ("tmpfs", "/dev/shm", "tmpfs", ""),
    ("devpts", "/dev/pts", "devpts", "ptmxmode=666"),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ("debugfs", "/sys/kernel/debug", "debugfs", ""),
)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    done = LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind}: {os.strerror(code)}", target)


def load_module(path: str) -> None:
    """finit_module(2) on an uncompressed module; one that is there already is fine."""
    with open(path, "rb") as stream:
        if LIBC.syscall(SYS_FINIT_MODULE, stream.fileno(), b"", 0) < 0:
            code = ctypes.get_errno()
            if code != 17:
                raise OSError(code, f"finit_module: {os.strerror(code)}", path)


def prepare_machine() -> tuple[dict, "object"]:
    """Mounts, modules, the port to the host, the scratch disk, the network. Gives the task and the port's file."""
    for source, target, kind, data in MOUNTS:
        if target in ("/dev/shm", "/dev/pts"):
            Path(target).mkdir(exist_ok=True)
        try:
            mount(source, target, kind, MS_NOSUID if kind != "tmpfs" else 0, data)
        except OSError as error:
            if error.errno != 16:  # devtmpfs mounted itself
                raise
    words = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())
    task = json.loads((Path(words["rig.folder"]) / "task.json").read_text())
    for path in task["modules"]:
        load_module(path)
    port = find_port(task["port"])
    Path("/run/disk").mkdir()
    mount("/dev/vda", "/run/disk", "ext4")
    return task, port


def find_port(name: str):
    """The virtio-serial port of that name, opened."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return open(f"/dev/{entry.name}", "r+b", buffering=0)
    raise FileNotFoundError(f"no virtio port {name}")


def child(task: dict, port) -> None:
    """Run the scenario's function; its outcome goes to the host from here."""
    from lib import Guest, network

    guest = Guest(task, port)
    try:
        os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/run", TMPDIR="/tmp", LC_ALL="C.UTF-8")
        network()
        module = __import__(f"scenarios.{task['scenario']}", fromlist=["*"])
        getattr(module, task["function"])(guest)
        guest.end(ok=True)
    except BaseException as error:
        guest.end(ok=False, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def main() -> None:
    """Be PID 1: reap everything, and power off when the scenario's process has ended."""
    try:
        task, port = prepare_machine()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            child(task, port)
            os._exit(0)
        while os.wait()[0] != pid:
            pass
        os.sync()
    except BaseException:
        traceback.print_exc()
    LIBC.reboot(ctypes.c_int(RB_POWER_OFF))


if __name__ == "__main__":
    main()
