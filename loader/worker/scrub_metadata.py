"""`scrub` of images' metadata: the payloads on this node, and what the kernel made of them (cachefiles).

No reader waits for metadata: what is wrong is written over, in the file that the kernel reads. What it has taken from
there meanwhile (inodes, names) stays until it is dropped from memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.payload import Form
from loader.cache.kernel_files import KernelFile
from loader.errors import LoaderError
from loader.worker.checks import Checked, Checks
from loader.worker.kernel_look import KernelLook, is_there
from loader.worker.objects import StoredMetadata
from loader.worker.payloads import Payloads

log = logging.getLogger(__name__)
_FAILURES = (LoaderError, FormatError, IntegrityError, OSError)


class MetadataScrubber:
    """Checks and repairs. `kernel`: where the kernel has cache files of its own."""

    def __init__(self, payloads: Payloads, kernel: KernelLook | None) -> None:
        self._payloads, self._kernel = payloads, kernel

    def parts(self, report: dict[str, Any]) -> Iterator[Checks]:
        """One for each file: what is found in it, once it is iterated over."""
        for image, form in self._payloads.stored():
            report["total"] += self._payloads.size(image, form)
            yield self._payload(image, form, report["skipped"])
        if (kernel := self._kernel) is None:
            return
        for found, stored in kernel.metadata():
            report["total"] += found.allocated
            yield self._kernels(kernel, found, stored, report["skipped"])

    def _payload(self, image: Digest, form: Form, skipped: list[str]) -> Checks:
        size = self._payloads.size(image, form)
        try:
            yield Checked(size, self._payloads.check(image, form), "payloads")
        except _FAILURES as error:
            log.error("the %s metadata of %s cannot be checked or repaired: %s", form.value, image, error)
            skipped.append(f"{image} ({form.value} metadata): {error}")
            yield Checked(size, isinstance(error, IntegrityError), "payloads")

    def _kernels(
        self, kernel: KernelLook, found: KernelFile, stored: StoredMetadata, skipped: list[str]
    ) -> Checks:  # fmt: skip
        """What the kernel holds of a payload, against the payload. Its holes are no damage: it asks."""
        damaged = False
        try:
            right = stored.read()
            with kernel.descriptor(found) as fd:
                if wrong := [offset for offset in range(0, len(right), BLOCK) if _is_wrong(fd, offset, right)]:
                    damaged = True
                    log.error("%s: metadata is damaged in the kernel's cache, %d blocks", found.name, len(wrong))
                    kernel.mend(found, right, wrong)
        except _FAILURES as error:
            log.error("%s cannot be checked or repaired: %s", found.name, error)
            skipped.append(f"{found.name}: {error}")
        yield Checked(found.allocated, damaged, "payloads")


def _is_wrong(fd: int, offset: int, right: bytes) -> bool:
    os.posix_fadvise(fd, offset, BLOCK, os.POSIX_FADV_DONTNEED)
    try:
        held = os.pread(fd, BLOCK, offset)
    except OSError:
        return True
    return held != right[offset : offset + BLOCK] and is_there(fd, offset, BLOCK)
