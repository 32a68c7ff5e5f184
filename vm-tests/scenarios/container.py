"""A program of a 520 MB Debian image in a container: runc, on an overlay over the lazily mounted EROFS."""

import json
from pathlib import Path

IMAGES = ("debian",)
ONCE = "kernel"
BOOTS = ("runs",)
LIMIT = 480


def host(host):
    """The image in the registry, with its artifact."""
    from rig.product import counted

    host.once("debian", lambda folder: _publish(host))
    return {"reference": f"docker://{host.seen(host.registry.address)}/debian:12", **counted(host)}


def _publish(host):
    from tests.images import catalog
    from tests.images.layout import push

    push(catalog.image("debian") / "oci", f"{host.registry.address}/debian:12")
    source, target = (f"docker://{host.registry.address}/{name}" for name in ("debian:12", "debian:12-erofs"))
    host.program("loader.cli.builder", "convert", "--insecure", source, target)


def runs(guest):
    """python3 with numpy and requests prints its line; the overlay takes a write."""
    from lib import DISK, expect, run
    from product import REPOSITORY, Daemon, loader, mount_point

    program = _workload(REPOSITORY)
    with guest.step("serve"):
        daemon = Daemon(guest).start()
    before = sum(guest.ask("blob_bytes").values())
    lower = mount_point("debian")
    with guest.step("mount"):
        loader("mount", guest.task["reference"], lower)
    bundle = DISK / "bundle"
    for name in ("upper", "work", "rootfs"):
        (bundle / name).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
    run("mount", "-t", "overlay", "overlay", bundle / "rootfs", "-o", options)
    with guest.step("runc run"):
        _configure(bundle, ["sh", "-c", 'date > /written && exec python3 -c "$0"', program.PROGRAM])
        done = run("runc", "--root", "/run/runc", "run", "-b", bundle, "c1", limit=400)
        expect(program.EXPECTED in done.stdout, f"printed {done.stdout!r} {done.stderr}")
        expect((bundle / "upper" / "written").exists(), "the container's write is not in the upper layer")
    guest.fact("bytes fetched to run it", sum(guest.ask("blob_bytes").values()) - before)
    with guest.step("umount"):
        run("umount", bundle / "rootfs")
        loader("umount", lower)
    with guest.step("SIGTERM"):
        daemon.stop()


def _workload(repository):
    import sys

    sys.path.append(str(repository))
    from bench import workload

    return workload


def _configure(bundle, arguments):
    from lib import run

    run("runc", "spec", "-b", bundle)
    path = Path(bundle) / "config.json"
    document = json.loads(path.read_text())
    document["process"] |= {"terminal": False, "args": arguments}
    document["root"]["readonly"] = False
    path.write_text(json.dumps(document))
