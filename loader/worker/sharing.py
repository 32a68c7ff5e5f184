"""Page cache shared between images: which domain a mount joins, and the metadata that says so to the kernel.

In one domain a file's readers get the pages of any image whose file has the same fingerprint. Nobody holds fingerprints
against the bytes: who publishes an image of a domain is trusted with the contents of all of them. So what was mounted
by its name shares with images of the same owner, and what was named by a digest alone with nothing but itself.

The decoded form does not share. When all of the daemon was killed, the kernel reads the holes of decoded blobs as zeros
until a successor takes those mounts away. Shared, such pages would also be those of images whose blobs are complete,
and which nobody takes away. In the encoded form a hole is an error.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK
from erofs_builder.erofs.sharing import announce_fingerprints, has_fingerprints
from erofs_builder.payload import Form
from loader.cache.layout import replace_file, write_over
from loader.config import DOMAIN
from loader.errors import KernelSupportError, NotFoundError, UsageError
from loader.registry.reference import RegistryReference, parse_reference

OFF, AUTO = "off", "auto"
_LONGEST = 200  # the kernel takes 255


def check_domain(name: str) -> str:
    """A domain's name as a person gives it; UsageError if it cannot be one."""
    if not DOMAIN.match(name):
        raise UsageError(f"not a domain: {name!r}", hint="up to 100 letters, digits, . _ / : and -; or off")
    return name


def owner_domain(name: str, image: Digest) -> str:
    """The domain of an image's owner: of a registry's repository, what is before its last part.

    Where that is nothing, the repository itself: nobody knows who may write to its neighbours. A layout or archive is
    an owner of its own. `name` is empty where a digest alone named the image. Such domains begin with @, which no
    name that a person gives can.
    """
    reference = parse_reference(name) if name else None
    if reference is None:
        return f"@{image}"
    if isinstance(reference, RegistryReference):
        owner = f"@{reference.host}/{reference.repository.rpartition('/')[0] or reference.repository}"
        return owner if len(owner) <= _LONGEST else f"@{hashlib.sha256(owner.encode()).hexdigest()}"
    return f"@{hashlib.sha256(str(reference.path).encode(errors='surrogateescape')).hexdigest()}"


class PageSharing:
    """How this node shares. `policy` is the configuration's, or off where the kernel cannot."""

    def __init__(self, policy: str, tmp: Path) -> None:
        self.policy = policy
        self._tmp = tmp

    def domain(
        self, form: Form, erofs: bytes | memoryview, name: str, image: Digest, wanted: str | None = None
    ) -> str | None:
        """The domain that a mount of this metadata joins, None for its own pages only.

        `wanted` by whoever mounts, it is that one: KernelSupportError or NotFoundError if it cannot be.
        """
        if wanted == OFF:
            return None
        if wanted and wanted != AUTO:
            check_domain(wanted)
            if self.policy == OFF:
                raise KernelSupportError(
                    "page cache is not shared here: the kernel cannot, or page_domain is off",
                    hint="`erofs-loader probe` says which",
                )
            if form is Form.DECODED:
                raise UsageError("the decoded form does not share page cache", hint="mount it with --form encoded")
            if not has_fingerprints(erofs):
                raise NotFoundError(
                    "the image has no fingerprints to share page cache by",
                    hint="convert it with `erofs-builder convert --fingerprints large`, or all",
                )
            return wanted
        if not self._can(form, erofs):
            return None
        return owner_domain(name, image) if AUTO in (wanted, self.policy) else self.policy

    def again(self, form: Form, erofs: bytes | memoryview, domain: str | None) -> str | None:
        """The domain of a mount that was in `domain` before, if that still can be."""
        return domain if self._can(form, erofs) else None

    def _can(self, form: Form, erofs: bytes | memoryview) -> bool:
        return self.policy != OFF and form is Form.ENCODED and has_fingerprints(erofs)

    def announced(self, payload: Path) -> Path:
        """A copy of a verified payload file with the fingerprints announced, beside it; the same file if it is there.

        What is there is compared, not trusted, and made right where another mount reads it.
        """
        copy, path = announced_bytes(payload.read_bytes()), shared_copy(payload)
        if not path.exists():
            replace_file(path, copy, self._tmp, durable=False)
        elif path.read_bytes() != copy:
            write_over(path, copy)
        return path


def announced_bytes(payload: bytes) -> bytes:
    """A payload that announces its fingerprints."""
    return announce_fingerprints(payload) + payload[BLOCK:]


def shared_copy(payload: Path) -> Path:
    """Where the copy of a payload file is that announces its fingerprints, if there is one."""
    return payload.with_suffix(".shared")
