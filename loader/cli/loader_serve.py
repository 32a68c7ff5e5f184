"""`serve` and `probe`: the two commands that run here and not in the daemon."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from erofs_builder.payload import Form
from loader.cache.layout import replace_file
from loader.cache.ready import boot_id
from loader.cli.common import print_json, print_table
from loader.cli.loader_settled import settled
from loader.config import SETTINGS_VARIABLE, Config
from loader.errors import KernelSupportError, LoaderError, UsageError
from loader.keeper import supervisor
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import listen_fds
from loader.probe import choose, remedy
from loader.probe import probe as probe_all
from loader.registry.config import load_registry_config

log = logging.getLogger(__name__)

CHOICE = "choice.json"
NURSERY = (sys.executable, "-m", "loader.worker.nursery")
KEEPER_MARGIN = 30.0  # the worker gives up first, and says why


def serve(configured: Callable[[], Config]) -> int:
    """Become the daemon's supervisor; its exit status. `configured` reads the configuration, or raises."""
    _log_from("info")
    config = settled(lambda: _working(configured()), listen_fds(dict(os.environ), os.getpid()))
    keeper = KeeperConfig(
        root=config.root,
        socket=config.socket,
        plane=config.plane,
        on_stop=config.on_stop,
        deadline=config.deadline + KEEPER_MARGIN,
        nursery=NURSERY,
        worker_env={SETTINGS_VARIABLE: config.encode()},
    )
    return supervisor.run(keeper)


def _log_from(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )


def _working(config: Config) -> Config:
    """The same, checked and with plane and form."""
    if config.file:
        load_registry_config(config.file)  # a mistake stops the first start, and none of a worker's later on
    _require_root("the daemon", "serve")
    _log_from(config.log_level)
    return resolved(config)


def _require_root(who: str, command: str) -> None:
    if os.geteuid() != 0:
        raise LoaderError(f"{who} mounts file systems: it must run as root", hint=f"sudo erofs-loader {command}")


def resolved(config: Config) -> Config:
    """The configuration with plane and form that work here, by a canary; what was found is kept until the next boot.

    (A daemon that takes over mounts must go on as before, and cannot try a device that its predecessor still holds.)
    """
    config.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(config.root)
    known = _read_choice(config.root)
    if known and config.plane in ("auto", known[0]) and config.form in ("auto", known[1]):
        return _applied(config, *known)
    finding = choose(config.root, config.plane, config.form)
    log.info("plane %s, form %s: the canary was read right", finding.plane, finding.form.value)
    choice = {"boot": boot_id().hex(), "plane": finding.plane, "form": finding.form.value, "shares": finding.shares}
    replace_file(config.root / CHOICE, json.dumps(choice).encode(), config.root)
    return _applied(config, finding.plane, finding.form.value, finding.shares)


def _check_owner(root: Path) -> None:
    """Whoever else can write there could put other files and links under the daemon's feet."""
    found = root.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{root} can be written by others than root", hint=f"chown root {root}; chmod go-w {root}")


def _applied(config: Config, plane: str, form: str, shares: bool) -> Config:
    return replace(config, plane=plane, form=form, page_domain=config.page_domain if shares else "off")


def _read_choice(root: Path) -> tuple[str, str, bool] | None:
    """The plane and form that worked earlier in this boot, and whether images share page cache there."""
    try:
        choice = json.loads((root / CHOICE).read_bytes())
        found = choice["plane"], choice["form"], bool(choice.get("shares"))
        return found if choice["boot"] == boot_id().hex() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def probe(config: Config, as_json: bool) -> int:
    """Say what works here, tried; 13 if nothing does."""
    _require_root("the probe", "probe")
    findings = probe_all(config.root)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        rows = [
            (finding.plane, finding.form.value, "works" if finding.works else "no", finding.missing or "")
            for finding in findings
        ]
        print_table(("PLANE", "FORM", "HERE", "MISSING"), rows)
        for finding in findings:
            if finding.works and (finding.plane, finding.form) == ("fanotify", Form.ENCODED):
                shared = "works" if finding.shares else f"no, needs {finding.not_shared}"
                click.echo(f"page cache shared between images: {shared}")
        if hint := remedy(findings):
            click.echo(f"hint: {hint}")
    return 0 if any(finding.works for finding in findings) else KernelSupportError.exit_code
