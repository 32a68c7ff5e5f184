"""The kernel alone: mkfs.erofs's images through the smallest cachefiles daemon, with and without domain_id."""

import hashlib
import os
import random
import signal
import subprocess
from pathlib import Path

PLANES = ("cachefiles",)
PRODUCT = False
BOOTS = ("mounts",)


def host(host):
    """An image made by somebody else's program (decoded: chunks in a blob; encoded: zstd), and every file's digest."""
    return host.once(f"bare-{host.cell.form}", lambda folder: _make(folder, host.cell.form))


def _make(folder, form):
    from rig.tools import erofs_utils

    source = folder / "tree"
    digests = {}
    numbers = random.Random(1)
    for name, size in (("empty", 0), ("small", 100), ("page", 4096), ("large", 2_500_000), ("deep/er/file", 150_000)):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbers.randbytes(size) + bytes(size))
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    objects = folder / "objects"
    objects.mkdir()
    options = ["-zzstd,3", "-C65536"] if form == "encoded" else ["--chunksize=65536", f"--blobdev={objects / 'blob'}"]
    subprocess.run([erofs_utils() / "mkfs.erofs", "--quiet", *options, objects / "meta", source], check=True)
    return {"objects": str(objects), "digests": digests}


def mounts(guest):
    """Mount, read, unmount, as a volume of its own and in a domain."""
    from cachefiles_filler import Filler
    from lib import DISK, run

    objects = Path(guest.task["objects"])
    with guest.step("bind the device"):
        filler = Filler(DISK / "cache", objects)
        daemon = os.fork()
        if daemon == 0:
            filler.serve()
        os.close(filler.device)
    target = Path("/run/mnt")
    target.mkdir()
    extra = ",cache_strategy=disabled" if guest.task["form"] == "encoded" else ",device=blob"
    for options in ("fsid=meta" + extra, "domain_id=d,fsid=meta" + extra):
        with guest.step(f"mount -t erofs none -o {options}"):
            run("mount", "-t", "erofs", "none", target, "-o", options)
        with guest.step(f"every byte, {options}"):
            compare(target, guest.task["digests"])
        run("umount", target)
    os.kill(daemon, signal.SIGKILL)


def compare(target, digests):
    """Every file below `target` has its bytes."""
    from lib import expect

    for name, digest in digests.items():
        expect(hashlib.sha256((target / name).read_bytes()).hexdigest() == digest, f"{name} differs")
