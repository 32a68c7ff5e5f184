"""A Debian kernel as it is: its image, its config, and the few modules that the guest needs, in load order.

Its virtiofs and virtio_pci are built in, so it boots from the host's root without an initramfs, and the guest's init
loads the modules by path from the cache.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

from rig.apt import Apt

MODULES = (
    "erofs",
    "cachefiles",
    "overlay",
    "loop",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "veth",
    "autofs4",
    "sch_netem",
)


def unpack(apt: Apt, package: str, version: str, work: Path, result: Path) -> None:
    """Fill the cache entry `result` from linux-image-R, or from linux-binary-R, linux-modules-R and linux-base-R."""
    names = [package]
    if package.startswith("linux-binary-"):
        release = package.removeprefix("linux-binary-")
        names += [f"linux-modules-{release}", f"linux-base-{release}"]
    for name in names:
        deb = apt.download(name, version, work)
        subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "root")], check=True)
        deb.unlink()
    (vmlinuz,) = [path for path in (work / "root").rglob("vmlinuz*") if path.is_file()]
    shutil.copy(vmlinuz, result / "vmlinuz")
    for config in (work / "root").rglob("config*"):
        if config.is_file() and "CONFIG_EROFS_FS" in config.read_text(errors="replace"):
            shutil.copy(config, result / "config")
    order = _copy_modules(work / "root", result / "modules")
    (result / "load").write_text("".join(f"{name}\n" for name in order))


def _copy_modules(root: Path, target: Path) -> list[str]:
    """The wanted modules and what they depend on, decompressed; their file names, dependencies first."""
    target.mkdir()
    files = {path.name.split(".ko")[0].replace("_", "-"): path for path in root.rglob("*.ko*")}
    order: list[str] = []

    def visit(name: str) -> None:
        path = files.get(name.replace("_", "-"))
        if path is None or f"{path.name.split('.ko')[0]}.ko" in order:
            return  # built in, or there already
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for needed in _depends(data):
            visit(needed)
        file_name = f"{path.name.split('.ko')[0]}.ko"
        (target / file_name).write_bytes(data)
        order.append(file_name)

    for name in MODULES:
        visit(name)
    return order


def _depends(module: bytes) -> list[str]:
    """The `depends=` of a module's .modinfo: NUL-terminated `key=value` strings."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    value = module[start + 9 : module.index(b"\0", start + 9)].decode()
    return [name for name in value.split(",") if name]
