"""One boot of one kernel under QEMU: start it, talk to its guest, never leave it behind.

The guest speaks over a virtio-serial port, one JSON document a line, each with the boot's nonce. It says `ready`, is
given a part to play, and says `ready` again once nothing is left of it. A part has an outcome only when a line
`{"end": …}` with the right nonce arrived; anything else (panic, hang, QEMU gone) is `LostVM`, which is not a failed
test but a missing answer. QEMU and virtiofsd die with this process (PR_SET_PDEATHSIG through setpriv).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig.table import HERE, Image

PORT_NAME = "org.erofs-ondemand.rig"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MEMORY = "1536M"
BOOT_LIMIT = 300.0  # seconds to boot, or to clear away; it only ends hangs
OUR_ADDRESS = "10.0.2.2"  # QEMU's user network shows the host's loopback there
# The guest's root is the host's, so the guest runs the interpreter that runs this.
INIT = f"init={sys.executable} -- -I {HERE / 'guest' / 'init.py'}"
# On a busy host the guest measures its TSC wrong (eight times too fast was seen), and all of its deadlines with it.
APPEND = "console=ttyS0 loglevel=4 panic=-1 tsc=unstable clocksource=hpet no_timer_check nokaslr net.ifnames=0 "
# An emulator pays for what silicon does in passing: with addresses that are the same in every process (norandmaps) it
# finds the code that it has translated, and a start of Python takes half the time.
APPEND += "norandmaps mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1 apparmor=0 audit=0"
ROOT_FLAGS = {
    "9p": "root=hostroot rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=1048576,cache=loose ro",
    "virtiofs": "root=hostroot rootfstype=virtiofs ro",
}

Handlers = dict[str, Callable[..., Any]]


class LostVM(Exception):
    """The VM ended, or ran out of time, without saying how its scenario went."""


@dataclass(frozen=True)
class Boot:
    """What one boot is given: a directory of its own, and the scratch disks of what it is to play.

    With `product` the guest imports the program before it plays, and what it plays has it at once.
    """

    image: Image
    folder: Path
    disks: tuple[Path, ...]
    systemd: bool = False
    product: bool = False


@dataclass(frozen=True)
class Part:
    """What a machine plays: a scenario's function (`task`, JSON for the guest), on which disk, and for how long."""

    task: dict[str, Any]
    disk: Path
    handlers: Handlers
    limit: float
    label: str = ""


