"""What the control socket offers: each operation once, as JSON-like values, whatever speaks to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.frame_list import decode_frames
from erofs_builder.payload import Form
from loader import __version__
from loader.cache.records import write_record
from loader.cache.state import ImageRecord, MountRecord
from loader.errors import NotFoundError, UsageError
from loader.worker.counters import NAMES
from loader.worker.images import canonical
from loader.worker.mounting import image_fsid
from loader.worker.prefetch import prefetch
from loader.worker.service import Service
from loader.worker.starts import TRACE

MOST_LISTED = 100  # of whatever is listed in a status


class Api:
    """Operations on a running worker. Safe to call from many threads; none blocks another for long."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def images(self) -> list[dict[str, Any]]:
        """All known images."""
        mounts = self._service.state.mounts()
        return [
            self._image(image) | {"mounts": [mount.target for mount in mounts if mount.image == image.digest]}
            for image in self._service.state.images()
        ]

    def add_image(self, image: str, form: str | None = None, pinned: bool | None = None) -> dict[str, Any]:
        """Have an image's metadata here; with cachefiles it can then be mounted by its fsid."""
        chosen = self._form(form)
        record = self._service.images.add(image, chosen)
        if pinned is None:
            self._service.state.touch_image(record.digest)
        else:
            self._service.state.pin_image(record.digest, pinned)
            write_record(self._service.layout, self._service.state, record.digest, durable=True)
        document = self._image(self._service.images.find(str(record.digest))) | {"form": chosen.value}
        if self._service.plane == "cachefiles":
            document |= {"fsid": image_fsid(record.digest, chosen), "domain_id": self._service.config.domain}
            if chosen is Form.ENCODED:
                document["options"] = "cache_strategy=disabled"
        return document

    def remove_image(self, image: str) -> dict[str, Any]:
        """Forget an image."""
        record = self._service.images.find(image)
        self._service.images.remove(record)
        return {"removed": str(record.digest), "name": record.name}

    def mounts(self) -> list[dict[str, Any]]:
        """All mounts that this daemon made."""
        images = {image.digest: image for image in self._service.state.images()}
        return [_mount(mount, images.get(mount.image)) for mount in self._service.state.mounts()]

    def mount(self, image: str, target: str, form: str | None = None, domain: str | None = None) -> dict[str, Any]:
        """Mount an image, known or not yet; `domain`: where it shares page cache, instead of what is configured."""
        chosen = self._form(form)
        record = self._service.images.add(image, chosen)
        name = "" if self._service.state.find_id(image) else canonical(image)
        return _mount(self._service.mounting.mount(record, target, chosen, name, domain or None), record)

    def umount(self, target: str, lazy: bool = False) -> dict[str, Any]:
        """Unmount."""
        self._service.mounting.umount(target, lazy=lazy)
        return {"unmounted": target}

    def prefetch(self, image: str, paths: list[str], form: str | None = None) -> Iterator[dict[str, Any]]:
        """Fetch ahead of any reader; reports progress until it is done."""
        service = self._service
        try:
            record = service.images.find(image)
        except NotFoundError as error:
            raise NotFoundError(str(error), hint=f"erofs-loader add {image}") from None
        chosen = self._form(form) if form else self._form_at_hand(record.digest)
        return prefetch(record, paths, chosen, service.images, service.mounting, service.flights)

    def trace(self, image: str) -> dict[str, Any]:
        """What was read of an image since it was mounted, in order, as a list of frames."""
        service = self._service
        record = service.images.find(image)
        files = [[f for form in Form for f in service.objects.files_of(form, blob)] for blob, _ in record.blobs]
        if not any(files):
            raise NotFoundError(f"{record.name} is not mounted", hint="mount it, start what is to be traced, try again")
        frames = service.starts.trace(files)
        service.starts.remember(record.digest, TRACE, frames)
        places = decode_frames(frames)
        size = sum(files[blob][0].table[frame].encoded_size for blob, frame in places)
        return {
            "digest": str(record.digest), "source": record.source, "frames": frames, "count": len(places), "bytes": size
        }  # fmt: skip

    def gc(self, dry_run: bool = False, everything: bool = False) -> dict[str, Any]:
        """Remove cached data that no image needs; `everything`: also that of images that are not mounted."""
        collected = self._service.collector.collect(unreferenced_only=not everything, dry_run=dry_run)
        return {"blobs": collected.blobs, "freed_bytes": collected.freed, "dry_run": dry_run}

    def scrub(self) -> Iterator[dict[str, Any]]:
        """Check all cached data; what is damaged is fetched again."""
        return self._service.scrubber.scrub()

    def stats(self) -> dict[str, Any]:
        """Counters since the worker started, and what the cache holds."""
        service = self._service
        usage = service.collector.usage()
        files = service.objects.files()
        return {
            "counters": service.counters.snapshot(),
            "cache": {
                "blobs": len(usage),
                "allocated_bytes": sum(item.allocated for item in usage),
                "unreferenced_bytes": sum(item.allocated for item in usage if not item.referenced),
                "quota_bytes": service.config.quota,
            },
            "open_blobs": len(files),
            "complete_blobs": sum(file.completed for file in files),  # nobody asks for them any more
            "frames_ready": sum(file.ready.count for file in files),
            "frames": sum(file.ready.frames for file in files),
            "flights": len(service.flights),
        }

    def status(self) -> dict[str, Any]:
        """Whether all is well: processes, planes, who waits for what and since when, the sources' last errors."""
        service = self._service
        keeper, _ = service.link.call("status", 5.0)
        keeper.pop("token", None)
        keeper.pop("errno", None)
        waiting = sorted(service.flights.waiting(), key=lambda item: -item[2])[:MOST_LISTED]
        return {
            "version": __version__,
            "plane": service.plane,
            "form": service.form.value,
            "page_domain": service.pages.policy,
            "root": str(service.layout.root),
            "worker": {"pid": os.getpid(), "generation": service.generation, "uptime": time.time() - service.started},
            "keeper": keeper,
            "images": len(service.state.images()),
            "mounts": len(service.state.mounts()),
            "waiting": [{"file": file, "frame": frame, "age": round(age, 3)} for file, frame, age in waiting],
            "source_errors": dict(service.fetcher.last_errors),
            "failed_reads": [failure._asdict() for failure in service.readpath.failures],
            "fenced": service.fenced,
            "scrubbed": service.patrol.last,
            "confinement": service.confinement._asdict(),
            "link": {"bytes_in_flight": service.link_estimate.in_flight},
        }

    def metrics(self) -> str:
        """Counters and gauges for Prometheus."""
        stats = self.stats()
        lines = []
        for name, value in stats["counters"].items():
            metric = f"erofs_loader_{name}_total"
            lines += [f"# HELP {metric} {NAMES[name]}", f"# TYPE {metric} counter", f"{metric} {value}"]
        gauges = {
            "cache_allocated_bytes": stats["cache"]["allocated_bytes"],
            "cache_blobs": stats["cache"]["blobs"],
            "flights": stats["flights"],
            "frames_ready": stats["frames_ready"],
            "images": len(self._service.state.images()),
            "mounts": len(self._service.state.mounts()),
        }
        for name, value in gauges.items():
            lines += [f"# TYPE erofs_loader_{name} gauge", f"erofs_loader_{name} {value}"]
        return "\n".join(lines) + "\n"

    def stop(self, mode: str | None = None) -> dict[str, Any]:
        """Have the whole daemon leave in order."""
        arguments = {"mode": mode} if mode else {}
        self._service.link.call("stop", 10.0, **arguments)
        return {"stopping": True}

    def _form(self, name: str | None) -> Form:
        if name in (None, "", "auto"):
            return self._service.form
        try:
            return Form(name)
        except ValueError:
            raise UsageError(f"no form {name!r}", hint="encoded or decoded") from None

    def _form_at_hand(self, image: Digest) -> Form:
        """The form that is mounted, else the daemon's, else the one that there is."""
        mounted = [mount.form for mount in self._service.state.mounts() if mount.image == image]
        there = self._service.state.payloads(image)
        own = self._service.form
        return mounted[0] if mounted else own if own in there else next(iter(there), own)

    def _image(self, image: ImageRecord) -> dict[str, Any]:
        return {
            "name": image.name,
            "digest": str(image.digest),
            "source": image.source,
            "size": image.size,
            "blobs": [str(blob) for blob, _ in image.blobs],
            "pinned": image.pinned,
            "forms": sorted(form.value for form in self._service.state.payloads(image.digest)),
        }


def _mount(mount: MountRecord, image: ImageRecord | None) -> dict[str, Any]:
    document = {
        "target": mount.target,
        "image": image.name if image else str(mount.image),
        "digest": str(mount.image),
        "form": mount.form.value,
        "plane": mount.plane,
    }
    extra = {"fsid": mount.fsid, "domain": mount.domain}
    return document | {name: value for name, value in extra.items() if value}
