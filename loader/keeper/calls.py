"""The worker's calls to the keeper (protocol.CALLS): the few system calls that need the keeper's descriptors."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.protocol import MOST_RANGES
from loader.keeper.state import MountRecord

if TYPE_CHECKING:
    from loader.keeper.keeper import Keeper

log = logging.getLogger(__name__)
Reply = Callable[[dict[str, Any], int | None], None]
_MOST_LISTED = 200  # requests and mounts in a status: a packet has a size
_HELD_AT_ONCE = 20  # even with the longest paths these fit into one


class Calls:
    """Handles calls of one keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def handle(self, body: dict[str, Any], reply: Reply) -> None:
        """Do what a CALL asks; `reply` gets the result, at once or later."""
        name = str(body.get("call"))
        try:
            method = getattr(self, f"_call_{name}", None)
            if method is None:
                raise OSError(errno.ENOSYS, f"no call {name!r}")
            method(body, reply)
        except OSError as error:
            reply(_failure(error), None)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            reply({"errno": errno.EINVAL, "message": f"{name}: {error!r}"}, None)

    def held(self, at_once: int = _HELD_AT_ONCE) -> Iterator[dict[str, Any]]:
        """The HELD packets' fields: a packet is bounded, the number of mounts is not."""
        mounts = [_without_objects(record) for record in self._keeper.state.mounts.values()]
        fenced = self._keeper.state.fenced
        for start in range(0, max(len(mounts), len(fenced)), at_once):
            part = slice(start, start + at_once)
            yield {"mounts": mounts[part], "fenced": fenced[part]}

    def ready(self) -> dict[str, Any]:
        """The READY packet's fields."""
        return {"generation": self._keeper.state.generation, "plane": self._keeper.plane.name}

    def _call_create(self, body: dict[str, Any], reply: Reply) -> None:
        plane = self._fanotify()
        form = str(body["form"])
        if form not in ("encoded", "decoded"):
            raise ValueError(f"form {form!r}")
        item = plane.create(str(body["name"]), str(body["path"]), form, int(body["size"]))
        reply({"object": item.id}, plane.writers[item.id])

    def _call_release(self, body: dict[str, Any], reply: Reply) -> None:
        self._fanotify().release(int(body["object"]))
        reply({}, None)

    def _call_complete(self, body: dict[str, Any], reply: Reply) -> None:
        self._fanotify().complete(int(body["object"]))
        reply({}, None)

    def _call_mark(self, body: dict[str, Any], reply: Reply) -> None:
        self._fanotify().mark(int(body["object"]))
        reply({}, None)

    def _call_guards(self, body: dict[str, Any], reply: Reply) -> None:
        plane = self._keeper.plane
        reply({"guards": isinstance(plane, FanotifyPlane) and plane.guards(str(body["name"]))}, None)

    def _call_idle(self, body: dict[str, Any], reply: Reply) -> None:
        ranges = [(int(start), int(end)) for start, end in body["ranges"]]
        if len(ranges) > MOST_RANGES:
            raise ValueError(f"{len(ranges)} ranges, at most {MOST_RANGES}")
        reply({"idle": self._fanotify().idle(int(body["object"]), ranges)}, None)

    def _call_cull(self, body: dict[str, Any], reply: Reply) -> None:
        plane = self._keeper.plane
        if not isinstance(plane, CachefilesPlane):
            raise OSError(errno.EOPNOTSUPP, f"plane {plane.name} does not cull")
        plane.cull(str(body["directory"]), str(body["name"]))
        reply({}, None)

    def _call_look(self, body: dict[str, Any], reply: Reply) -> None:
        plane = self._keeper.plane
        if not isinstance(plane, CachefilesPlane):
            raise OSError(errno.EOPNOTSUPP, f"plane {plane.name}: its files can be read")
        reply({}, plane.look(str(body["directory"]), str(body["name"])))

    def _call_mount(self, body: dict[str, Any], reply: Reply) -> None:
        self._keeper.mounter.mount(body, _done(reply))

    def _call_umount(self, body: dict[str, Any], reply: Reply) -> None:
        self._keeper.mounter.umount(body, _done(reply))

    def _call_status(self, body: dict[str, Any], reply: Reply) -> None:
        keeper = self._keeper
        keeper.mounter.refresh()
        reply(
            self.ready()
            | next(self.held(_MOST_LISTED), {"mounts": [], "fenced": []})
            | {
                "mounts_in_all": len(keeper.state.mounts),
                "pid": os.getpid(),
                "objects": len(keeper.state.objects),
                "requests": [
                    pending.describe() for pending, _ in zip(keeper.requests, range(_MOST_LISTED), strict=False)
                ],
                "counters": keeper.plane.counters | {"worker_deaths": keeper.worker_deaths},
            },
            None,
        )

    def _call_stop(self, body: dict[str, Any], reply: Reply) -> None:
        mode = str(body.get("mode") or self._keeper.config.on_stop)
        if mode not in ("keep", "umount"):
            raise ValueError(f"mode {mode!r}")
        reply({}, None)
        self._keeper.leave(mode)

    def _fanotify(self) -> FanotifyPlane:
        plane = self._keeper.plane
        if not isinstance(plane, FanotifyPlane):
            raise OSError(errno.EOPNOTSUPP, f"plane {plane.name}: the kernel makes and opens its objects itself")
        return plane


def _without_objects(record: MountRecord) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if key != "objects"}


def _done(reply: Reply) -> Callable[[OSError | None], None]:
    return lambda failure: reply({} if failure is None else _failure(failure), None)


def _failure(error: OSError) -> dict[str, Any]:
    text = error.strerror or str(error)
    return {"errno": error.errno or errno.EIO, "message": f"{error.filename}: {text}" if error.filename else text}
