"""What a keeper must know to take over: objects and mounts, in ROOT/keeper.json, replaced whole at most changes.

Objects and mounts that are added go behind it instead, as lines of ROOT/keeper.added: with a thousand of them each more
costs what the first did. A line names the keeper.json that it belongs to; those of an earlier one say nothing. The last
one may be torn: what it was to record was not done then.

Kept on disk and not only in memory, because it must also tell a start after everything was killed which mounts are
now unguarded. The boot id says whether those mounts can still exist.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from loader.errors import LoaderError

log = logging.getLogger(__name__)
VERSION = 1
_LEAST_ROOM = 1 << 16  # bytes of additions before the file is replaced; of a larger file as many as it has
_REMEDY = "unmount what it made, and remove this file and keeper.added"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class Object:
    """A cache object. fanotify fills name, path, form and complete; cachefiles volume, cookie and kernel_id."""

    id: int
    plane: str
    size: int = 0
    name: str = ""
    path: str = ""
    form: str = ""
    complete: bool = False
    mounted: bool = False  # the kernel may have it open: a mount used it, and was not seen to end for good
    released: bool = False  # the worker is done with it, but it must stay guarded
    readers_unknown: bool = False  # somebody may be reading who was not seen: nothing of it may be taken away
    volume: str = ""
    cookie: str = ""
    kernel_id: int = 0
    open: bool = False  # cachefiles: copen was answered

    @property
    def holes_read_as_zeros(self) -> bool:
        """Whether the kernel would hand out zeros for what is missing, if nobody guards the file."""
        return self.plane == "fanotify" and self.form == "decoded" and not self.complete

    @property
    def store_name(self) -> str:
        """The name of its descriptor in the descriptor store."""
        return f"{self.plane[0]}{self.id}"

    def to_wire(self) -> dict[str, Any]:
        """The OBJECT packet's fields."""
        common = {"object": self.id, "plane": self.plane, "size": self.size}
        if self.plane == "cachefiles":
            return common | {"volume": self.volume, "cookie": self.cookie}
        return common | {"name": self.name, "path": self.path, "form": self.form, "complete": self.complete}


@dataclass(slots=True)
class MountRecord:
    """A mount that the keeper made. `objects` are those that it reads."""

    target: str
    plane: str
    source: str
    fsid: str = ""
    domain_id: str = ""
    objects: list[int] = field(default_factory=list)


_FIELDS_OF_OBJECT = attrgetter(*Object.__slots__)
_FIELDS_OF_MOUNT = attrgetter(*(name for name in MountRecord.__slots__ if name != "objects"))


