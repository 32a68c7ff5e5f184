"""Bits flip in the kernel's own cache files: its complaint and `scrub` find them, and the bytes are right after."""

import hashlib
import os
from pathlib import Path

PLANES = ("cachefiles",)
BOOTS = ("rots",)
LIMIT = 300


def host(host):
    """One image is enough."""
    from rig.product import published

    return published(host)


def rots(guest):
    """Under a mount, by the kernel's word (encoded) and by `scrub`; then with nothing mounted."""
    from lib import expect, wait_for
    from product import Daemon, compare, drop_caches, loader, loader_json, mount_point

    image, target = guest.task["images"]["first"], mount_point("first")
    reference, files = image["reference"], image["files"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    with guest.step("mount, and every byte"):
        loader("mount", reference, target)
        compare(target, files)
    with guest.step("new files cannot be looked into, and it says so"):
        report = loader_json("scrub")
        expect(report["frames"] == 0 and "new" in str(report["skipped"]), report)
    with guest.step("the files get their names, and are mounted again"):
        loader("umount", target)
        wait_for(_cache_files, 60, "the kernel's files have no names")
        guest.fact("mode of its files", f"{_cache_files()[0].stat().st_mode & 0o7777:04o}")
        loader("mount", reference, target)
    with guest.step("nothing is wrong"):
        report = loader_json("scrub")
        guest.fact("frames", report["frames"])
        expect(report["frames"] > 0 and not report["damaged"] and not report["skipped"], report)
    if guest.task["form"] == "encoded":
        with guest.step("the kernel notices"):
            _flip()
            seen = _read(target)
            wrong = {path: what for path, what in seen.items() if what not in (files[path], "errno 5", "errno 117")}
            expect(not wrong, f"wrong bytes: {wrong}")
            guest.fact("files with an error at first", sum(what.startswith("errno") for what in seen.values()))
        with guest.step("and is heeded"):
            wait_for(lambda: _read(target) == files, 90, "not repaired")
            expect(loader_json("stats")["counters"]["damaged_frames"] > 0, "no frame counts as damaged")
    for mounted in (True, False):
        with guest.step(f"scrub finds what {'is' if mounted else 'nothing has'} mounted"):
            drop_caches()
            if not mounted:
                loader("umount", target)
            _flip()
            damaged = _scrub(mounted)
            guest.fact(f"damaged frames, {'mounted' if mounted else 'unmounted'}", damaged)
            if not mounted:
                loader("mount", reference, target)
            drop_caches()
            compare(target, files)
    _metadata_rots(guest, reference, target, files)
    with guest.step("nothing is wrong any more"):
        expect(not (report := loader_json("scrub"))["damaged"], report)
    with guest.step("umount and SIGTERM"):
        loader("umount", target)
        daemon.stop()


def _metadata_rots(guest, reference, target, files):
    """What is mounted is written over; what nothing has mounted goes."""
    from lib import expect
    from product import compare, drop_caches, loader, loader_json

    for mounted in (True, False):
        with guest.step(f"and metadata, where it {'is' if mounted else 'was'} mounted"):
            if not mounted:
                loader("umount", target)
            _flip(_metadata_files())
            done = loader("scrub", ok=False)
            expect(done.returncode == 12 and "1 were damaged" in done.stdout, f"{done.returncode}: {done.stdout}")
            expect(bool(_metadata_files()) == mounted, f"what is mounted is written over, else it goes: {mounted}")
            if mounted:
                expect(not (report := loader_json("scrub"))["damaged"], report)
                loader("umount", target)
            loader("mount", reference, target)
            drop_caches()
            compare(target, files)


def _scrub(mounted):
    """How many frames were damaged; all are repaired, or gone with their file."""
    from lib import expect, wait_for
    from product import LOG, loader, loader_json

    before, repaired = loader_json("stats")["counters"]["damaged_frames"], _repaired(LOG)
    done = loader("scrub", ok=False)
    expect(done.returncode == 12 and "were damaged" in done.stdout, f"{done.returncode}: {done.stdout} {done.stderr}")
    damaged = loader_json("stats")["counters"]["damaged_frames"] - before
    expect(damaged > 0, "none is counted")
    if mounted:
        wait_for(lambda: _repaired(LOG) - repaired == damaged, 90, "not repaired")
    else:
        expect(not _cache_files(), "damaged files are still there")
    return damaged


def _repaired(log):
    return log.read_text(errors="replace").count("damaged frames are repaired")


def _cache_files():
    """The kernel's files of blobs."""
    return [path for path in _kernels_files() if not _is_metadata(path)]


def _metadata_files():
    """Those of images' metadata."""
    return [path for path in _kernels_files() if _is_metadata(path)]


def _kernels_files():
    from product import ROOT

    return list((ROOT / "cachefiles/cache").glob("I*/@*/D*"))


def _is_metadata(path):
    return path.name.partition(".")[0].endswith(("-encoded", "-decoded"))


def _flip(paths=None):
    """One bit in every 50,000 bytes, on the disk."""
    from product import drop_caches

    for path in _cache_files() if paths is None else paths:
        with path.open("r+b") as stream:
            for offset in range(20_000, max(path.stat().st_size, 20_001), 50_000):
                stream.seek(offset)
                byte = stream.read(1)
                stream.seek(offset)
                stream.write(bytes((byte[0] ^ 4,)))
            os.fsync(stream.fileno())
    drop_caches()


def _read(target):
    """Path → sha256, or `errno N`, of each file that is in no memory; by another process than the daemon."""
    from product import drop_caches

    drop_caches()
    found = {}
    for folder, _, names in os.walk(target):
        for path in (Path(folder) / name for name in names):
            if path.is_file() and not path.is_symlink():
                try:
                    found[str(path.relative_to(target))] = hashlib.sha256(path.read_bytes()).hexdigest()
                except OSError as error:
                    found[str(path.relative_to(target))] = f"errno {error.errno}"
    return found
