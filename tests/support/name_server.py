"""A name server on an address of loopback, and programs that ask it: their /etc/resolv.conf says so, nobody else's.

glibc asks port 53 only, so each server takes an address of its own of 127.0.0.0/8.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Answers = Literal["address", "no such name", "no address", "failure", "silence", "down"]
_HEADER = struct.Struct(">6H")  # id, flags, and how many questions, answers, authorities, additional records
_ADDRESS, _INTERNET = 1, 1  # type and class of an IPv4 address
_CODES = {"no such name": 3, "failure": 2}


class NameServer:
    """Says that every name has the address 127.0.0.1, or what `answers` is set to. `asked` are the names."""

    def __init__(self, directory: Path) -> None:
        pid = os.getpid()
        self.address = f"127.53.{pid >> 8 & 255}.{pid & 255 or 1}"
        self.answers: Answers = "address"
        self.asked: list[str] = []
        self._settings = directory / "resolv.conf"
        self._settings.write_text(f"nameserver {self.address}\noptions timeout:1 attempts:1\n")
        self._stopped = False

    def __enter__(self) -> Self:
        self._socket = self._bound()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._thread.join()
        self._socket.close()

    def asking(self, *command: str) -> list[str]:
        """A command that asks this server, in a mount namespace of its own."""
        script = f'mount --bind {self._settings} /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]

    def _bound(self) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bound.bind((self.address, 53))
        bound.settimeout(0.02)
        return bound

    def _serve(self) -> None:
        while not self._stopped:
            if self.answers == "down" and self._socket.fileno() >= 0:
                self._socket.close()  # from here on the kernel says that nothing listens
            elif self.answers != "down" and self._socket.fileno() < 0:
                self._socket = self._bound()
            elif self.answers != "down":
                self._answer_one()
            else:
                threading.Event().wait(0.02)

    def _answer_one(self) -> None:
        try:
            query, whence = self._socket.recvfrom(512)
        except TimeoutError:
            return
        name, question = _question(query)
        self.asked.append(name)
        if self.answers == "silence":
            return
        wanted = struct.unpack(">H", question[-4:-2])[0]
        found = self.answers == "address" and wanted == _ADDRESS
        flags = 0x8180 | _CODES.get(self.answers, 0)  # an answer, with recursion
        answer = _HEADER.pack(struct.unpack(">H", query[:2])[0], flags, 1, int(found), 0, 0) + question
        if found:
            answer += struct.pack(">HHHIH4s", 0xC00C, _ADDRESS, _INTERNET, 0, 4, socket.inet_aton("127.0.0.1"))
        self._socket.sendto(answer, whence)


def _question(query: bytes) -> tuple[str, bytes]:
    """The name that is asked for, and the question's own bytes."""
    position, labels = _HEADER.size, []
    while size := query[position]:
        labels.append(query[position + 1 : position + 1 + size].decode("latin-1"))
        position += 1 + size
    return ".".join(labels), query[_HEADER.size : position + 5]
