"""What the supervisor and the keeper must know. Handed down as JSON in the environment, so that neither reads files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIG_ENV = "EROFS_LOADER_KEEPER_CONFIG"
SUPERVISOR_ENV = "EROFS_LOADER_SUPERVISOR"  # pid of the keeper's supervisor
STORED_ENV = "EROFS_LOADER_STORED"  # set where somebody above the supervisor keeps the descriptors too: systemd
PLANES = ("fanotify", "cachefiles")
ON_STOP = ("keep", "umount")


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """Settings of one daemon. Times in seconds; `worker_env` is passed on to workers unseen."""

    root: Path = Path("/var/lib/erofs-loader")
    socket: Path = Path("/run/erofs-loader/control.sock")
    plane: str = "fanotify"
    on_stop: str = "keep"
    deadline: float = 90.0  # a request that is older is answered with EIO, unless others are being served
    silence: float = 15.0  # a worker that does not answer a PING for so long is killed
    start_silence: float = 45.0  # the same before its first word: on a starved machine the modules alone take long
    grace: float = 30.0  # after a stop that keeps mounts, readers wait so long for the next daemon: a slow upgrade
    standby: bool = True  # keep the next worker started, waiting
    cachefiles_dir: Path | None = None  # default: ROOT/cachefiles
    cachefiles_tag: str = "erofs-loader"
    cachefiles_limits: dict[str, int] = field(default_factory=dict)  # brun, bcull, … in percent
    worker: tuple[str, ...] = (sys.executable, "-m", "loader.worker")
    nursery: tuple[str, ...] = ()  # what forks workers (loader/keeper/nursery.py); none: each is started by `worker`
    worker_env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plane not in PLANES:
            raise ValueError(f"plane {self.plane!r}: expected one of {', '.join(PLANES)}")
        if self.on_stop not in ON_STOP:
            raise ValueError(f"on_stop {self.on_stop!r}: expected one of {', '.join(ON_STOP)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> KeeperConfig:
        fields: dict[str, Any] = json.loads(text)
        for name in ("root", "socket", "cachefiles_dir"):
            if fields[name] is not None:
                fields[name] = Path(fields[name])
        for name in ("worker", "nursery"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
