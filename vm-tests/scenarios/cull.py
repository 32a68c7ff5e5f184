"""The kernel's culling: it says when space is short, culls nothing that is mounted, and asks for the culled again."""

import errno
import os
import select
import signal
from pathlib import Path

from scenarios import bare_cachefiles

PLANES = ("cachefiles",)
PRODUCT = False
DISK = 96 << 20
BOOTS = ("culls",)
LIMITS = {"brun": 60, "bcull": 50, "bstop": 2}


def host(host):
    """The same image as for the kernel alone."""
    return bare_cachefiles.host(host)


def culls(guest):
    """By the product's own calls of the device, without its daemon."""
    from lib import DISK, expect, run, wait_for

    import cachefiles

    cache, target = DISK / "cache", Path("/run/mnt")
    target.mkdir()
    extra = ",cache_strategy=disabled" if guest.task["form"] == "encoded" else ",device=blob"
    command = ("mount", "-t", "erofs", "none", target, "-o", "fsid=meta" + extra)
    with guest.step("bind with limits"):
        device, daemon = _serve(cache, Path(guest.task["objects"]))
    with guest.step("mount and read a little"):
        run(*command)
        (target / "small").read_bytes()
        expect(not _wants_culling(device), "culling is wanted on an empty disk")
    with guest.step("culling is wanted when half of the disk is taken"):
        free = os.statvfs(DISK).f_bavail * os.statvfs(DISK).f_frsize
        with (DISK / "ballast").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, free * 3 // 4)
        bare_cachefiles.compare(target, guest.task["digests"])  # the kernel looks at the space for what is written
        wait_for(lambda: _wants_culling(device), 20, "the kernel does not ask for culling")
    run("umount", target)  # a new object has a name from here on
    wait_for(lambda: _objects(cache), 20, "the objects have no names")
    objects = _objects(cache)
    with guest.step("what is mounted is not culled"):
        run(*command)
        for path in objects:
            expect(cachefiles.in_use(device, path.parent, path.name), f"not in use: {path}")
            expect(_cull(cachefiles, device, path) == errno.EBUSY, f"culled in use: {path}")
    with guest.step("what is not mounted is"):
        run("umount", target)
        wait_for(lambda: not any(cachefiles.in_use(device, path.parent, path.name) for path in objects), 20, "in use")
        refused = {path.name: number for path in objects if (number := _cull(cachefiles, device, path))}
        expect(not refused, f"not culled: {refused}")
        expect(not _objects(cache), f"still there: {_objects(cache)}")
        guest.fact("objects culled", len(objects))
    (DISK / "ballast").unlink()
    with guest.step("the kernel asks for its bytes again"):
        run(*command)
        bare_cachefiles.compare(target, guest.task["digests"])
        run("umount", target)
    os.kill(daemon, signal.SIGKILL)


def _serve(cache, objects):
    from cachefiles_filler import Filler

    filler = Filler(cache, objects, LIMITS)
    daemon = os.fork()
    if daemon == 0:
        filler.serve()
    return filler.device, daemon


def _objects(cache):
    return [path for path in (cache / "cache").rglob("*") if path.is_file()]


def _wants_culling(device):
    poll = select.poll()
    poll.register(device, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))


def _cull(cachefiles, device, path):
    """0, or the errno."""
    try:
        cachefiles.cull(device, path.parent, path.name)
    except OSError as error:
        return error.errno
    return 0
