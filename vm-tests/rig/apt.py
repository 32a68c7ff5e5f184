"""Debian packages of any suite, without touching the machine's own apt: a private sources list and state.

The suites are signed by keys that bookworm's debian-archive-keyring already holds.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org/debian"
SECURITY_MIRROR = "http://deb.debian.org/debian-security"


class AptError(Exception):
    """apt could not read its lists, or has no such package."""


class Apt:
    """One suite, its lists kept under `state`."""

    def __init__(self, suite: str, state: Path) -> None:
        self.suite = suite
        self.state = state / suite
        self._options: list[str] = []

    def update(self) -> None:
        """Read the suite's package lists."""
        for name in ("lists/partial", "cache/archives/partial", "parts"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        (self.state / "status").touch()
        mirror = SECURITY_MIRROR if self.suite.endswith("-security") else MIRROR
        sources = self.state / "sources.list"
        sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {self.suite} main\n")
        settings = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": self.state / "parts",
            "Dir::State": self.state,
            "Dir::State::Lists": self.state / "lists",
            "Dir::State::Status": self.state / "status",
            "Dir::Cache": self.state / "cache",
            "APT::Sandbox::User": "root",
            "APT::Update::Post-Invoke-Success::": "",
            "Acquire::Languages": "none",
        }
        self._options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        self._run("apt-get", "-q", "update")

    def newest(self, pattern: str) -> tuple[str, str]:
        """Name and version of the newest package that matches the shell pattern."""
        names = fnmatch.filter(self._run("apt-cache", "pkgnames", re.split(r"[*?[]", pattern)[0]).split(), pattern)
        found: dict[str, str] = {}
        for name in names:
            for line in self._run("apt-cache", "madison", name).splitlines():
                version = line.split("|")[1].strip()
                if name not in found or later(version, found[name]):
                    found[name] = version
        if not found:
            raise AptError(f"no package {pattern} in {self.suite}")
        best = next(iter(found))
        for name, version in found.items():
            if later(version, found[best]):
                best = name
        return best, found[best]

    def download(self, name: str, version: str, folder: Path) -> Path:
        """The .deb of that version, in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.glob("*.deb"))
        self._run("apt-get", "-q", "download", f"{name}={version}", cwd=folder)
        (deb,) = set(folder.glob("*.deb")) - before
        return deb

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [program, *self._options, *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AptError(f"{program} {' '.join(arguments)} ({self.suite}): {done.stderr.strip()}")
        return done.stdout


def later(one: str, other: str) -> bool:
    """Debian's own version order."""
    return subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False).returncode == 0
