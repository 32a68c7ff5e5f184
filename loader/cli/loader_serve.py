"""`serve` and `probe`: the two commands that run here and not in the daemon."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace

from loader.config import SETTINGS_VARIABLE, Config
from loader.errors import LoaderError
from loader.keeper import supervisor
from loader.keeper.config import KeeperConfig

KEEPER_MARGIN = 30.0  # the worker gives up first, and says why


def serve(config: Config) -> int:
    """Become the daemon's supervisor; its exit status."""
    if os.geteuid() != 0:
        raise LoaderError("the daemon mounts file systems: it must run as root")
    logging.basicConfig(
        level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    config = resolved(config)
    keeper = KeeperConfig(
        root=config.root,
        socket=config.socket,
        plane=config.plane,
        on_stop=config.on_stop,
        deadline=config.deadline + KEEPER_MARGIN,
        worker_env={SETTINGS_VARIABLE: config.encode()},
    )
    return supervisor.run(keeper)


def resolved(config: Config) -> Config:
    """The configuration with plane and form that work here."""
    plane = "fanotify" if config.plane == "auto" else config.plane
    form = "encoded" if config.form == "auto" else config.form
    return replace(config, plane=plane, form=form)


def probe(config: Config, as_json: bool) -> int:
    raise LoaderError("probe is not built yet")
