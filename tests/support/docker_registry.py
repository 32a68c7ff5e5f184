"""A real docker-registry (distribution) of one's own on loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Self

_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
http: {{addr: "{address}"}}
{more}
"""


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class DockerRegistry:
    """A registry that keeps its blobs under `directory`, at `address` while the context is open.

    `more` is added to its configuration (YAML), for example an `auth` section.
    """

    def __init__(self, directory: Path, more: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.more = directory, more
        self.address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, again on the same address after a stop; returns once it answers."""
        config = self.directory / "registry.yml"
        config.write_text(_CONFIG.format(storage=self.directory / "storage", address=self.address, more=self.more))
        with open(self.directory / "registry.log", "ab") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
        host, _, port = self.address.rpartition(":")
        for _ in range(200):
            if self._process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("docker-registry does not start: " + (self.directory / "registry.log").read_text()[-2000:])

    def stop(self) -> None:
        """Stop it; what it stores stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def push_layout(self, layout: Path, name: str) -> str:
        """Push the image `latest` of an OCI layout as `name` ("repository:tag") with skopeo; returns its reference."""
        target = f"docker://{self.address}/{name}"
        subprocess.run(
            ["skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false", f"oci:{layout}:latest", target],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return target
