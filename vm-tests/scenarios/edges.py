"""Reads across what kernels round to (blocks, 64 KiB, the readahead), and metadata while the registry is away."""

import hashlib
import os
from pathlib import Path

BOOTS = ("reads",)
LIMIT = 240
PIECE = 65_536 + 1  # each piece begins and ends at another place in its block
ADVICE = {"first": "RANDOM", "second": "SEQUENTIAL"}  # no readahead, and twice the usual


def host(host):
    """Two images whose registry can go away."""
    from rig.product import published

    return published(host)


def reads(guest):
    """Metadata first, with nothing else here; then large files, cold, from their end to their start."""
    from lib import expect
    from product import Daemon, drop_caches, loader, loader_json, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    with guest.step("mount both"):
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
    guest.ask("registry_stop")
    try:
        with guest.step("all metadata without the registry"):
            before = _counters(loader_json)
            drop_caches()
            for name, image in images.items():
                expect(_names(mount_point(name)) == len(image["files"]), f"{name}: not every file is listed")
            after = _counters(loader_json)
            guest.fact("READs for metadata, once mounted", after["requests"] - before["requests"])
            expect(after["fetched_bytes"] == before["fetched_bytes"], "listing files fetched something")
            expect(not after["requests_failed"], "a READ for metadata failed")
    finally:
        guest.ask("registry_start")
    for number, (name, advice) in enumerate(ADVICE.items()):
        with guest.step(f"large files backwards in odd pieces, POSIX_FADV_{advice}"):
            before = _counters(loader_json)
            for path in (f"opt/{name}/data", f"opt/{name}/text", f"usr/lib/lib{number}.so"):
                found = _backwards(mount_point(name) / path, getattr(os, f"POSIX_FADV_{advice}"))
                expect(found == images[name]["files"][path], f"{path}: wrong bytes")
            after = _counters(loader_json)
            asked = {key: after[key] - before[key] for key in ("requests", "request_bytes")}
            expect(asked["requests"], "nothing was asked for: the test proves nothing")
            guest.fact(f"bytes a READ, {advice.lower()}", asked["request_bytes"] // asked["requests"])
    with guest.step("umount"):
        for name in images:
            loader("umount", mount_point(name))
    with guest.step("SIGTERM"):
        daemon.stop()


def _counters(loader_json):
    return loader_json("stats")["counters"]


def _names(target):
    """How many regular files there are, each one's inode and attributes read."""
    count = 0
    for folder, _, names in os.walk(target):
        for name in names:
            path = Path(folder) / name
            os.listxattr(path, follow_symlinks=False)
            count += path.is_file() and not path.is_symlink()
    return count


def _backwards(path, advice):
    """sha256 of a file that is read from its end to its start."""
    pieces = []
    with path.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, advice)
        for offset in reversed(range(0, path.stat().st_size, PIECE)):
            pieces.append(os.pread(stream.fileno(), PIECE, offset))
    return hashlib.sha256(b"".join(reversed(pieces))).hexdigest()
