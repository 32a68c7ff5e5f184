"""Logins as docker and podman keep them: `config.json` (`auths`, `credHelpers`, `credsStore`) and helper programs."""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loader.errors import RegistryError, UsageError

_HELPER_TIMEOUT = 30
_HUB_KEYS = ("index.docker.io", "docker.io", "registry-1.docker.io")


class Credentials(NamedTuple):
    """A login. An identity token stands in for name and password at token servers."""

    username: str
    password: str
    identity_token: str = ""

    def __repr__(self) -> str:  # these must not end up in a log
        return f"Credentials({self.username!r}, ***)"

    @property
    def basic(self) -> str:
        """The Authorization header's value."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class Keychain:
    """Looks logins up in the first of the given files that knows the host."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    @classmethod
    def default(cls, auth_file: str | None = None, environ: Mapping[str, str] = os.environ) -> Keychain:
        """The given file, else the places where docker and podman look."""
        if auth_file:
            return cls([Path(auth_file)])
        home = Path(environ.get("HOME") or "/root")
        files = [Path(environ["DOCKER_CONFIG"]) if environ.get("DOCKER_CONFIG") else home / ".docker"]
        files = [directory / "config.json" for directory in files]
        if environ.get("REGISTRY_AUTH_FILE"):
            files.append(Path(environ["REGISTRY_AUTH_FILE"]))
        if environ.get("XDG_RUNTIME_DIR"):
            files.append(Path(environ["XDG_RUNTIME_DIR"]) / "containers/auth.json")
        return cls(files)

    def get(self, host: str, repository: str = "") -> Credentials | None:
        """The login for a host (podman also has entries per repository), or None. Files are read afresh each time."""
        for file in self._files:
            document = _load(file)
            if document is None:
                continue
            found = _lookup(document, host, repository, file)
            if found is not None:
                return found
        return None


def _load(file: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"login file {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"login file {file}: not JSON") from None
    if not isinstance(document, dict):
        raise UsageError(f"login file {file}: not a JSON object")
    return document


def _lookup(document: dict[str, Any], host: str, repository: str, file: Path) -> Credentials | None:
    helpers, auths = document.get("credHelpers", {}), document.get("auths", {})
    store = document.get("credsStore")
    if not isinstance(helpers, dict) or not isinstance(auths, dict):
        raise UsageError(f"login file {file}: auths and credHelpers must be objects")
    for key in _keys(host, repository):
        if key in helpers:
            return _ask_helper(str(helpers[key]), key)
    entries = {_normal(key): (key, entry) for key, entry in auths.items()}
    if store:
        stored = next((entries[key][0] for key in _keys(host, repository) if key in entries), _server_url(host))
        found = _ask_helper(str(store), stored)
        if found is not None:
            return found
    for key in _keys(host, repository):
        if key in entries:
            found = _from_entry(entries[key][1], key, file)
            if found is not None:
                return found
    return None


def _keys(host: str, repository: str) -> Iterator[str]:
    hosts = _HUB_KEYS if host in _HUB_KEYS else (host,)
    for name in hosts:
        parts = [name, *repository.split("/")] if repository else [name]
        for length in range(len(parts), 0, -1):
            yield "/".join(parts[:length])


def _normal(key: str) -> str:
    # docker writes "https://index.docker.io/v1/", "https://HOST/v2/" and "HOST"
    name = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    return name.removesuffix("/v1").removesuffix("/v2")


def _server_url(host: str) -> str:
    return "https://index.docker.io/v1/" if host in _HUB_KEYS else host


def _from_entry(entry: Any, key: str, file: Path) -> Credentials | None:
    if not isinstance(entry, dict):
        raise UsageError(f"login file {file}: the entry of {key} is not an object")
    identity = str(entry.get("identitytoken") or "")
    if entry.get("auth"):
        try:
            username, colon, password = base64.b64decode(entry["auth"]).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, TypeError, ValueError):
            raise UsageError(f"login file {file}: the auth of {key} is not base64") from None
        if not colon:
            raise UsageError(f"login file {file}: the auth of {key} has no password")
        return Credentials(username, password.rstrip("\0"), identity)
    if entry.get("username") or identity:
        return Credentials(str(entry.get("username") or ""), str(entry.get("password") or ""), identity)
    return None


def _ask_helper(name: str, server: str) -> Credentials | None:
    """Ask `docker-credential-NAME get`: protocol of docker's credential helpers."""
    program = f"docker-credential-{name}"
    if not name or "/" in name:
        raise UsageError(f"credential helper {name!r}: not a program name")
    try:
        run = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT)
    except FileNotFoundError:
        raise RegistryError(
            f"credential helper {program} is not installed", f"needed for the login of {server}"
        ) from None
    except (OSError, subprocess.TimeoutExpired):
        raise RegistryError(f"credential helper {program} does not answer") from None
    if run.returncode:
        if b"not found" in run.stdout + run.stderr:
            return None
        raise RegistryError(f"credential helper {program} failed for {server} (status {run.returncode})")
    try:
        answer = json.loads(run.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RegistryError(f"credential helper {program} gave a malformed answer for {server}") from None
    if not username and not secret:
        return None
    return Credentials("", "", secret) if username == "<token>" else Credentials(username, secret)
