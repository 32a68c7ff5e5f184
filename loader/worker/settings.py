"""The settings of a new worker: those its daemon was started with, and over them what the file says now.

A mistake in the file must not keep workers from starting, with readers that wait for one. So the last file that could
be read is kept, and stands in for it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from loader.cache.layout import Layout, replace_file
from loader.config import DEFAULT_FILE, Config, load_config
from loader.errors import UsageError
from loader.registry.config import RegistryConfig, load_registry_config

log = logging.getLogger(__name__)

# All else is the keeper's too, or is what mounts were made with: a restart takes it.
RELOADED = (
    "insecure", "quota", "scrub_days", "log_level", "connections", "prefetch_connections", "readahead", "rest",
)  # fmt: skip


def current_settings(config: Config, default: Path = DEFAULT_FILE) -> tuple[Config, RegistryConfig]:
    """What the file says of what a reload may change, and of the registries. Never an error, but in the log."""
    layout = Layout(config.root)
    kept = layout.root / "records" / "config.toml"
    file = config.file or (default if default.exists() else None)
    if file is None:
        kept.unlink(missing_ok=True)
        return config, RegistryConfig(insecure=config.insecure)
    try:
        found = _read(config, file)
    except UsageError as error:
        log.error("%s: the settings stay as they were", error)
        try:
            return _read(config, kept)
        except UsageError:
            return config, RegistryConfig(insecure=config.insecure)
    try:
        replace_file(kept, file.read_bytes(), layout.tmp, durable=False)
    except OSError as error:
        log.warning("cannot keep a copy of %s: %s", file, error)
    return found


def _read(config: Config, file: Path) -> tuple[Config, RegistryConfig]:
    said = load_config(file, {})
    config = replace(config, **{name: getattr(said, name) for name in RELOADED if name not in config.given})
    registries = load_registry_config(file)
    return config, replace(registries, insecure=True) if config.insecure else registries
