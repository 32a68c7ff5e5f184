"""Boot, see the disk and the host, power off."""

PLANES = ("cachefiles", "fanotify", "none")
NATIVE = False
PRODUCT = False
ONCE = "kernel"
BOOTS = ("look",)


def host(host):
    """The registry, so that the link has something at its end."""
    return {"registry": host.seen(host.registry.address)}


def look(guest):
    """What the kernel calls itself and what it can mount."""
    import urllib.request

    from lib import DISK

    with guest.step("the disk takes a file"):
        (DISK / "written").write_text("written")
    with guest.step("the registry answers"):
        urllib.request.urlopen(f"http://{guest.task['registry']}/v2/", timeout=20).close()
