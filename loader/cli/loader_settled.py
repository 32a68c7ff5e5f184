"""The configuration that `serve` starts with: what is configured, and where that cannot be, what it started with last.

A service manager that starts the daemon again after a crash hands it the kernel's descriptors, and closes them for good
once it gives up: what is missing of the decoded mounts then reads as zeros. A mistake that somebody has made in the
configuration meanwhile must not lead there. So each start keeps its settings in the unit's runtime directory, which is
found without them and is empty after a boot, as the descriptor store is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from loader.cache.layout import replace_file
from loader.config import Config
from loader.errors import LoaderError, UsageError
from loader.keeper import supervisor

log = logging.getLogger(__name__)
NAME = "settings.json"
VARIABLE = "RUNTIME_DIRECTORY"  # systemd.exec(5)


def settled(configured: Callable[[], Config], fds: Mapping[str, int]) -> Config:
    """What `configured` gives or, where it raises, and `fds` guard mounts, the settings of the last start.

    LoaderError: there are none. Never with a status that has the service manager give up and close the descriptors.
    """
    try:
        config = configured()
        supervisor.check_plane(config.plane, fds)
    except (LoaderError, OSError) as error:
        if not supervisor.guarded(fds):
            raise
        return _of_last_start(error)
    _keep(config)
    return config


def _of_last_start(error: LoaderError | OSError) -> Config:
    try:
        config = Config.decode(_place().read_text())
    except (OSError, ValueError, UsageError) as missing:
        log.error("no settings of an earlier start: %s", missing)
        raise LoaderError(f"{error}; readers of what is mounted wait", getattr(error, "hint", None)) from None
    log.error("%s: started with the settings of before, since mounts depend on it", error)
    return config


def _keep(config: Config) -> None:
    """For the next start; outside of a unit there is none that gets descriptors."""
    if os.environ.get(VARIABLE):
        try:
            replace_file(_place(), config.encode().encode(), _place().parent, durable=False)
        except OSError as error:
            log.warning("cannot keep the settings for the next start: %s", error)


def _place() -> Path:
    return Path(os.environ.get(VARIABLE, "/run/erofs-loader").partition(":")[0]) / NAME
