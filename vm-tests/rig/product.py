"""The host's part of the daemon's scenarios: images converted and published in the run's registry, once a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rig import images
from rig.host import Host

NAMES = ("first", "second")
FAST = 1e8  # bytes a second


def published(host: Host) -> dict[str, Any]:
    """Both small images in the registry; the guest's task, and `counted`'s handlers."""
    files: dict[str, Any] = host.once("published", lambda folder: _publish(host, folder))
    found = {
        name: {"reference": f"docker://{host.seen(host.registry.address)}/rig/images:{name}", "files": files[name]}
        for name in NAMES
    }
    return {"images": found, **counted(host)}


def counted(host: Host) -> dict[str, Any]:
    """The handlers for a registry that goes away, comes back, and counts what it sent; nothing for the task."""
    registry = host.registry
    host.handlers |= {
        "registry_stop": registry.stop,
        "registry_start": registry.start,
        "blob_bytes": registry.blob_bytes,
        "blob_sizes": registry.blob_sizes,
    }
    return {}


def slow_link(host: Host, task: dict[str, Any], rate: float, rtt: float = 0.01) -> dict[str, Any]:
    """The same task with the registry behind a link of `rate` bytes a second, until the guest asks for `link_fast`."""
    from bench.link import Link

    link = host.keep(Link(host.registry.address, rate, rtt))
    host.handlers["link_fast"] = lambda: link.set_rate(FAST)
    direct, slow = host.seen(host.registry.address), host.seen(link.address)
    found = {
        name: {**image, "reference": image["reference"].replace(direct, slow)} for name, image in task["images"].items()
    }
    return {**task, "images": found}


def _publish(host: Host, folder: Path) -> dict[str, Any]:
    layout = images.write_layout(folder / "layout", NAMES)
    for name in NAMES:
        target = f"docker://{host.registry.address}/rig/images:{name}"
        host.program("loader.cli.builder", "convert", f"oci:{layout}:{name}", target, "--insecure")
    return {name: images.expected(name) for name in NAMES}
