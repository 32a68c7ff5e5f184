"""Each image's record next to its payload, so that a lost or damaged database is made again from what is on disk.

    {"digest": "sha256:…", "name": "docker://…", "source": "docker://…@sha256:…", "size": 123,
     "blobs": [["sha256:…", 123], …], "payloads": {"encoded": "sha256:…"}, "pinned": false}

The database is what counts while it is there. What only it knows is lost with it: times of last use, older names.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError
from erofs_builder.payload import Form
from loader.cache.layout import Layout, replace_file
from loader.cache.state import ImageRecord, State

log = logging.getLogger(__name__)


def open_state(layout: Layout) -> State:
    """The database. A damaged one is put aside; into an empty one goes what the images' records say."""
    try:
        state = State(layout.database)
        state.check()
    except sqlite3.OperationalError:
        raise  # locked, or a disk that cannot be written: nothing that a new one would mend
    except sqlite3.DatabaseError as error:
        log.error("%s is damaged (%s): making it again from the images' records", layout.database, error)
        _put_aside(layout.database)
        state = State(layout.database)
    if not state.images():
        _restore(layout, state)
    return state


def write_record(layout: Layout, state: State, image: Digest, *, durable: bool = False) -> None:
    """Write what the database knows of an image next to its payload.

    Mostly not synced, for the database is: what a crash of the machine takes away, or tears, is missed only where the
    database is lost with it. The image is then fetched again.
    """
    record = state.image(image)
    if record is None:
        return
    document = {
        "digest": str(image),
        "name": record.name,
        "source": record.source,
        "size": record.size,
        "blobs": [[str(blob), size] for blob, size in record.blobs],
        "payloads": {form.value: str(sha256) for form, sha256 in state.payloads(image).items()},
        "pinned": record.pinned,
    }
    replace_file(layout.record(image), json.dumps(document).encode(), layout.tmp, durable=durable)


def _put_aside(database: Path) -> None:
    suffix = f".damaged-{int(time.time())}"
    for name in (database.name, f"{database.name}-wal", f"{database.name}-shm"):
        path = database.with_name(name)
        if path.exists():
            path.rename(path.with_name(name + suffix))


def _restore(layout: Layout, state: State) -> None:
    for path in sorted((layout.root / "images").glob("*/image.json")):
        try:
            record, payloads = _decode(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
            log.error("%s cannot be used: %r", path, error)
            continue
        for form, sha256 in payloads.items():
            state.add_image(record, form, sha256)
        if record.pinned:
            state.pin_image(record.digest, True)
        log.warning("restored the record of %s", record.name)


def _decode(document: Any) -> tuple[ImageRecord, dict[Form, Digest]]:
    record = ImageRecord(
        Digest.parse(document["digest"]),
        str(document["name"]),
        str(document["source"]),
        int(document["size"]),
        tuple((Digest.parse(blob), int(size)) for blob, size in document["blobs"]),
        pinned=bool(document["pinned"]),
    )
    return record, {Form(form): Digest.parse(sha256) for form, sha256 in document["payloads"].items()}
