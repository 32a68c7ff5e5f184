"""A quota is kept: what nothing has mounted goes, and what goes is fetched again."""

BOOTS = ("quota",)
LIMIT = 300


def host(host):
    """Two images."""
    from rig.product import published

    return published(host)


def quota(guest):
    """Each image is larger than the quota."""
    from lib import expect, wait_for
    from product import Daemon, compare, drop_caches, loader, loader_json, mount_point

    images = guest.task["images"]
    with guest.step("serve"):
        daemon = Daemon(guest, "--quota", "64K").start()
    for name, image in images.items():
        with guest.step(f"every byte of {name}"):
            loader("mount", image["reference"], mount_point(name))
            compare(mount_point(name), image["files"])
    with guest.step("umount"):
        for name in images:
            loader("umount", mount_point(name))
    with guest.step("what nothing has mounted goes"):
        wait_for(lambda: loader_json("stats")["counters"]["evicted_bytes"] > 64 << 10, 120, "nothing was evicted")
    before = sum(guest.ask("blob_bytes").values())
    drop_caches()
    with guest.step("every byte again"):
        for name, image in images.items():
            loader("mount", image["reference"], mount_point(name))
            compare(mount_point(name), image["files"])
    fetched = sum(guest.ask("blob_bytes").values()) - before
    guest.fact("bytes fetched again", fetched)
    expect(fetched > 64 << 10, f"only {fetched} bytes were fetched again")
    counters = loader_json("stats")["counters"]
    guest.fact("bytes evicted", counters["evicted_bytes"])
    expect(not counters["requests_failed"], counters)
    with guest.step("umount and SIGTERM"):
        for name in images:
            loader("umount", mount_point(name))
        daemon.stop()