class Machine:
    """A machine that runs: it plays parts one after the other, until one is lost or it is closed.

    `cpu_seconds` is its processor time until the last part's end, with what emulates its devices (on the host's own
    kernel it is nothing: there is no machine).
    """

    def __init__(self, boot: Boot) -> None:
        self._boot, self._nonce = boot, secrets.token_hex(8)
        if boot.folder.is_relative_to("/tmp") or boot.folder.is_relative_to("/run"):
            raise ValueError(f"{boot.folder}: the guest has its own /tmp and /run, and would not see it")
        with contextlib.ExitStack() as stack:
            self._port, self._child = self._start(stack)
            self._stack = stack.pop_all()
        self._rest = b""
        self.cpu_seconds = 0.0

    def _start(self, stack: contextlib.ExitStack) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        boot = self._boot
        boot.folder.mkdir(parents=True)
        modules = [str(path) for path in boot.image.modules]
        settings: dict[str, Any] = {"nonce": self._nonce, "port": PORT_NAME, "modules": modules}
        settings |= {"systemd": boot.systemd, "product": boot.product, "native": boot.image.kernel.origin == "host"}
        (boot.folder / "boot.json").write_text(json.dumps(settings))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(boot.folder / "port"))
        listener.listen()
        listener.settimeout(20)
        if boot.image.kernel.root == "virtiofs":
            stack.enter_context(_virtiofsd(boot.folder))
        log = boot.folder / "machine.log"
        with log.open("wb") as stream:
            child = stack.enter_context(_child(["setpriv", "--pdeathsig", "KILL", *_command(boot)], stream))
        try:
            port, _ = listener.accept()
        except TimeoutError:
            raise LostVM(f"the machine did not start, see {log}") from None
        return stack.enter_context(port), child

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def await_ready(self) -> None:
        """Until it can be given a part: it has booted, or nothing is left of the part before. Raises LostVM."""
        for message in self._messages(time.monotonic() + BOOT_LIMIT):
            if message.get("ready"):
                return
        raise LostVM(f"the machine did not become ready; console in {self._boot.folder / 'console.log'}")

    def play(self, part: Part) -> dict[str, Any]:
        """Once it is ready: play the part, serve the guest's requests, give its last document. Raises LostVM."""
        disk = str(part.disk) if self._boot.image.kernel.origin == "host" else self._device(part.disk)
        task = {"nonce": self._nonce, "folder": str(self._boot.folder), "disk": disk, **part.task}
        self._send(task)
        deadline = time.monotonic() + part.limit
        for message in self._messages(deadline):
            if "ask" in message:
                self._send(_answer(part.handlers, message))
            elif "end" in message:
                self._note_time()
                return dict(message["end"])
            elif message.get("cut"):  # the guest wants its power cut: nothing of it may run on
                self._note_time()
                self._child.kill()
                self._child.wait()
                return dict(message["cut"])
            elif "say" in message:
                print(f"    {part.label}: {message['say']}", file=sys.stderr, flush=True)
        late = "out of time" if time.monotonic() >= deadline else "the VM ended"
        raise LostVM(f"{late} without a result; console in {self._boot.folder / 'console.log'}")

    @property
    def running(self) -> bool:
        """Whether nothing has ended it yet."""
        return self._child.poll() is None

    def power_off(self) -> None:
        """In order, once it is ready: what was written is on the disks afterwards."""
        self._send({})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(15)

    def _note_time(self) -> None:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
            self.cpu_seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _device(self, disk: Path) -> str:
        return f"/dev/vd{string.ascii_lowercase[self._boot.disks.index(disk)]}"

    def _send(self, document: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._port.sendall(json.dumps(document).encode() + b"\n")

    def _messages(self, deadline: float) -> Iterator[dict[str, Any]]:
        """What the guest says until then, or until it is gone."""
        while (left := deadline - time.monotonic()) > 0:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                message = json.loads(line)
                if message.get("nonce") != self._nonce:
                    raise LostVM(f"a line without this boot's nonce: {line[:200]!r}")
                yield message
                continue
            self._port.settimeout(left)
            try:
                data = self._port.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return
            if not data:
                return
            self._rest += data


def _answer(handlers: Handlers, message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": handlers[message["ask"]](*message.get("arguments", []))}
    except Exception as error:  # the guest shows it as the failure of its own step
        return {"error": f"{type(error).__name__}: {error}"}


@contextlib.contextmanager
def _child(command: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _command(boot: Boot) -> list[str]:
    return _native(boot) if boot.image.kernel.origin == "host" else _qemu(boot)


def _native(boot: Boot) -> list[str]:
    """No machine but namespaces of this one: its processes end with it, and nothing of its mounts is seen outside."""
    own = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*own, sys.executable, "-I", str(HERE / "guest" / "init.py"), "--native", str(boot.folder)]


def _qemu(boot: Boot) -> list[str]:
    append = f"{ROOT_FLAGS[boot.image.kernel.root]} {APPEND} rig.folder={boot.folder} {INIT}"
    command = ["qemu-system-x86_64", "-M", "pc", *acceleration(), "-smp", "1", "-m", MEMORY]
    command += ["-no-reboot", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-serial", f"file:{boot.folder / 'console.log'}", "-kernel", str(boot.image.vmlinuz)]
    command += ["-append", append, "-device", "virtio-rng-pci"]
    for disk in boot.disks:
        command += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    command += ["-chardev", f"socket,id=port,path={boot.folder / 'port'}", "-device", "virtio-serial-pci"]
    command += ["-device", f"virtserialport,chardev=port,name={PORT_NAME}"]
    command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    if boot.image.kernel.root == "9p":
        command += ["-virtfs", "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"]
    else:
        command += _virtiofs_arguments(boot.folder)
    return command


def acceleration() -> list[str]:
    """KVM where the processor has it and the device opens; else TCG, where more than one vCPU only slows it down."""
    flags = Path("/proc/cpuinfo").read_text()
    if (" vmx " in flags or " svm " in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ["-accel", "kvm", "-accel", "tcg", "-cpu", "max"]
    # `max` would emulate wide vectors and deep page tables, slowly; without rdrand Python finds no randomness at boot.
    return ["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand,+rdseed"]


@contextlib.contextmanager
def _virtiofsd(folder: Path) -> Iterator[None]:
    """The host's root for the guest, through a bind mount that cannot be written, in a mount namespace of its own."""
    root = folder / "root"
    root.mkdir()
    script = f"mount --bind / {root} && mount -o remount,bind,ro {root} && exec {VIRTIOFSD} --socket-path={folder}/fs "
    script += f"-o source={root} -o sandbox=chroot -o cache=always -o xattr --thread-pool-size=2"
    with (folder / "virtiofsd.log").open("wb") as log:
        with _child(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", script], log) as child:
            for _ in range(200):
                if (folder / "fs").exists():
                    break
                if child.poll() is not None:
                    raise LostVM(f"virtiofsd did not start, see {folder / 'virtiofsd.log'}")
                time.sleep(0.05)
            yield


def _virtiofs_arguments(folder: Path) -> list[str]:
    memory = ["-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on", "-numa", "node,memdev=ram"]
    device = ["-chardev", f"socket,id=fs,path={folder / 'fs'}", "-device", "vhost-user-fs-pci,chardev=fs,tag=hostroot"]
    return memory + device
