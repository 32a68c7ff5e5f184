"""Tar bytes for tests: Python's tarfile for what it can write, raw header blocks for what it cannot."""

from __future__ import annotations

import io
import tarfile
from typing import Any

TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


class Tar:
    """A growing archive; `bytes()` of it ends it."""

    def __init__(self, form: int = tarfile.PAX_FORMAT) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.TarFile(
            fileobj=self._out, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
        )

    def add(self, name: str, kind: str = "file", data: bytes = b"", **fields: Any) -> Tar:
        """Append an entry; `fields` are TarInfo's attributes."""
        info = tarfile.TarInfo(name)
        info.type = TYPES[kind]
        info.mode = 0o755 if kind == "dir" else 0o644
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def __bytes__(self) -> bytes:
        self._tar.close()
        return self._out.getvalue()


def header(name: bytes = b"f", kind: bytes = b"0", magic: bytes = b"ustar\x0000", **fields: bytes) -> bytes:
    """One raw header block with a right checksum; `fields` replace the bytes of number and name fields."""
    places = {
        "mode": (100, b"0000644\0"),
        "uid": (108, b"0000000\0"),
        "gid": (116, b"0000000\0"),
        "size": (124, b"00000000000\0"),
        "mtime": (136, b"00000000000\0"),
        "link": (157, b""),
        "devmajor": (329, b"0000000\0"),
        "devminor": (337, b"0000000\0"),
        "prefix": (345, b""),
        "sparse": (386, b""),
    }
    block = bytearray(512)
    block[: len(name)] = name
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    for key, (offset, default) in places.items():
        value = fields.get(key, default)
        block[offset : offset + len(value)] = value
    return checked(block)


def checked(block: bytearray | bytes) -> bytes:
    """The block with its checksum written in."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_header(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    """A PAX extended header and its data."""
    data = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + value + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        data += str(length).encode() + body
    return header(b"pax", kind, size=b"%011o\0" % len(data)) + data + bytes(-len(data) % 512)


END = bytes(1024)
