"""`erofs-loader add`, then mount -t erofs -o fsid= by hand, with and without domain_id."""

PLANES = ("cachefiles",)
BOOTS = ("mounts",)
LIMIT = 240


def host(host):
    """Two images that share their large layer."""
    from rig.product import published

    return published(host)


def mounts(guest):
    """What `add` prints is all that mount(8) needs."""
    from lib import run
    from product import Daemon, compare, loader, loader_json, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    added = {}
    for name, image in images.items():
        with guest.step(f"add {name}"):
            added[name] = loader_json("add", image["reference"])
    extra = ",cache_strategy=disabled" if guest.task["form"] == "encoded" else ""
    for domain in (True, False):
        for name, image in images.items():
            options = f"fsid={added[name]['fsid']}{extra}"
            if domain:
                options += f",domain_id={added[name]['domain_id']}"
            with guest.step(f"mount -t erofs none -o fsid=…{',domain_id=…' if domain else ''} ({name})"):
                run("mount", "-t", "erofs", "none", mount_point(name), "-o", options)
            with guest.step(f"every byte of {name}{' in the domain' if domain else ''}"):
                compare(mount_point(name), image["files"])
        for name in images:
            run("umount", mount_point(name))
    with guest.step("remove"):
        for image in images.values():
            loader("remove", image["reference"])
    with guest.step("SIGTERM"):
        daemon.stop()
