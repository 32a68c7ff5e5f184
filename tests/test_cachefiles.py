"""cachefiles/: messages, and the aligned writer (on an O_DIRECT file: the kernel's rules are the same)."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefiles import AlignedWriter, Close, Open, Read, parse_message
from cachefiles.device import BLOCK, bind

VOLUME = b"erofs,domain\0"


def message(
    opcode: int, payload: bytes = b"", *, length: int | None = None, msg_id: int = 7, object_id: int = 3
) -> bytes:
    size = 16 + len(payload) if length is None else length
    return struct.pack("=IIII", msg_id, opcode, size, object_id) + payload


def open_payload(
    volume: bytes = VOLUME, cookie: bytes = b"meta", *, volume_size: int = -1, cookie_size: int = -1
) -> bytes:
    sizes = (len(volume) if volume_size < 0 else volume_size, len(cookie) if cookie_size < 0 else cookie_size)
    return struct.pack("=IIII", *sizes, 21, 0) + volume + cookie


def test_messages() -> None:
    assert parse_message(message(0, open_payload())) == Open(7, 3, 21, b"erofs,domain", b"meta")
    assert parse_message(message(1)) == Close(7, 3)
    assert parse_message(message(2, struct.pack("=QQ", 4096, 1 << 40))) == Read(7, 3, 4096, 1 << 40)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        message(1)[:15],
        message(1, length=17),
        message(1, length=15),
        message(3),
        message(2, b"x" * 15),
        message(2, b"x" * 17),
        message(0, b"x" * 15),
        message(0, open_payload(volume_size=500)),
        message(0, open_payload(cookie_size=3)),
        message(0, open_payload(volume=b"")),
        message(0, open_payload(volume=b"no nul")),
        message(0, open_payload(volume_size=0xFFFFFFFF, cookie_size=18)),
    ],
)
def test_malformed_messages(data: bytes) -> None:
    with pytest.raises(ValueError, match="cachefiles"):
        parse_message(data)


@given(st.binary(max_size=1024))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    try:
        parse_message(data)
    except ValueError:
        pass


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 5 * BLOCK, 9 * BLOCK - 1])
def test_aligned_writer_pads_and_splits(tmp_path: Path, size: int) -> None:
    path = tmp_path / "object"
    data = os.urandom(size)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    writer = AlignedWriter(2 * BLOCK)
    try:
        writer.write(fd, b"\xff" * (9 * BLOCK), BLOCK)  # what the buffer held before must not show in the padding
        writer.write(fd, data, BLOCK)
    finally:
        writer.close()
        os.close(fd)
    padded = data + bytes(-size % BLOCK)
    assert path.read_bytes() == bytes(BLOCK) + padded + b"\xff" * (9 * BLOCK - len(padded))


def test_aligned_writer_refuses_unaligned_offsets() -> None:
    writer = AlignedWriter(BLOCK)
    with pytest.raises(ValueError, match="not a multiple"):
        writer.write(-1, b"x", 512)
    writer.close()


def test_commands_name_what_was_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=f"cachefiles: dir {tmp_path}"):
            bind(fd, tmp_path, "tag")
    finally:
        os.close(fd)
    device = os.open("/dev/null", os.O_WRONLY)
    try:
        with pytest.raises(ValueError, match="no cachefiles limit"):
            bind(device, tmp_path, "tag", {"run": 1})
    finally:
        os.close(device)
