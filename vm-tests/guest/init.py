"""PID 1 of the guest: prepare the machine, play what the host says, one part after the other, power off.

The root is the host's file system, read-only. What is written goes to tmpfs (/run, /tmp) or to the part's scratch disk
(/run/disk). Each part has a mount namespace with these three, and when its process has ended, all others are killed: so
nothing is left for the next. With `systemd` in the boot's settings the root becomes an overlay that can be written (its
upper layer on tmpfs) and systemd takes over as PID 1; it runs one part as a service, by this file with `--service`.

With `--native` there is no machine, but mount and pid namespaces of the host; the host does what the kernel's side is.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

MS_NOSUID, MS_BIND, MS_MOVE = 2, 4096, 8192
CLONE_NEWNS = 0x20000
RB_POWER_OFF = 0x4321FEDC
SYS_FINIT_MODULE = 313
EEXIST, EBUSY = 17, 16
LIBC = ctypes.CDLL(None, use_errno=True)
MOUNTS = (
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", ""),
    ("tmpfs", "/dev/shm", "tmpfs", ""),
    ("devpts", "/dev/pts", "devpts", "ptmxmode=666"),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ("debugfs", "/sys/kernel/debug", "debugfs", ""),
)
SETTINGS = Path("/run/rig-boot.json")
PATIENCE = 30  # seconds until what a part left behind has to be gone
UNITS = Path("/etc/systemd/system")
# What systemd starts here. All else is of a machine with hardware, users and a network: seconds each, under emulation.
WANTED = {
    "sysinit": ("systemd-journald.service", "systemd-tmpfiles-setup.service"),
    "sockets": ("systemd-journald.socket", "systemd-journald-dev-log.socket", "dbus.socket"),
    "timers": (),
    "local-fs": (),
}
SYSTEMD = Path("/lib/systemd")
SERVICE = """[Unit]
Description=The scenario
DefaultDependencies=no
After=basic.target
Wants=basic.target
[Service]
Type=simple
ExecStart={python} -I {init} --service
StandardOutput=journal+console
KillMode=process
[Install]
"""


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
            if code != EEXIST:
                raise OSError(code, f"finit_module: {os.strerror(code)}", path)


def prepare_machine() -> dict:
    """Mounts, modules, the network. Gives the boot's settings, which are kept in SETTINGS too."""
    mount_all(MOUNTS[:1])
    words = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())
    settings = json.loads((Path(words["rig.folder"]) / "boot.json").read_text())
    mount_all(MOUNTS[1:])
    mount_tmp()
    for path in settings["modules"]:
        load_module(path)
    SETTINGS.write_text(json.dumps(settings))
    return settings


def mount_all(rows) -> None:
    """The pseudo file systems; what the kernel mounted itself stays."""
    for source, target, kind, data in rows:
        if target in ("/dev/shm", "/dev/pts"):
            Path(target).mkdir(exist_ok=True)
        try:
            mount(source, target, kind, MS_NOSUID if kind != "tmpfs" else 0, data)
        except OSError as error:
            if error.errno != EBUSY:
                raise


def mount_tmp() -> None:
    """A /tmp that can be written; a repository that lies below /tmp stays where it is."""
    repository = HERE.parent.parent
    kept = os.open(repository, os.O_PATH | os.O_DIRECTORY)
    try:
        mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")
        if repository.is_relative_to("/tmp"):
            repository.mkdir(parents=True)
            mount(f"/proc/self/fd/{kept}", str(repository), "", MS_BIND)
    finally:
        os.close(kept)


def find_port(name: str):
    """The virtio-serial port of that name, opened."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return open(f"/dev/{entry.name}", "r+b", buffering=0)
    raise FileNotFoundError(f"no virtio port {name}")


def next_task(settings: dict, port) -> dict:
    """Tell the host that a part can be played, and what it answers: nothing if there is none."""
    os.write(port.fileno(), json.dumps({"nonce": settings["nonce"], "ready": True}).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(port.fileno(), 65536)
    task = json.loads(line)
    return task and settings | task


def play(task: dict, port) -> None:
    """Run the scenario's function; its outcome goes to the host from here."""
    from lib import Guest

    guest = Guest(task, port)
    try:
        module = __import__(f"scenarios.{task['scenario']}", fromlist=["*"])
        getattr(module, task["function"])(guest)
        guest.end(ok=True)
    except BaseException as error:
        trace = f"{traceback.format_exc()}\n{logs(task)}"
        guest.end(ok=False, error=f"{type(error).__name__}: {error}", trace=trace)


