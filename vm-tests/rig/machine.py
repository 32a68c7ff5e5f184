"""One boot of one kernel under QEMU: start it, talk to its guest, never leave it behind.

The guest speaks over a virtio-serial port, one JSON document a line, each with the boot's nonce. A boot has an outcome
only when a line `{"end": …}` with the right nonce arrived; anything else (panic, hang, QEMU gone) is `LostVM`, which is
not a failed test but a missing answer. QEMU and virtiofsd die with this process (PR_SET_PDEATHSIG through setpriv).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
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
    """What one boot is given: a directory of its own, its disk, its task (JSON for the guest) and its limits."""

    image: Image
    folder: Path
    disk: Path
    task: dict[str, Any]
    handlers: Handlers
    limit: float
    label: str = ""
    last: bool = False  # nobody needs its disk: it is not waited for once its result is there
    net: bool = True


def run(boot: Boot) -> dict[str, Any]:
    """Boot, serve the guest's requests, and give the guest's last document. Raises LostVM."""
    nonce = secrets.token_hex(8)
    if boot.folder.is_relative_to("/tmp") or boot.folder.is_relative_to("/run"):
        raise ValueError(f"{boot.folder}: the guest has its own /tmp and /run, and would not see it")
    boot.folder.mkdir(parents=True)
    modules = [str(path) for path in boot.image.modules]
    common = {"systemd": False, "folder": str(boot.folder), "nonce": nonce, "port": PORT_NAME, "modules": modules}
    common["native"] = boot.image.kernel.origin == "host"
    (boot.folder / "task.json").write_text(json.dumps({**common, **boot.task}))
    with contextlib.ExitStack() as stack:
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
        with port:
            return _converse(port, nonce, boot, child)


def _converse(port: socket.socket, nonce: str, boot: Boot, child: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + boot.limit
    end: dict[str, Any] | None = None
    for line in _lines(port, deadline):
        message = json.loads(line)
        if message.get("nonce") != nonce:
            raise LostVM(f"a line without this boot's nonce: {line[:200]!r}")
        if "ask" in message:
            reply = _answer(boot.handlers, message)
            port.sendall(json.dumps(reply).encode() + b"\n")
        elif "end" in message:
            end = message["end"]
            if boot.last:
                break
        elif message.get("cut"):  # the guest wants its power cut: nothing of it may run on
            child.kill()
            end = message["cut"]
            break
        elif "say" in message:
            print(f"    {boot.label}: {message['say']}", file=sys.stderr, flush=True)
    if end is None:
        late = "out of time" if time.monotonic() >= deadline else "the VM ended"
        raise LostVM(f"{late} without a result; console in {boot.folder / 'console.log'}")
    if child.poll() is None and not boot.last:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(15)
    return end


def _lines(port: socket.socket, deadline: float) -> Iterator[bytes]:
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        port.settimeout(left)
        try:
            data = port.recv(65536)
        except TimeoutError:
            return
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


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
    return [*own, sys.executable, "-I", str(HERE / "guest" / "init.py"), "--native", str(boot.folder), str(boot.disk)]


def _qemu(boot: Boot) -> list[str]:
    append = f"{ROOT_FLAGS[boot.image.kernel.root]} {APPEND} rig.folder={boot.folder} {INIT}"
    command = ["qemu-system-x86_64", "-M", "pc", *acceleration(), "-smp", "1", "-m", MEMORY]
    command += ["-no-reboot", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-serial", f"file:{boot.folder / 'console.log'}", "-kernel", str(boot.image.vmlinuz)]
    command += ["-append", append, "-device", "virtio-rng-pci"]
    command += ["-drive", f"file={boot.disk},format=raw,if=virtio,cache=unsafe"]
    command += ["-chardev", f"socket,id=port,path={boot.folder / 'port'}", "-device", "virtio-serial-pci"]
    command += ["-device", f"virtserialport,chardev=port,name={PORT_NAME}"]
    if boot.net:
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
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


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
