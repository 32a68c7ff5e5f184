"""A cachefiles on-demand daemon in its smallest form: every object is a file of a directory, named like its cookie.

It proves a kernel before any of the product runs on it. Facts it depends on: one message a read(2); the descriptor of
an object is O_DIRECT, so writes come from page-aligned memory in whole 4 KiB; a READ's answer is an ioctl on it.
"""

import fcntl
import mmap
import os
import select
import struct
from pathlib import Path

OPEN, CLOSE, READ = 0, 1, 2
READ_COMPLETE = 0x40049801  # _IOW(0x98, 1, int)
HEADER = struct.Struct("=IIII")  # msg_id, opcode, len, object_id
OPEN_BODY = struct.Struct("=IIII")  # volume_key_size, cookie_key_size, fd, flags
READ_BODY = struct.Struct("=QQ")  # offset, length
FILL = 1 << 20


class Filler:
    """Bind the device and serve it until killed."""

    def __init__(self, cache: Path, objects: Path, limits: dict[str, int] | None = None) -> None:
        self.device = os.open("/dev/cachefiles", os.O_RDWR)
        cache.mkdir(exist_ok=True)
        percents = [f"{name} {percent}%" for name, percent in (limits or {}).items()]
        for command in (f"dir {cache}", "tag rig", *percents, "bind ondemand"):
            os.write(self.device, command.encode())
        self.objects = objects
        self.open = {}
        self.buffer = mmap.mmap(-1, FILL)

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.device, select.POLLIN)
        while True:
            poll.poll()
            message = os.read(self.device, 1024)
            if message:
                self._handle(message)

    def _handle(self, message: bytes) -> None:
        message_id, opcode, _, object_id = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        if opcode == OPEN:
            self._open(message_id, object_id, body)
        elif opcode == CLOSE:
            for end in self.open.pop(object_id):
                os.close(end)
        elif opcode == READ:
            source, target = self.open[object_id]
            self._fill(source, target, *READ_BODY.unpack_from(body))
            fcntl.ioctl(target, READ_COMPLETE, message_id)

    def _open(self, message_id: int, object_id: int, body: bytes) -> None:
        volume_size, cookie_size, target, _ = OPEN_BODY.unpack_from(body)
        start = OPEN_BODY.size + volume_size
        cookie = body[start : start + cookie_size].decode()
        source = os.open(self.objects / cookie, os.O_RDONLY)
        self.open[object_id] = (source, target)
        os.write(self.device, f"copen {message_id},{os.fstat(source).st_size}".encode())

    def _fill(self, source: int, target: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            wanted = min(FILL, end - offset)
            self.buffer[:wanted] = os.pread(source, wanted, offset).ljust(wanted, b"\0")
            if os.pwrite(target, memoryview(self.buffer)[:wanted], offset) != wanted:
                raise OSError("short write to the cache")
            offset += wanted