def play_apart(task: dict, port) -> None:
    """The same in a process with places of its own; at the end none of its processes is left."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if LIBC.unshare(CLONE_NEWNS) < 0:
            raise OSError(ctypes.get_errno(), "unshare")
        mount_own(task["disk"])
        play(task, port)
        os._exit(0)
    while os.wait()[0] != pid:
        pass
    os.kill(-1, signal.SIGKILL)
    wait_for(reaped, "processes are left")
    wait_for(lambda: is_free(task["disk"]), f"{task['disk']} is still in use")
    os.sync()


def wait_for(condition, what: str) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def reaped() -> bool:
    """Whether there is no child any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def is_free(disk: str) -> bool:
    """Whether no file system of that block device is mounted anywhere."""
    try:
        os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != EBUSY:
            raise
        return False
    return True


def mount_own(disk: str) -> None:
    """What can be written, new and empty: /run, /tmp, and the scratch disk as its last boot left it."""
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    mount_tmp()
    Path("/run/disk").mkdir()
    if disk.startswith("/dev/"):
        mount(disk, "/run/disk", "ext4")
    else:
        subprocess.run(["mount", "-o", "loop", disk, "/run/disk"], check=True)


def prepare_process(settings: dict) -> None:
    """What all parts have from their parent: its environment, the network, and the program's modules.

    The program is imported once a boot: under emulation every start of Python takes seconds.
    """
    from lib import network

    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/run", TMPDIR="/tmp", LC_ALL="C.UTF-8")
    if not settings["native"]:
        network()
    if settings["product"]:
        __import__("product").load(settings["native"] or settings["systemd"])


def logs(task: dict) -> str:
    """What the daemon and the kernel said, for a failure."""
    from lib import run

    commands = [("dmesg",), ("cat", "/run/disk/serve.log")]
    if task["systemd"]:
        commands.append(("journalctl", "--no-pager", "-o", "short-monotonic", "-u", "erofs-loader", "-u", "init.scope"))
    return "\n".join(f"--- {' '.join(words)}\n{run(*words, ok=False).stdout[-30000:]}" for words in commands)


def be_systemd() -> None:
    """Make the root writable in memory, install the scenario's service, and become systemd. Does not return."""
    Path("/tmp/upper").mkdir()
    Path("/tmp/work").mkdir()
    Path("/tmp/root").mkdir()
    mount("overlay", "/tmp/root", "overlay", 0, "lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work")
    for name in ("proc", "sys", "dev", "run"):
        mount(f"/{name}", f"/tmp/root/{name}", "", MS_MOVE)
    os.chdir("/tmp/root")
    mount(".", "/", "", MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    mount_tmp()
    init = HERE / "init.py"
    (UNITS / "rig.service").write_text(SERVICE.format(python=sys.executable, init=init))
    (UNITS / "rig.target").write_text("[Unit]\nRequires=basic.target rig.service\nAfter=basic.target\n")
    mount("tmpfs", str(SYSTEMD / "system-generators"), "tmpfs")
    for target, names in WANTED.items():
        for place in (UNITS, SYSTEMD / "system"):
            wants = place / f"{target}.target.wants"
            wants.mkdir(exist_ok=True)
            mount("tmpfs", str(wants), "tmpfs")
        for name in names:
            (wants / name).symlink_to(SYSTEMD / "system" / name)
    Path("/etc/fstab").write_text("")
    Path("/.dockerenv").unlink(missing_ok=True)  # of the host, if it is a container: systemd would believe it
    Path("/etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    os.execv("/lib/systemd/systemd", ["/lib/systemd/systemd", "--unit=rig.target", "--show-status=no"])


def main() -> None:
    """Be PID 1: play part after part, and power off when there is none, or when something of one stays."""
    try:
        settings = prepare_machine()
        if settings["systemd"]:
            be_systemd()
        prepare_process(settings)
        port = find_port(settings["port"])
        while task := next_task(settings, port):
            play_apart(task, port)
        os.sync()
    except BaseException:
        traceback.print_exc()
    LIBC.reboot(ctypes.c_int(RB_POWER_OFF))


def service() -> None:
    """One part, under systemd."""
    settings = json.loads(SETTINGS.read_text())
    prepare_process(settings)
    port = find_port(settings["port"])
    task = next_task(settings, port)
    Path("/run/disk").mkdir()
    mount(task["disk"], "/run/disk", "ext4")
    play(task, port)
    next_task(settings, port)
    os.execvp("systemctl", ["systemctl", "poweroff"])


def native(folder: Path) -> None:
    """One part in namespaces of the host: the same places, and the port is a socket."""
    settings = json.loads((folder / "boot.json").read_text())
    port = socket.socket(socket.AF_UNIX)
    port.connect(str(folder / "port"))
    prepare_process(settings)
    task = next_task(settings, port)
    mount_own(task["disk"])
    play(task, port)


if __name__ == "__main__":
    if sys.argv[1:] == ["--service"]:
        service()
    elif sys.argv[1:2] == ["--native"]:
        native(Path(sys.argv[2]))
    else:
        main()
