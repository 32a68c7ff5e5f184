"""Settings of registries: the `[registry]` table of the daemon's configuration file (see loader/config.py).

[registry]
timeout = 30                 # seconds without a byte, or with less than 4 KiB each, before a request counts as lost
connect_timeout = 10
insecure = false             # every host: plain HTTP and unchecked certificates are fine
auth_file = "/root/.docker/config.json"

[registry.hosts."docker.io"]
mirrors = ["https://mirror.example.org", "10.0.0.5:5000"]    # tried first, in this order
insecure = false
ca_file = "/etc/ssl/private-ca.pem"
upload_chunk = 0             # bytes per upload request; 0: one request for the whole blob
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loader.errors import UsageError

DEFAULT_CONFIG = Path("/etc/erofs-loader/config.toml")


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Settings of one registry host."""

    mirrors: tuple[str, ...] = ()
    insecure: bool = False
    ca_file: str | None = None
    timeout: float | None = None
    connect_timeout: float | None = None
    upload_chunk: int = 0


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Settings of all registries."""

    timeout: float = 30.0
    connect_timeout: float = 10.0
    insecure: bool = False
    auth_file: str | None = None
    hosts: Mapping[str, HostConfig] = field(default_factory=dict)

    def host(self, host: str) -> HostConfig:
        """A host's settings with the general ones filled in. Loopback hosts count as insecure, as docker has it."""
        own = self.hosts.get(host, HostConfig())
        return HostConfig(
            mirrors=own.mirrors,
            insecure=own.insecure or self.insecure or is_loopback(host),
            ca_file=own.ca_file,
            timeout=own.timeout or self.timeout,
            connect_timeout=own.connect_timeout or self.connect_timeout,
            upload_chunk=own.upload_chunk,
        )

    @classmethod
    def from_table(cls, table: Any, file: Path) -> RegistryConfig:
        """Read a file's `[registry]` table; UsageError names an unknown or mistyped key."""
        values = _checked(table, cls, f"{file}: registry")
        hosts = values.pop("hosts", {})
        if not isinstance(hosts, dict):
            raise UsageError(f"{file}: registry.hosts must be a table")
        return cls(
            **values,
            hosts={name: _host_from_table(entry, f'{file}: registry.hosts."{name}"') for name, entry in hosts.items()},
        )


def load_registry_config(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> RegistryConfig:
    """The `[registry]` table of a file; without `path`: $EROFS_LOADER_CONFIG, else the default file if there is one."""
    explicit = path or (Path(environ["EROFS_LOADER_CONFIG"]) if environ.get("EROFS_LOADER_CONFIG") else None)
    chosen = explicit or DEFAULT_CONFIG
    try:
        document = tomllib.loads(chosen.read_text())
    except FileNotFoundError:
        if explicit:
            raise UsageError(f"configuration {chosen}: no such file") from None
        return RegistryConfig()
    except OSError as error:
        raise UsageError(f"configuration {chosen}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{chosen}: {error}") from None
    config = RegistryConfig.from_table(document.get("registry", {}), chosen)
    return replace(config, insecure=True) if document.get("insecure") is True else config


def is_loopback(host: str) -> bool:
    """Whether a `host[:port]` is this machine."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name in ("localhost", "[::1]") or name.startswith("127.")


def _host_from_table(table: Any, where: str) -> HostConfig:
    values = _checked(table, HostConfig, where)
    mirrors = values.get("mirrors", ())
    if not all(isinstance(mirror, str) for mirror in mirrors):
        raise UsageError(f"{where}.mirrors must be a list of strings")
    return HostConfig(**{**values, "mirrors": tuple(mirrors)})


_KINDS: dict[str, tuple[type, ...]] = {
    "timeout": (int, float),
    "connect_timeout": (int, float),
    "insecure": (bool,),
    "auth_file": (str,),
    "ca_file": (str,),
    "mirrors": (list,),
    "hosts": (dict,),
    "upload_chunk": (int,),
}


def _checked(table: Any, cls: type, where: str) -> dict[str, Any]:
    """A table's values; `where` is the file and the table's name."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table")
    known = {item.name for item in fields(cls)}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}.{key}: unknown key", f"known keys: {', '.join(sorted(known))}")
        wrong_bool = isinstance(value, bool) and bool not in _KINDS[key]
        if wrong_bool or not isinstance(value, _KINDS[key]):
            raise UsageError(f"{where}.{key} must be a {_KINDS[key][-1].__name__}, not {value!r}")
        if isinstance(value, int | float) and (
            value < 0 or (value == 0 and key != "upload_chunk" and not isinstance(value, bool))
        ):
            raise UsageError(f"{where}.{key} must be positive, not {value!r}")
    return dict(table)
