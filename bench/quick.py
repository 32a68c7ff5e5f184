"""A registry that answers ranges at once: from the files of a docker-registry, by sendfile(2); it forwards all else.

python -m bench.quick --target 127.0.0.1:5000 --storage DIR

A docker-registry takes a millisecond or two for a range, sometimes ten, which hides what else a read costs. The process
prints its port and ends with its standard input. `Quick` wraps that.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

_RANGE = re.compile(rb"GET /v2/\S+/blobs/sha256:([0-9a-f]{64}) .*?\r\n(?i:range): bytes=(\d+)-(\d+)\r\n", re.S)


def _serve(connection: socket.socket, target: tuple[str, int], blobs: Path) -> None:
    with suppress(ConnectionError), connection, socket.create_connection(target) as upstream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := _head(connection):
            if (match := _RANGE.match(request)) is None:
                upstream.sendall(request)
                _forward_answer(upstream, connection, has_body=not request.startswith(b"HEAD "))
                continue
            name, first, last = match[1].decode(), int(match[2]), int(match[3])
            with open(blobs / name[:2] / name / "data", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {last + 1 - first}\r\n"
                head += "Content-Type: application/octet-stream\r\n"  # stargz takes no answer without one
                connection.sendall(f"{head}Content-Range: bytes {first}-{last}/{size}\r\n\r\n".encode())
                while first <= last:
                    first += os.sendfile(connection.fileno(), file.fileno(), first, last + 1 - first)


def _head(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        if not (more := connection.recv(65536)):
            return b""
        data += more
        if not data[:1].isalpha():  # TLS
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
            return b""
    return data


def _forward_answer(upstream: socket.socket, connection: socket.socket, has_body: bool) -> None:
    """One answer of known length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += upstream.recv(65536)
    connection.sendall(data)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head, re.I)
    left = int(length[1]) - len(body) if length and has_body else 0
    while left > 0:
        data = upstream.recv(65536)
        connection.sendall(data)
        left -= len(data)


class Quick:
    """The server in a process of its own, at `address` while the context is open."""

    def __init__(self, target: str, storage: Path) -> None:
        command = [sys.executable, "-m", "bench.quick", "--target", target, "--storage", str(storage)]
        checkout = Path(__file__).resolve().parent.parent
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=checkout)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="a registry of plain HTTP that answers ranges at once")
    parser.add_argument("--target", required=True, help="host:port of a docker-registry")
    parser.add_argument("--storage", type=Path, required=True, help="its rootdirectory")
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    blobs = options.storage / "docker/registry/v2/blobs/sha256"
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, (host, int(port)), blobs), daemon=True).start()


if __name__ == "__main__":
    main()
