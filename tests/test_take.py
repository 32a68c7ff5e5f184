"""The end of a range request in C, beside the Python that does the same."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from erofs_builder._hot import lib as hot
from erofs_builder.frames import Frame
from loader._take import ffi, lib
from loader.registry.again import Again
from loader.registry.ranges import Origin, RangePool, parse_head
from tests.support.conversation import Conversation, plain_head

BODY = bytes(range(256)) * 32
FIRST = 4096
LAST = FIRST + len(BODY) - 1
FRAME = Frame(0, FIRST, len(BODY), 0, len(BODY), hashlib.sha256(BODY).digest())
RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:[0-9]{1,18}|\*)\Z")
HEAD = plain_head(FIRST, len(BODY))


def _is_plain(head: bytes) -> bool:
    return bool(lib.eod_is_plain(ffi.from_buffer(head), len(head), FIRST, LAST))


def _is_plain_twin(head: bytes) -> bool:
    """By the Python that all other answers go through: whatever C takes, it takes and understands in the same way."""
    try:
        parsed = parse_head(head[:-4])
    except ValueError:
        return False
    found = RANGE.match(parsed.fields.get("content-range", ""))
    return (
        parsed.status == 206
        and parsed.keep
        and parsed.length == len(BODY)
        and found is not None
        and (int(found[1]), int(found[2])) == (FIRST, LAST)
    )


FIELDS = st.sampled_from(
    [
        f"Content-Length: {len(BODY)}", f"content-length:{len(BODY)} ", "Content-Length: 1", "Content-Length: +8192",
        f"Content-Range: bytes {FIRST}-{LAST}/*", f"CONTENT-RANGE:\tbytes {FIRST}-{LAST}/123456",
        f"Content-Range: bytes {FIRST}-{LAST}", "Content-Range: bytes 0-8191/*", f"Content-Range: {FIRST}-{LAST}/*",
        f"Content-Range: bytes {FIRST}-{LAST}/9999999999999999999", "Connection: close", "connection: Keep-Alive",
        "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Server: x: y", "X-Empty:", ": nameless", "no colon",
        " folded: 1", "odd name: 1", "X-Nul: \0", "X-Bell: \a", "X-High: \xff",
    ]
)  # fmt: skip
STATUS = st.sampled_from(
    ["HTTP/1.1 206 Partial Content", "HTTP/1.1 206", "HTTP/1.0 206 x", "HTTP/1.1 200 OK", "HTTP/2 206"]
)


@given(STATUS, st.lists(FIELDS, max_size=5))
@example("HTTP/1.1 206 x", [f"Content-Length: {len(BODY)}", f"Content-Range: bytes {FIRST}-{LAST}/*"])
def test_what_is_plain_to_c_is_so_to_python(status: str, fields: list[str]) -> None:
    head = "\r\n".join([status, *fields, "\r\n"]).encode("latin-1")
    if _is_plain(head):
        assert _is_plain_twin(head)
    elif _is_plain_twin(head):  # C leaves more to Python than it must, but only this
        assert any(ord(letter) > 126 or ord(letter) < 32 for field in fields for letter in field) or any(
            field.startswith("Content-Encoding") for field in fields
        )


@given(st.binary(max_size=200), st.integers(0, len(HEAD)))
def test_any_bytes_are_taken_or_left(noise: bytes, place: int) -> None:
    head = HEAD[:place] + noise + HEAD[place + len(noise) :]
    assert not _is_plain(head) or _is_plain_twin(head)
    assert not _is_plain(HEAD[:place]) or place == len(HEAD)


@pytest.fixture
def talk() -> Iterator[Conversation]:
    with Conversation() as conversation:
        yield conversation


def test_taken_and_written(talk: Conversation, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        for _ in range(2):
            taken = talk.ask(FIRST, len(BODY), HEAD, BODY).take(FRAME, False, file.fileno())
            assert taken is not None and bytes(taken.data) == BODY
            if not hot.eod_sha256_lanes():
                assert not taken.right
                continue
            assert taken.right and taken.written and os.pread(file.fileno(), 1 << 20, FIRST) == BODY
            os.ftruncate(file.fileno(), 0)
    assert talk.again.place == 3 and talk.again.fresh


def test_wrong_bytes_are_not_written(talk: Conversation, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        taken = talk.ask(FIRST, len(BODY), HEAD + b"\xff" + BODY[1:]).take(FRAME, False, file.fileno())
        assert taken is not None and not taken.right and not taken.written
        assert os.fstat(file.fileno()).st_size == 0


def test_what_cannot_be_written_is_right_all_the_same(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as file:
        taken = talk.ask(FIRST, len(BODY), HEAD + BODY).take(FRAME, False, file.fileno())
    assert taken is not None and not taken.written and bytes(taken.data) == BODY


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"206", b"200"),
        HEAD.replace(b"/99999999", b""),
        b"HTTP/1.1 401 no\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 206 x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"HTTP/1.1 206 x\r\nX: " + b"x" * 70000,
    ],
)
def test_what_is_odd_is_asked_for_anew(talk: Conversation, head: bytes) -> None:
    asked = talk.ask(FIRST, len(BODY), head, BODY)
    talk.server.shutdown(socket.SHUT_WR)
    assert asked.take(FRAME) is None
    assert asked.resume() is None


def test_what_is_odd_but_good_goes_on(talk: Conversation) -> None:
    asked = talk.ask(FIRST, len(BODY), HEAD.replace(b"\r\n\r\n", b"\r\nX-High: \xff\r\n\r\n") + BODY[:100])
    assert asked.take(FRAME) is None
    response = asked.resume()
    assert response is not None
    talk.server.sendall(BODY[100:])
    assert response.read() == BODY
    response.close()


def test_more_than_was_asked_for_ends_the_connection(talk: Conversation) -> None:
    asked = talk.ask(FIRST, len(BODY), HEAD + BODY + b"more")
    if asked.take(FRAME) is None:
        response = asked.resume()
        assert response is not None and response.read() == BODY
        response.close()
    assert talk.pool.ask(b"GET / HTTP/1.1\r\n\r\n") is None or talk.server.recv(10)


def test_a_connection_that_ends(talk: Conversation) -> None:
    asked = talk.ask(FIRST, len(BODY), HEAD + BODY[:100])
    talk.server.shutdown(socket.SHUT_RDWR)
    assert asked.take(FRAME) is None
    response = asked.resume()
    assert response is not None
    with pytest.raises(Exception, match="connection broke"):
        response.read()


def test_a_slow_answer_is_resumed(talk: Conversation) -> None:
    talk.again.patience = 0
    asked = talk.ask(FIRST, len(BODY), HEAD[:20])
    waiting = threading.Timer(0.05, lambda: talk.server.sendall(HEAD[20:50]))
    waiting.start()
    assert asked.take(FRAME) is None
    waiting.join()
    talk.server.sendall(HEAD[50:] + BODY)
    response = asked.resume()
    assert response is not None and response.read() == BODY
    response.close()


def test_tls_is_left_to_python() -> None:
    assert not RangePool(Origin("localhost", 1, ssl.create_default_context(), None, None)).plain


def test_words_that_ask_for_no_range() -> None:
    left, right = socket.socketpair()
    with left, right:
        response = RangePool(Origin("h", 1, None, None, 5.0)).resume(
            left, b"HTTP/1.1 206 x\r\nContent-Length: 0\r\n\r\n", "shown", b"GET / HTTP/1.1\r\n\r\n", 0
        )
        assert response is not None
        with pytest.raises(ValueError, match="no request for a range"):
            Again(response, "shown", None)
