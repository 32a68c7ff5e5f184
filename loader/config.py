"""The daemon's configuration: defaults < /etc/erofs-loader/config.toml < environment < options.

$EROFS_LOADER_CONFIG, and before it --config, name another file:

    root = "/var/lib/erofs-loader"        # cache and records
    socket = "/run/erofs-loader/control.sock"
    plane = "auto"                        # auto, fanotify, cachefiles
    form = "auto"                         # auto, encoded, decoded
    on_stop = "keep"                      # keep, umount: what SIGTERM does with the mounts
    insecure = false                      # plain HTTP, and TLS without a check, for every registry
    domain = "erofs-ondemand"             # cachefiles: blobs are shared inside of this domain
    page_domain = "auto"                  # images of one domain share page cache: auto (one an owner), off, or a name
    quota = "20G"                         # bytes of cached data; unset: bounded by the file system only
    scrub_days = 7                        # all of the cache is checked every so many days, slowly; 0: never
    log_level = "info"

    [fetch]
    deadline = 120.0                      # seconds that a READ is held and retried before it fails with EIO
    connections = 8                       # fetches in flight at once
    prefetch_connections = 4              # of these, at most so many for what nobody waits for yet
    readahead = "16M"                     # most bytes that are fetched ahead of one sequential reader
    rest = true                           # once a third of a blob was read, fetch the rest of it as readers go on

The tables for registries (mirrors, CAs, …) are read by `loader.registry` from the same file. The worker gets the
whole configuration from its parent as JSON in the environment variable EROFS_LOADER_SETTINGS (`encode`, `decode`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loader.errors import UsageError

DEFAULT_FILE = Path("/etc/erofs-loader/config.toml")
FILE_VARIABLE = "EROFS_LOADER_CONFIG"
SETTINGS_VARIABLE = "EROFS_LOADER_SETTINGS"
DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,99}\Z")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_CHOICES = {
    "plane": ("auto", "fanotify", "cachefiles"),
    "form": ("auto", "encoded", "decoded"),
    "on_stop": ("keep", "umount"),
    "log_level": ("debug", "info", "warning", "error"),
}


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set. Paths are absolute, sizes bytes, times seconds."""

    root: Path = Path("/var/lib/erofs-loader")
    socket: Path = Path("/run/erofs-loader/control.sock")
    file: Path | None = None  # the TOML file that was read
    plane: str = "auto"
    form: str = "auto"
    on_stop: str = "keep"
    insecure: bool = False
    domain: str = "erofs-ondemand"
    page_domain: str = "auto"
    quota: int | None = None
    scrub_days: float = 7.0
    log_level: str = "info"
    deadline: float = 120.0
    connections: int = 8
    prefetch_connections: int = 4
    readahead: int = 16 << 20
    rest: bool = True
    given: tuple[str, ...] = ()  # what the command line said, over whatever the file says later

    def encode(self) -> str:
        """The configuration as JSON, for the worker's environment."""
        return json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()})

    @classmethod
    def decode(cls, text: str) -> Config:
        """The reverse of `encode`."""
        return _checked(cls(), json.loads(text), SETTINGS_VARIABLE)


def load_config(
    file: Path | None = None, environment: Mapping[str, str] = os.environ, options: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then the TOML file, the environment and the options that are not None; UsageError names the culprit."""
    config = Config()
    named = file or (Path(environment[FILE_VARIABLE]) if environment.get(FILE_VARIABLE) else None)
    path = named or DEFAULT_FILE
    if named is not None or path.exists():
        config = _checked(config, *_read_toml(path))
        config = replace(config, file=path.absolute())
    names = {"root": "EROFS_LOADER_ROOT", "socket": "EROFS_LOADER_SOCKET"}
    config = _checked(config, {k: environment[v] for k, v in names.items() if environment.get(v)}, "environment")
    given = {k: v for k, v in (options or {}).items() if v is not None}
    return replace(_checked(config, given, "command line"), given=tuple(given))


def parse_size(value: int | str) -> int:
    """Bytes of `20G`, `512M`, `4096` or an integer; UsageError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"not a size: {value!r}", hint="write bytes, or a number with K, M, G or T")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _read_toml(path: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The settings, where they are, and what those of a table are called there."""
    import tomllib

    try:
        with path.open("rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    fetch = document.pop("fetch", {})
    if not isinstance(fetch, dict):
        raise UsageError(f"{path}: fetch must be a table")
    document.pop("registry", None)  # loader.registry reads it
    if mistaken := {"file", "given", *(name for name, v in document.items() if isinstance(v, dict))} & {*document}:
        raise UsageError(f"{path}: unknown setting {', '.join(sorted(mistaken))}")
    return {**document, **fetch}, str(path), {name: f"fetch.{name}" for name in fetch}


def _checked(config: Config, values: Mapping[str, Any], where: str, called: Mapping[str, str] | None = None) -> Config:
    called = called or {}
    known = {field.name for field in fields(Config)}
    if unknown := sorted(called.get(name, name) for name in set(values) - known):
        settings = sorted(known - {"file", "given"})
        raise UsageError(f"{where}: unknown setting {', '.join(unknown)}", hint=f"known: {', '.join(settings)}")
    checked = {name: _converted(name, value, where, called.get(name, name)) for name, value in values.items()}
    return replace(config, **checked)


def _converted(name: str, value: Any, where: str, called: str) -> Any:
    if name in ("root", "socket", "file"):
        if not isinstance(value, str | Path | None):
            raise UsageError(f"{where}: {called} must be a path, not {value!r}")
        return Path(value).absolute() if value not in (None, "None") else None
    if name == "given":
        return tuple(value)
    if name in ("quota", "readahead"):
        try:
            return None if value is None else parse_size(value)
        except UsageError as error:
            raise UsageError(f"{where}: {called}: {error}", error.hint) from None
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(f"{where}: {called} is {value!r}", hint=f"one of {', '.join(_CHOICES[name])}")
    if name in ("connections", "prefetch_connections") and not (type(value) is int and 1 <= value <= 256):
        raise UsageError(f"{where}: {called} must be from 1 to 256, not {value!r}")
    if name == "deadline":
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 86400:
            raise UsageError(f"{where}: {called} must be seconds, more than 0 and at most 86400, not {value!r}")
        return float(value)
    if name == "scrub_days":
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 3650:
            raise UsageError(f"{where}: {called} must be from 0 (never) to 3650, not {value!r}")
        return float(value)
    if name in ("domain", "page_domain") and not (isinstance(value, str) and DOMAIN.match(value)):
        choice = "auto, off, or a name" if name == "page_domain" else "a name"
        raise UsageError(f"{where}: {called} is {value!r}", hint=f"{choice} of letters, digits, . _ / : and -")
    if name in ("insecure", "rest") and not isinstance(value, bool):
        raise UsageError(f"{where}: {called} must be true or false, not {value!r}")
    return value
