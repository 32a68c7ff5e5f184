"""Page cache shared between images: read through one, in memory for another of its domain, for no other."""

import ctypes
import mmap
import os
import shutil
from pathlib import Path

PLANES = ("fanotify",)
FORMS = ("encoded",)  # the decoded form does not share: loader/worker/sharing.py
NATIVE = False  # for kernels of 7.0 and later
BOOTS = ("shares",)
LIMIT = 300
READ = ("usr/bin/large", "usr/lib/lib0.so", "etc/conf.d/003.conf", "var/zeros")


def host(host):
    """Two images of one owner with the same lowest layer, whose blobs are not the same; and one of another owner."""
    from rig import images
    from rig.product import counted

    host.once("fingerprints", lambda folder: _publish(host, folder))
    config = (host.cell.image.vmlinuz.parent / "config").read_text()
    task = {name: f"docker://{host.seen(host.registry.address)}/{repository}" for name, repository in NAMES.items()}
    files = {path: images.expected("first")[path] for path in READ}
    shares = "CONFIG_EROFS_FS_PAGE_CACHE_SHARE=y" in config
    return {"references": task, "files": files, "shares": shares, **counted(host)}


NAMES = {
    "first": "rig/one:first",
    "second": "rig/two:second",
    "elsewhere": "other/one:first",
    "program": "rig/three:program",
    "same program": "rig/four:program",
}
PROGRAM = Path("/usr/bin/sha256sum")


def _publish(host, folder):
    from rig import images

    layout = images.write_layout(folder / "layout", ("first", "second"))
    (folder / "program").mkdir()
    shutil.copy(PROGRAM, folder / "program")
    for level, repository in enumerate(NAMES.values(), 1):
        name = repository.rpartition(":")[2]
        source = f"rootfs:{folder / name}" if name == "program" else f"oci:{layout}:{name}"
        target = f"docker://{host.registry.address}/{repository}"
        options = ("--insecure", "--fingerprints", "all", "--level", str(level))
        host.program("loader.cli.builder", "convert", source, target, *options)


def shares(guest):
    """Residency by mincore before anything is read; bytes and the registry's counters for the rest."""
    from lib import expect, run
    from product import Daemon, drop_caches, loader, loader_json, mount_point

    references, files = guest.task["references"], guest.task["files"]
    first, second, other, elsewhere = (mount_point(name) for name in ("first", "second", "other", "elsewhere"))
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    policy = loader_json("status")["page_domain"]
    expect(policy == ("auto" if guest.task["shares"] else "off"), f"page_domain is {policy}")
    if not guest.task["shares"]:
        guest.fact("page cache shared", "this kernel was built without")
        daemon.stop()
        return
    with guest.step("mount"):
        domain = loader_json("mount", references["first"], first)["domain"]
        expect(loader_json("mount", references["second"], second)["domain"] == domain, "one owner, two domains")
        expect(loader_json("mount", references["second"], other, "--domain", "other")["domain"] == "other", "--domain")
        expect(loader_json("mount", references["elsewhere"], elsewhere)["domain"] != domain, "two owners, one domain")
    with guest.step("read through the first image"):
        expect(not any(resident(second / path)[0] for path in files), "pages are there before they were read")
        expect_files(first, files)
    with guest.step("in memory for the second image, not for other domains"):
        for path in files:
            here, pages = resident(second / path)
            expect(here == pages, f"{path}: {here} of {pages} pages for the second image")
            for target in (other, elsewhere):
                here, pages = resident(target / path)
                expect(here == 0, f"{path}: {here} of {pages} pages in another domain")
        guest.fact("pages of the second image in memory, unread", "{} of {}".format(*resident(second / READ[0])))
        guest.fact("pages of another domain in memory", "{} of {}".format(*resident(other / READ[0])))
    guest.ask("registry_stop")
    try:
        with guest.step("read through the second image without a fetch"):
            before = asked()
            expect_files(second, files)
            expect(before == asked(), f"the kernel asked for something: {before} {asked()}")
    finally:
        guest.ask("registry_start")
    with guest.step("read through other domains"):
        before = loader_json("stats")["counters"]["fetched_bytes"]
        expect_files(other, files)
        expect_files(elsewhere, files)
        expect(loader_json("stats")["counters"]["fetched_bytes"] > before, "nothing was fetched for another domain")
    with guest.step("the first image goes, the second one stays"):
        loader("umount", first)
        expect(resident(second / READ[0])[0] > 0, "the pages went with the image that read them")
        expect_files(second, files)
        drop_caches()
        expect_files(second, files)
    with guest.step("run a program, then from the other image's pages, also under an overlay"):
        program, same = _run_from_shared_pages(guest, references)
    with guest.step("umount"):
        for target in (second, other, elsewhere, program, same):
            loader("umount", target)
        expect("/run/mnt" not in run("cat", "/proc/mounts").stdout, "still mounted")
    with guest.step("SIGTERM"):
        daemon.stop()


def _run_from_shared_pages(guest, references):
    """Where the two images with the program are mounted."""
    from lib import expect, run
    from product import loader, mount_point

    program, same = mount_point("program"), mount_point("same")
    loader("mount", references["program"], program)
    loader("mount", references["same program"], same)
    expected = run(PROGRAM, "/proc/version").stdout
    expect(run(program / PROGRAM.name, "/proc/version").stdout == expected, "it printed something else")
    before = asked()
    expect(run(same / PROGRAM.name, "/proc/version").stdout == expected, "it printed something else")
    overlay = _overlay(same)
    expect(run(overlay / PROGRAM.name, "/proc/version").stdout == expected, "under an overlay")
    guest.fact("events for the second image's program", asked()[0] - before[0])
    run("umount", overlay)
    return program, same


def _overlay(lower):
    from lib import DISK, run
    from product import mount_point

    overlay = mount_point("overlay")
    for name in ("upper", "work"):
        (DISK / name).mkdir()
    options = f"lowerdir={lower},upperdir={DISK / 'upper'},workdir={DISK / 'work'}"
    run("mount", "-t", "overlay", "overlay", overlay, "-o", options)
    return overlay


def asked():
    """Events of the kernel, bytes fetched."""
    from product import loader_json

    events = loader_json("status")["keeper"]["counters"]["events"]
    return events, loader_json("stats")["counters"]["fetched_bytes"]


def expect_files(target, files):
    """They have their bytes, by read(2) and by mmap(2)."""
    import hashlib

    from lib import expect

    for path, digest in files.items():
        expect(hashlib.sha256((target / path).read_bytes()).hexdigest() == digest, f"{target / path}: wrong bytes")
        with (target / path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            expect(hashlib.sha256(view).hexdigest() == digest, f"{target / path}: wrong bytes by mmap")


def resident(path: Path):
    """(pages in memory, all pages) of a file, which is opened and mapped, but not read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        pages = -(-size // mmap.PAGESIZE)
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        found = ctypes.create_string_buffer(pages)
        if address == ctypes.c_void_p(-1).value or libc.mincore(address, size, found):
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        libc.munmap(address, size)
        return sum(byte & 1 for byte in found.raw), pages
    finally:
        os.close(fd)
