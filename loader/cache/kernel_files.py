"""The kernel's own cache files, on the cachefiles plane: what they take, and which may be culled.

    cachefiles/cache/I<volume key>/@XX/D<cookie>      the cookie of a blob is its device slot's tag

A file has its name once nothing has the object open: that of a mounted image is a nameless one, unless it was there
before, and then the kernel refuses to cull it. What is not in here by name takes space all the same; nobody can tell
how much of it is whose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.payload import Form


@dataclass(frozen=True, slots=True)
class KernelFile:
    """A cache file of the kernel: `directory` (below cachefiles/) and `name` as `cull` wants them.

    `blob` is None for metadata, which lies on the node as a payload too, and for what no image here needs any more.
    """

    directory: Path
    name: str
    allocated: int
    blob: Digest | None
    form: Form | None

    @property
    def volume(self) -> str:
        """The volume's key."""
        return self.directory.parent.name[1:]

    @property
    def cookie(self) -> str:
        return self.name[1:]

    @property
    def decoded(self) -> bool:
        return self.form is Form.DECODED


def kernel_files(directory: Path, tags: Mapping[str, tuple[Form, Digest]]) -> list[KernelFile]:
    """All files of the cache that is bound to `directory`. `tags` says which tag is which blob's."""
    found = []
    for path in directory.glob("cache/I*/@*/D*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # culled, or on its way to the graveyard
            continue
        form, blob = tags.get(path.name[1:], (None, None))
        allocated = status.st_blocks * 512
        found.append(KernelFile(path.parent.relative_to(directory), path.name, allocated, blob, form))
    return found


def by_age(
    files: Iterable[KernelFile], used: Mapping[tuple[Digest, Form], float], pinned: set[Digest]
) -> list[KernelFile]:
    """What may be culled, what is least needed first; blobs in `pinned` stay."""

    def age(file: KernelFile) -> float:
        return used.get((file.blob, file.form), 0.0) if file.blob is not None and file.form is not None else 0.0

    return sorted((file for file in files if file.blob not in pinned), key=age)
