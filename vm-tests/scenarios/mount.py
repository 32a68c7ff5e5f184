"""Mount by the daemon, read every byte, share layers, unmount, mount again without the registry."""

BOOTS = ("mounts",)
LIMIT = 240


def host(host):
    """Two images that share their large layer."""
    from rig.product import published

    kernel = host.cell.image.vmlinuz.parent / "config"
    landlock = host.cell.native or "CONFIG_SECURITY_LANDLOCK=y" in kernel.read_text()
    return {**published(host), "landlock": landlock}


def mounts(guest):
    """One daemon, both images."""
    from lib import expect, run
    from product import Daemon, compare, drop_caches, loader, loader_json, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    with guest.step("the worker is confined"):
        confinement = loader_json("status")["confinement"]
        guest.fact("Landlock", f"ABI {confinement['landlock']}" if confinement["landlock"] else "not in this kernel")
        expect(confinement["seccomp"] and not confinement["capabilities"], confinement)
        expect(confinement["landlock"] or not guest.task["landlock"], confinement)
    fetched, begin = [], guest.ask("blob_bytes")
    for name, image in images.items():
        before = guest.ask("blob_bytes")
        with guest.step(f"mount {name}"):
            loader("mount", image["reference"], mount_point(name))
        with guest.step(f"every byte of {name}"):
            compare(mount_point(name), image["files"])
        after = guest.ask("blob_bytes")
        fetched.append({digest for digest, size in after.items() if size > before.get(digest, 0)})
        guest.fact(f"bytes fetched for {name}", sum(after.values()) - sum(before.values()))
    with guest.step("a shared layer is fetched once"):
        # A frame of it that the first image does not show may be fetched ahead for the second; no byte is, twice.
        sizes = guest.ask("blob_sizes")
        sent = {digest: after[digest] - begin.get(digest, 0) for digest in fetched[0] & fetched[1]}
        twice = {digest: size for digest, size in sent.items() if size > sizes[digest]}
        expect(not twice, f"fetched again for the second image: {twice}")
    with guest.step("a shared layer is cached once"):
        stats = loader_json("stats")
        guest.fact("files of blobs, for two images of two layers", stats["open_blobs"])
        expect(stats["open_blobs"] == stats["cache"]["blobs"] == 3, stats)
    with guest.step("umount"):
        for name in images:
            loader("umount", mount_point(name))
        expect("/run/mnt" not in run("cat", "/proc/mounts").stdout, "still mounted")
    guest.ask("registry_stop")
    drop_caches()
    try:
        with guest.step("mount again without the registry"):
            for name, image in images.items():
                loader("mount", image["reference"], mount_point(name))
        with guest.step("every byte again"):
            for name, image in images.items():
                compare(mount_point(name), image["files"])
                loader("umount", mount_point(name))
    finally:
        guest.ask("registry_start")
    with guest.step("SIGTERM"):
        daemon.stop()
