"""What a worker gives up before it reads the first byte that others made.

It parses what registries send, as root's own process: the cache is root's. So it keeps what it needs, the network, its
descriptors and writing in the cache, and loses every capability, all system calls that administrate, new Unix sockets
(root may tell most services of a machine what to do) and the means to write anywhere else. Logins' helper programs
run inside of the same bounds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from confine import drop_capabilities, filter_system_calls, restrict_writes

log = logging.getLogger(__name__)


class Confinement(NamedTuple):
    """What holds for this process. `landlock`: the kernel's ABI, 0 where it has none that restricts writing."""

    capabilities: int
    seccomp: bool
    landlock: int


def confine(writable: Iterable[Path]) -> Confinement:
    """Confine the calling process, which must have no other thread yet, to writing below `writable`.

    Capabilities go in any case, or OSError. What a kernel does not have is logged, and told in `status`.
    """
    os.umask(0o077)
    _be_the_first_to_go()
    drop_capabilities()
    landlock = 0
    try:
        landlock = restrict_writes(writable)
    except OSError as error:
        log.error("Landlock: %s", error)
    if not landlock:
        log.warning("this kernel has no Landlock: the worker may write wherever root owns files")
    try:
        filter_system_calls()
    except OSError as error:
        log.warning("the worker's system calls are not filtered: %s", error)
        return Confinement(_capabilities(), False, landlock)
    return Confinement(_capabilities(), True, landlock)


def _be_the_first_to_go() -> None:
    """When memory runs out, the kernel shall kill this process and not the keeper, which has the same rank."""
    rank = Path("/proc/self/oom_score_adj")
    rank.write_text(str(min(1000, int(rank.read_text()) + 100)))


def _capabilities() -> int:
    """The capabilities that this process could use, as bits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapPrm:"))
