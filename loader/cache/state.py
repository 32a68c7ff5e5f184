"""What must survive in SQLite: images, the blobs that they use, mounts, and when each was last used.

Which frames are in the cache is not here: that changes with every miss and lies in bitmaps (ready.py).
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.payload import Form

_VERSION = 1
_statfs = ctypes.CDLL(None, use_errno=True).statfs
_statfs.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_SCHEMA = """
CREATE TABLE images (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, source TEXT NOT NULL, size INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0, added REAL NOT NULL, used REAL NOT NULL
);
CREATE TABLE payloads (
    image TEXT NOT NULL REFERENCES images ON DELETE CASCADE, form TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (image, form)
);
CREATE TABLE image_blobs (
    image TEXT NOT NULL REFERENCES images ON DELETE CASCADE, position INTEGER NOT NULL, blob TEXT NOT NULL,
    size INTEGER NOT NULL, PRIMARY KEY (image, position)
);
CREATE INDEX image_blobs_by_blob ON image_blobs (blob);
CREATE TABLE names (
    name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images ON DELETE CASCADE
);
CREATE TABLE mounts (
    target TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images, form TEXT NOT NULL, plane TEXT NOT NULL,
    fsid TEXT, made REAL NOT NULL, boot TEXT NOT NULL
);
CREATE TABLE blobs (
    blob TEXT NOT NULL, form TEXT NOT NULL, used REAL NOT NULL,
    PRIMARY KEY (blob, form)
);
"""

# Beside `mounts`, whose columns earlier versions of this program know: they pass over what they do not.
_PAGE_DOMAINS = """
CREATE TABLE IF NOT EXISTS page_domains (
    target TEXT PRIMARY KEY REFERENCES mounts ON DELETE CASCADE, domain TEXT NOT NULL
);
"""
_MOUNTS = (
    "SELECT target, image, form, plane, fsid, made, boot, domain FROM mounts LEFT JOIN page_domains USING (target)"
)
_TOUCH = "INSERT INTO blobs (blob, form, used) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET used = excluded.used"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that this node knows. `source` opens its repository again (what `open_image` takes, with a digest)."""

    digest: Digest
    name: str
    source: str
    size: int
    blobs: tuple[tuple[Digest, int], ...]
    pinned: bool = False
    added: float = 0.0
    used: float = 0.0


@dataclass(frozen=True, slots=True)
class MountRecord:
    """A mount that this daemon made; `boot` tells whether it can still exist."""

    target: str
    image: Digest
    form: Form
    plane: str
    fsid: str | None
    made: float
    boot: str
    domain: str | None = None  # in which it shares page cache


