"""Proof that a complete file in the encoded form is the blob itself: its sha256 is the blob's digest."""

from __future__ import annotations

import hashlib
import logging
import os

from erofs_builder.digest import Digest
from loader.cache.files import CacheFile

log = logging.getLogger(__name__)

CHUNK = 1 << 20


def prove(file: CacheFile) -> bool:
    """Hash the file through our own descriptor. If it is not the blob, its wrong frames are to be fetched again.

    If no frame is wrong, its frame table is false, which no second look can change.

    Reading through a descriptor that was opened before the mark asks nobody.
    """
    if file.writer is None:
        return False
    with file.writer.descriptor() as fd:
        whole = hashlib.sha256()
        for offset in range(0, file.size, CHUNK):
            whole.update(os.pread(fd, min(CHUNK, file.size - offset), offset))
        if whole.digest() == file.blob.raw:
            return True
        wrong = [
            frame.number
            for frame in file.table
            if Digest.of(os.pread(fd, frame.encoded_size, frame.encoded_offset)).raw != frame.digest
        ]
    if not wrong:
        file.refuted = True
        log.error("%s is complete, but not the blob: the image that brought its frame table is not what it says", file)
        return False
    log.error("%s is complete, but not the blob: %d frames are damaged and will be fetched again", file, len(wrong))
    file.forget(wrong)
    return False
