"""A real docker-registry on the host's side of the link, and what its log says it sent."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 5000  # of the first lane's
_QUIET = 0.15  # seconds
CONFIG = """version: 0.1
log: {{level: info, formatter: json}}
storage:
  filesystem: {{rootdirectory: {store}}}
  delete: {{enabled: true}}
http: {{addr: 127.0.0.1:{port}}}
"""


class Registry:
    """docker-registry over `store`, which others may share; stopping and starting it again keeps its contents."""

    def __init__(self, folder: Path, store: Path, port: int = PORT) -> None:
        self.address = f"127.0.0.1:{port}"
        self.folder, self.store = folder, store
        self.log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        (folder / "config.yml").write_text(CONFIG.format(store=store, port=port))

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process and self._process.poll() is None:
            return
        command = ["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", str(self.folder / "config.yml")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise RuntimeError(f"docker-registry does not answer, see {self.log}")

    def stop(self) -> None:
        """SIGKILL, as a registry that went away."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def blob_bytes(self) -> dict[str, int]:
        """Bytes of each blob (digest) that were sent in answers to GET since the log began.

        The registry logs an answer after who asked has got it: until the log is quiet, it is waited for.
        """
        before, sent = None, self._logged()
        while sent != before:
            time.sleep(_QUIET)
            before, sent = sent, self._logged()
        return sent

    def blob_sizes(self) -> dict[str, int]:
        """Bytes of each blob (digest) that it has."""
        blobs = self.store / "docker/registry/v2/blobs/sha256"
        return {f"sha256:{path.parent.name}": path.stat().st_size for path in blobs.glob("*/*/data")}

    def _logged(self) -> dict[str, int]:
        sent: dict[str, int] = {}
        for line in self.log.read_text().splitlines():
            if not line.startswith("{"):
                continue
            entry = json.loads(line)
            uri = str(entry.get("http.request.uri", ""))
            if (
                entry.get("msg") == "response completed"
                and entry.get("http.request.method") == "GET"
                and "/blobs/" in uri
            ):
                digest = uri.rsplit("/", 1)[1]
                sent[digest] = sent.get(digest, 0) + int(entry.get("http.response.written", 0))
        return sent