@dataclass(slots=True)
class State:
    """All of it. `fenced` lists mounts that were taken away because nobody had guarded them."""

    path: Path
    boot_id: str
    next_object: int = 1
    generation: int = 0
    objects: dict[int, Object] = field(default_factory=dict)
    mounts: dict[str, MountRecord] = field(default_factory=dict)
    fenced: list[dict[str, Any]] = field(default_factory=list)
    paused: dict[str, int] = field(default_factory=dict)  # backing devices without readahead for now, and what it was
    unsaved: bool = False  # the last save failed: it is tried again
    _key: str = field(default="", repr=False, compare=False)  # of the file as saved last, like no other
    _room: int = field(default=0, repr=False, compare=False)  # bytes that may still be added to it
    # As saved last.
    _texts: dict[int | str, tuple[Any, str]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, root: Path) -> State:
        """The state of `root`; an empty one when there is none, or when it is of another boot.

        LoaderError: it cannot be read though it is of this boot, so nobody knows what has to be guarded or fenced.
        """
        path = root / "keeper.json"
        empty = cls(path, _BOOT_ID.read_text().strip())
        try:
            document = json.loads(path.read_text())
            if document["boot_id"] != empty.boot_id:
                return empty
            if document["version"] != VERSION:
                raise LoaderError(f"{path} is of another version of this program", f"start that one, or {_REMEDY}")
            state = cls(
                path,
                empty.boot_id,
                document["next_object"],
                document["generation"],
                {item["id"]: Object(**item) for item in document["objects"]},
                {item["target"]: MountRecord(**item) for item in document["mounts"]},
                document["fenced"],
                document.get("paused", {}),
                _key=document.get("key", ""),
            )
            state._load_added()
            return state
        except FileNotFoundError:
            return empty
        except (ValueError, KeyError, TypeError) as error:
            if path.stat().st_mtime < _boot_time():  # it is not synced: a power cut leaves it empty, or as zeros
                log.warning("%s is damaged (%r), but older than this boot: nothing of it is mounted", path, error)
                return empty
            what = f"{path} is damaged ({error!r}); it cannot be told which mounts are unguarded"
            raise LoaderError(what, _REMEDY) from None

    def _load_added(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for line in self._added.read_text().split("\n")[:-1]:  # behind the last newline: nothing, or a torn line
                entry = json.loads(line)
                if entry["key"] != self._key:
                    continue
                self.next_object = entry["next_object"]
                self.objects |= {item["id"]: Object(**item) for item in entry["objects"]}
                self.mounts |= {item["target"]: MountRecord(**item) for item in entry["mounts"]}
                self.paused = entry.get("paused", self.paused)

    @property
    def _added(self) -> Path:
        return self.path.with_suffix(".added")

    def save_added(self, objects: Iterable[Object], mounts: Iterable[MountRecord] = ()) -> None:
        """Save these, which are new or were changed, and nothing else that has changed meanwhile. Not synced either."""
        entry = {
            "key": self._key,
            "next_object": self.next_object,
            "objects": [_fields(item) for item in objects],
            "mounts": [_fields(record) for record in mounts],
            "paused": self.paused,
        }
        line = _json(entry).encode() + b"\n"
        if self.unsaved or len(line) > self._room:
            self.save_now()
            return
        room, self._room = self._room, 0  # should this fail, what comes next is a whole file
        with self._added.open("ab", buffering=0) as stream:
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, "only part of it was written", str(self._added))
        self._room = room - len(line)

    def save(self) -> None:
        """Replace the file, or try again later: a full disk must not stop the keeper."""
        try:
            self.save_now()
        except OSError as error:
            if not self.unsaved:
                log.error("%s: %s; trying again", self.path, error)
            self.unsaved = True

    def save_now(self) -> None:
        """Replace the file. Not synced: a machine that goes down takes the mounts with it."""
        temporary = self.path.with_suffix(".new")
        self._room = 0
        self._key = os.urandom(8).hex()
        text = self._encoded()
        try:
            temporary.write_text(text)
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self.unsaved = False
        with contextlib.suppress(OSError):  # as long as its lines cannot go, no more come
            self._added.unlink(missing_ok=True)
            self._room = max(_LEAST_ROOM, len(text))

    def _encoded(self) -> str:
        """The document. Of a thousand objects one has changed since the last save: only that is encoded anew."""
        texts: dict[int | str, tuple[Any, str]] = {}
        for number, item in self.objects.items():
            texts[number] = self._text(number, _FIELDS_OF_OBJECT(item), item)
        for target, record in self.mounts.items():
            texts[target] = self._text(target, (_FIELDS_OF_MOUNT(record), tuple(record.objects)), record)
        self._texts = texts
        head = {
            "version": VERSION,
            "boot_id": self.boot_id,
            "next_object": self.next_object,
            "generation": self.generation,
            "key": self._key,
            "fenced": self.fenced,
            "paused": self.paused,
        }
        objects = ",".join([texts[number][1] for number in self.objects])
        mounts = ",".join([texts[target][1] for target in self.mounts])
        return f'{_json(head)[:-1]},"objects":[{objects}],"mounts":[{mounts}]}}'

    def _text(self, key: int | str, fields: Any, item: Object | MountRecord) -> tuple[Any, str]:
        known = self._texts.get(key)
        return known if known is not None and known[0] == fields else (fields, _json(_fields(item)))

    def new_object(self, plane: str, **fields: Any) -> Object:
        """A fresh object, recorded but not saved."""
        made = Object(self.next_object, plane, **fields)
        self.next_object += 1
        self.objects[made.id] = made
        return made

    def writers_by_name(self, writers: Mapping[int, int]) -> dict[str, int]:
        """The objects' descriptors by their names in the store, for whoever goes on with them."""
        return {self.objects[number].store_name: fd for number, fd in writers.items() if number in self.objects}

    def drop_gone_mounts(self, targets: set[str]) -> None:
        """Forget mounts whose target is not among `targets` any more."""
        for target in [target for target in self.mounts if target not in targets]:
            del self.mounts[target]


def _boot_time() -> float:
    """When this kernel started, in seconds of the wall clock as it is now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _fields(item: Object | MountRecord) -> dict[str, Any]:
    """`asdict` without the copies, for what is encoded at once."""
    return {name: getattr(item, name) for name in item.__slots__}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