class State:
    """The database. Every method is one transaction; safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            # The index of the log is a map that is stored into, unless nobody else has the database open.
            if _copies_on_write(path.parent):
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"{path}: schema version {version}, this program knows {_VERSION}")
        self._db.execute(_PAGE_DOMAINS)

    def check(self) -> None:
        """sqlite3.DatabaseError if the file is damaged."""
        with self._lock:
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One that is not durable survives a crash of the machine only if a later one that is has come to its end."""
        with self._lock:
            if not durable:
                self._db.execute("PRAGMA synchronous = NORMAL")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            finally:
                if not durable:
                    self._db.execute("PRAGMA synchronous = FULL")

    # Images

    def add_image(self, record: ImageRecord, form: Form, payload: Digest) -> None:
        """Record an image whose payload of one form is stored; its name now means this image.

        Not durable: what follows mostly is a mount, whose record is, and this one with it. Else `touch_image`.
        """
        now, digest = time.time(), str(record.digest)
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, 0, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
                "name = excluded.name, source = excluded.source, used = excluded.used",
                (digest, record.name, record.source, record.size, now, now),
            )
            db.execute("INSERT OR REPLACE INTO payloads VALUES (?, ?, ?)", (digest, form.value, str(payload)))
            db.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (record.name, digest))
            db.executemany(
                "INSERT OR IGNORE INTO image_blobs VALUES (?, ?, ?, ?)",
                [(digest, position, str(blob), size) for position, (blob, size) in enumerate(record.blobs)],
            )

    def images(self) -> list[ImageRecord]:
        with self._lock:
            rows = self._db.execute(
                "SELECT digest, name, source, size, pinned, added, used FROM images ORDER BY added, digest"
            ).fetchall()
            blobs = self._db.execute("SELECT image, blob, size FROM image_blobs ORDER BY image, position").fetchall()
        by_image: dict[str, list[tuple[Digest, int]]] = {}
        for image, blob, size in blobs:
            by_image.setdefault(image, []).append((Digest.parse(blob), size))
        return [
            ImageRecord(Digest.parse(digest), name, source, size, tuple(by_image.get(digest, ())), bool(pinned), *times)
            for digest, name, source, size, pinned, *times in rows
        ]

    def find_name(self, name: str) -> Digest | None:
        """The image that was added under this name last."""
        with self._lock:
            row = self._db.execute("SELECT image FROM names WHERE name = ?", (name,)).fetchone()
        return Digest.parse(row[0]) if row else None

    def find_id(self, text: str) -> Digest | None:
        """The image with this digest or unambiguous start (six digits or more) of its hex."""
        start = text.removeprefix("sha256:")
        if not 6 <= len(start) <= 64 or set(start) - set("0123456789abcdef"):
            return None
        with self._lock:
            rows = self._db.execute(
                "SELECT digest FROM images WHERE digest LIKE ? LIMIT 2", (f"sha256:{start}%",)
            ).fetchall()
        return Digest.parse(rows[0][0]) if len(rows) == 1 else None

    def image(self, digest: Digest) -> ImageRecord | None:
        with self._lock:
            row = self._db.execute(
                "SELECT name, source, size, pinned, added, used FROM images WHERE digest = ?", (str(digest),)
            ).fetchone()
            blobs = self._db.execute(
                "SELECT blob, size FROM image_blobs WHERE image = ? ORDER BY position", (str(digest),)
            ).fetchall()
        if row is None:
            return None
        name, source, size, pinned, *times = row
        listed = tuple((Digest.parse(blob), length) for blob, length in blobs)
        return ImageRecord(digest, name, source, size, listed, bool(pinned), *times)

    def payloads(self, image: Digest) -> dict[Form, Digest]:
        """The forms whose payload is stored, with the payload file's own digest."""
        with self._lock:
            rows = self._db.execute("SELECT form, sha256 FROM payloads WHERE image = ?", (str(image),)).fetchall()
        return {Form(form): Digest.parse(sha256) for form, sha256 in rows}

    def touch_image(self, image: Digest) -> None:
        """This image was used just now, and is to be known after a crash of the machine too."""
        with self._transaction() as db:
            db.execute("UPDATE images SET used = ? WHERE digest = ?", (time.time(), str(image)))

    def pin_image(self, image: Digest, pinned: bool) -> None:
        with self._transaction() as db:
            db.execute("UPDATE images SET pinned = ? WHERE digest = ?", (int(pinned), str(image)))

    def remove_image(self, image: Digest) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM images WHERE digest = ?", (str(image),))

    # Mounts

    def add_mount(self, record: MountRecord, blobs: Sequence[Digest] = ()) -> None:
        """Record a mount; its image and these blobs were used just now."""
        with self._transaction() as db:
            db.execute("UPDATE images SET used = ? WHERE digest = ?", (record.made, str(record.image)))
            db.executemany(_TOUCH, [(str(blob), record.form.value, record.made) for blob in blobs])
            db.execute(
                "INSERT OR REPLACE INTO mounts VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    record.target,
                    str(record.image),
                    record.form.value,
                    record.plane,
                    record.fsid,
                    record.made,
                    record.boot,
                ),
            )
            if record.domain:
                db.execute("INSERT OR REPLACE INTO page_domains VALUES (?, ?)", (record.target, record.domain))

    def remove_mount(self, target: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM mounts WHERE target = ?", (target,))

    def mounts(self) -> list[MountRecord]:
        with self._lock:
            rows = self._db.execute(f"{_MOUNTS} ORDER BY made, target").fetchall()
        return [_mount_record(row) for row in rows]

    def mount_at(self, target: str) -> MountRecord | None:
        """The mount that is on record there."""
        with self._lock:
            row = self._db.execute(f"{_MOUNTS} WHERE target = ?", (target,)).fetchone()
        return _mount_record(row) if row else None

    def mounted_blobs(self) -> set[tuple[Digest, Form]]:
        """The blobs of all images that are mounted, in the forms in which they are."""
        with self._lock:
            rows = self._db.execute("SELECT DISTINCT blob, form FROM mounts JOIN image_blobs USING (image)").fetchall()
        return {(Digest.parse(blob), Form(form)) for blob, form in rows}

    # Blobs

    def touch_blobs(self, blobs: list[tuple[Digest, Form]]) -> None:
        """These blobs were used just now."""
        now = time.time()
        with self._transaction() as db:
            db.executemany(_TOUCH, [(str(blob), form.value, now) for blob, form in blobs])

    def last_used(self) -> dict[tuple[Digest, Form], float]:
        with self._lock:
            rows = self._db.execute("SELECT blob, form, used FROM blobs").fetchall()
        return {(Digest.parse(blob), Form(form)): used for blob, form, used in rows}

    def forget_blob(self, blob: Digest, form: Form) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM blobs WHERE blob = ? AND form = ?", (str(blob), form.value))

    def sharers(self, image: Digest, blob: Digest) -> list[ImageRecord]:
        """The other images that are said to hold a blob."""
        return [each for each in self.images() if each.digest != image and blob in dict(each.blobs)]

    def referenced(self) -> set[Digest]:
        """Blobs that some image uses."""
        with self._lock:
            rows = self._db.execute("SELECT DISTINCT blob FROM image_blobs").fetchall()
        return {Digest.parse(blob) for (blob,) in rows}


def _mount_record(row: tuple[Any, ...]) -> MountRecord:
    return MountRecord(row[0], Digest.parse(row[1]), Form(row[2]), *row[3:])


def _copies_on_write(directory: Path) -> bool:
    """Whether each change of a file there takes new room (btrfs, bcachefs, ZFS): a store may end the process then."""
    found = ctypes.create_string_buffer(256)  # struct statfs, of 120 bytes; its first word is the type
    if _statfs(os.fsencode(directory), found):
        return False
    return int.from_bytes(found.raw[:4], sys.byteorder) in (0x9123683E, 0xCA451A4E, 0x2FC12FC1)
