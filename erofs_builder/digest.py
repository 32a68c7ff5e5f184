"""Digests: `sha256:<64 hex>`, the only algorithm that this project writes or trusts."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from erofs_builder.errors import FormatError, IntegrityError

_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")


class Digest(NamedTuple):
    """A sha256 digest; `str()` gives the OCI spelling, `raw` the 32 bytes."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Parse `sha256:<hex>`; FormatError names what was found instead."""
        if not _PATTERN.match(text):
            raise FormatError(f"not a sha256 digest: {text[:100]!r}")
        return cls(bytes.fromhex(text[7:]))

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """The digest of bytes at hand."""
        return cls(hashlib.sha256(data).digest())

    @property
    def hex(self) -> str:
        return self.raw.hex()

    def __str__(self) -> str:
        return f"sha256:{self.raw.hex()}"

    def verify(self, data: bytes | bytearray | memoryview, what: str) -> None:
        """Raise IntegrityError, naming `what`, unless `data` has this digest."""
        found = Digest.of(data)
        if found != self:
            raise IntegrityError(f"{what}: expected {self}, got {found} ({len(data)} bytes)")
