"""Probe: which planes and forms work on this machine, found out by mounting and reading a canary on each.

A version number is never asked: distributions switch options off, backport and remove. What counts is that an image was
mounted, the kernel asked for what was missing, a refusal was an error, and the right bytes were read.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erofs_builder.payload import Form
from loader.errors import KernelSupportError
from loader.planes import cachefiles_canary, fanotify_canary
from loader.planes.canary import CanaryFailed, CanaryImage
from loader.planes.needs import ANOTHER_KERNEL, OTHER_FORM, explain

log = logging.getLogger(__name__)

# In the order of preference: what is decoded by the kernel first, what outlives 7.1 first.
COMBINATIONS = (
    ("fanotify", Form.ENCODED),
    ("cachefiles", Form.ENCODED),
    ("fanotify", Form.DECODED),
    ("cachefiles", Form.DECODED),
)
_CANARIES = {"fanotify": fanotify_canary.run, "cachefiles": cachefiles_canary.run}
INDEXES = {Form.ENCODED: "zstd, classic full index, fragments", Form.DECODED: "chunks, device table"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What the canary said of one plane and form. `missing` and `remedy` are None where it works."""

    plane: str
    form: Form
    works: bool
    seconds: float
    missing: str | None = None
    remedy: str | None = None
    detail: str | None = None
    shares: bool = False  # page cache between images
    not_shared: str | None = None  # why not, where it works otherwise

    def to_json(self) -> dict[str, Any]:
        return {
            "plane": self.plane,
            "form": self.form.value,
            "index": INDEXES[self.form],
            "works": self.works,
            "missing": self.missing,
            "remedy": self.remedy,
            "detail": self.detail,
            "shares_page_cache": self.shares,
            "not_shared": self.not_shared,
            "seconds": round(self.seconds, 3),
        }


def probe(root: Path, combinations: Sequence[tuple[str, Form]] = COMBINATIONS) -> list[Finding]:
    """Try every combination, on the file system of the cache root `root` (made if it is not there)."""
    root.mkdir(parents=True, exist_ok=True)
    return [probe_one(root, plane, form) for plane, form in combinations]


def probe_one(root: Path, plane: str, form: Form) -> Finding:
    """Try one combination, and where it works, whether images share page cache in it."""
    directory = Path(tempfile.mkdtemp(prefix="probe-", dir=root))
    started = time.monotonic()
    try:
        _CANARIES[plane](directory, CanaryImage.make(form))
    except CanaryFailed as failure:
        missing = explain(failure, plane, form, root)
        return Finding(
            plane, form, False, time.monotonic() - started, missing.what, missing.remedy, detail=str(failure)
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    seconds = time.monotonic() - started
    can = (plane, form) == ("fanotify", Form.ENCODED)
    why = _try_sharing(root) if can else "the fanotify plane and the encoded form"
    return Finding(plane, form, True, seconds, shares=why is None, not_shared=why)


def _try_sharing(root: Path) -> str | None:
    """What keeps images from sharing page cache (fanotify, encoded: see loader/worker/sharing.py); None if they do."""
    directory = Path(tempfile.mkdtemp(prefix="probe-", dir=root))
    try:
        fanotify_canary.run_sharing(directory, CanaryImage.make(Form.ENCODED))
    except CanaryFailed as failure:
        log.info("page cache is not shared: %s", failure)
        return explain(failure, "fanotify", Form.ENCODED, root).what
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return None


def choose(root: Path, plane: str = "auto", form: str = "auto") -> Finding:
    """The first combination, in order of preference, that works and fits; each of plane and form may be "auto".

    KernelSupportError says for each that fits what is missing, and what to do: to ask for another one, if one works.
    """
    fitting = [(name, kind) for name, kind in COMBINATIONS if plane in ("auto", name) and form in ("auto", kind.value)]
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, kind in fitting:
        finding = probe_one(root, name, kind)
        if finding.works:
            return finding
        failures.append(finding)
    others = (probe_one(root, *one) for one in COMBINATIONS if one not in fitting)
    raise no_support(failures, next((finding for finding in others if finding.works), None))


def no_support(failures: Sequence[Finding], other: Finding | None = None) -> KernelSupportError:
    """The error that says what is missing on every combination. `other` was not asked for, and works."""
    lines = [f"{item.plane}, {item.form.value}: needs {item.missing}" for item in failures]
    if other is None:
        return KernelSupportError("no way to serve images here\n" + "\n".join(lines), remedy(failures))
    words = "no way to serve images with this plane and form here"
    return KernelSupportError(
        "\n".join([words, *lines]), f"the {other.plane} plane with the {other.form.value} form works here"
    )


def remedy(findings: Sequence[Finding]) -> str | None:
    """The one thing to do: where nothing works, or where the preferred plane needs no more than a change here.

    A change on this machine comes before another kernel, and nothing has to be done for a plane that is not needed.
    """
    works = any(item.works for item in findings)
    preferred = [item for item in findings if item.plane == COMBINATIONS[0][0]]
    if any(item.works for item in preferred):
        return None
    needed = dict.fromkeys(item.remedy for item in (preferred if works else findings) if item.remedy)
    here = [text for text in needed if text not in (ANOTHER_KERNEL, OTHER_FORM)]
    return next(iter(here), None if works or not needed else ANOTHER_KERNEL)
