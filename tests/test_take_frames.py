"""Frames that C takes one after another, as they are and decoded, beside the Python that does the same."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from erofs_builder._hot import lib as hot
from erofs_builder.frames import Frame
from loader.errors import TransientRegistryError
from loader.registry.again import Asked, Taken
from tests.support.conversation import Conversation, plain_head
from tests.support.sample_blobs import encode_frame

OFFSET = 8192  # of the range in its blob
JUDGES = bool(hot.eod_sha256_lanes())  # else C leaves all of it to Python


class Sent(NamedTuple):
    """A frame as a server sends it, what its table says that it decodes to, and whether its digest is right."""

    encoded: bytes
    decoded_size: int
    genuine: bool = True


def _plain(size: int) -> bytes:
    return (hashlib.sha256(size.to_bytes(4)).digest() + bytes(96)) * (size // 128) + bytes(size % 128)


def _zstd(size: int, content_size: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=content_size)
    return compressor.compress(_plain(size))


def _skippable(size: int) -> bytes:
    return struct.pack("<II", 0x184D2A50, size) + bytes(size)


def _wide(size: int) -> bytes:
    """A frame that says that its decoder has to keep 128 MiB: that is for who decodes it bit by bit."""
    header = struct.pack("<IBBI", 0xFD2FB528, 0x80, (27 - 10) << 3, size)
    return header + (size << 3 | 1).to_bytes(3, "little") + _plain(size)


SIZES = st.sampled_from([1, 4096, 20000, 140000, 300000])
KINDS = st.one_of(
    SIZES.map(lambda size: Sent(encode_frame(_plain(size)), size)),
    SIZES.map(lambda size: Sent(encode_frame(_plain(size)), size, genuine=False)),
    SIZES.map(lambda size: Sent(encode_frame(_plain(size)), size + 1)),
    SIZES.map(lambda size: Sent(encode_frame(_plain(size)), max(1, size - 1))),
    SIZES.map(lambda size: Sent(_zstd(size)[:-1], size)),  # torn
    SIZES.map(lambda size: Sent(_zstd(size)[:-1] + b"\xff", size)),  # its own checksum is wrong
    SIZES.map(lambda size: Sent(_zstd(size, content_size=False), size)),
    st.sampled_from([1, 4096, 20000]).map(lambda size: Sent(_wide(size), size)),
    SIZES.map(lambda size: Sent(_zstd(size) + _zstd(size), size)),
    SIZES.map(lambda size: Sent(_zstd(size) + _zstd(size), 2 * size)),
    SIZES.map(lambda size: Sent(_zstd(size) + b"garbage", size)),
    SIZES.map(lambda size: Sent(_skippable(100) + _zstd(size), size)),
    SIZES.map(lambda size: Sent(b"\x27" + _zstd(size)[1:], size)),  # an old format's magic
    st.binary(min_size=1, max_size=100).map(lambda data: Sent(data, 4096)),
    st.binary(max_size=100).map(lambda data: Sent(b"\x28\xb5\x2f\xfd" + data, 4096)),
)
RANGES = st.lists(KINDS, min_size=1, max_size=6)


def _frames(sent: Sequence[Sent]) -> list[Frame]:
    frames, encoded, decoded = list[Frame](), OFFSET, 0
    for number, (data, size, genuine) in enumerate(sent):
        digest = hashlib.sha256(data if genuine else b"another").digest()
        frames.append(Frame(number, encoded, len(data), decoded, size, digest))
        encoded, decoded = encoded + len(data), decoded + size
    return frames


def _twin(frame: Frame, encoded: bytes, decode: bool) -> bytes | None:
    """What is to be written of a frame, as `Fetcher` has it in Python; None if nothing is."""
    if hashlib.sha256(encoded).digest() != frame.digest:
        return None
    if not decode:
        return encoded
    try:
        if zstandard.frame_content_size(encoded) != frame.decoded_size:
            return None
        return zstandard.ZstdDecompressor(max_window_size=1 << 23).decompress(encoded)
    except zstandard.ZstdError:
        return None


def _send(talk: Conversation, answer: bytes, cuts: Sequence[int], closes: bool) -> None:
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        talk.server.sendall(answer[start:end])
        time.sleep(0.0005 if cuts else 0)
    if closes:
        talk.server.shutdown(2)


def _is_as_the_twin_has_it(taken: Taken, frame: Frame, encoded: bytes, decode: bool, file: int) -> None:
    expected = _twin(frame, encoded, decode) if JUDGES else None
    assert taken.right == taken.written == (expected is not None)
    assert bytes(taken.data) == (encoded if expected is None else expected)
    if expected is not None:
        place = frame.decoded_offset if decode else frame.encoded_offset
        assert os.pread(file, len(expected), place) == expected


@settings(max_examples=150, deadline=None)
@given(RANGES, st.booleans(), st.lists(st.floats(0, 1), max_size=4), st.none() | st.floats(0, 1), st.booleans())
@example([Sent(encode_frame(_plain(300000)), 300000)] * 4, True, [0.2, 0.5], 0.6, False)
@example([Sent(encode_frame(_plain(4096)), 4096)] * 6, True, [0.1], None, True)
def test_each_frame_is_as_the_twin_has_it(
    sent: list[Sent], decode: bool, cuts: list[float], ends: float | None, hasty: bool
) -> None:
    """However the server cuts its answer, wherever it ends it, and whenever C gives it up for slow."""
    body = b"".join(frame.encoded for frame in sent)
    answer = plain_head(OFFSET, len(body)) + body
    answer = answer if ends is None else answer[: int(ends * len(answer))]
    with Conversation() as talk, tempfile.TemporaryFile() as file:
        talk.again.patience = 0 if hasty else talk.again.patience
        asked = talk.ask(OFFSET, len(body))
        places = sorted(int(cut * len(answer)) for cut in cuts)
        server = threading.Thread(target=_send, args=(talk, answer, places, ends is not None))
        server.start()
        left = _frames(sent)
        while left and (taken := asked.take(left[0], decode, file.fileno())):
            frame = left.pop(0)
            _is_as_the_twin_has_it(taken, frame, sent[frame.number].encoded, decode, file.fileno())
        if left:
            _goes_on(asked, left[0].encoded_offset - OFFSET, body, complete=ends is None)
        server.join()
        asked.close()


def _goes_on(asked: Asked, taken: int, body: bytes, complete: bool) -> None:
    """The answer that is resumed is what is left of the body, neither more nor less."""
    response = asked.resume()
    if response is None:
        assert not complete and not taken
        return
    try:
        assert response.read() == body[taken:]
    except TransientRegistryError:
        assert not complete
    response.close()


@pytest.mark.parametrize("decode", [False, True])
def test_a_connection_is_kept_behind_the_last_frame(decode: bool) -> None:
    sent = [Sent(encode_frame(_plain(20000)), 20000)] * 3
    body = b"".join(frame.encoded for frame in sent)
    with Conversation() as talk:
        for _ in range(3):
            asked = talk.ask(OFFSET, len(body), plain_head(OFFSET, len(body)), body)
            taken = [asked.take(frame, decode) for frame in _frames(sent)]
            assert [result and result.right for result in taken] == [JUDGES] * 3
            assert all(result and result.began <= result.came <= time.monotonic() for result in taken)
            asked.close()


def test_a_range_that_is_left_ends_its_connection() -> None:
    sent = [Sent(encode_frame(_plain(20000)), 20000)] * 3
    body = b"".join(frame.encoded for frame in sent)
    with Conversation() as talk:
        asked = talk.ask(OFFSET, len(body), plain_head(OFFSET, len(body)), body)
        assert asked.take(_frames(sent)[0])
        asked.close()
        assert talk.again.ask(OFFSET, len(body)) is None


@pytest.mark.parametrize("place", [10, 200, 12000, 18000])
def test_a_server_that_falls_silent(place: int) -> None:
    """A slice of the timeout is waited for in C: head, frame between frames, or the middle of one, Python waits on."""
    sent = [Sent(_plain(6000), 6000)] * 4
    body = b"".join(frame.encoded for frame in sent)
    answer = plain_head(OFFSET, len(body)) + body
    with Conversation(timeout=1.0) as talk:
        asked = talk.ask(OFFSET, len(body), answer[:place])
        left = _frames(sent)
        while left and asked.take(left[0]):
            left.pop(0)
        assert len(left) == 4 - max(0, place - len(plain_head(OFFSET, len(body)))) // 6000
        talk.server.sendall(answer[place:])
        _goes_on(asked, left[0].encoded_offset - OFFSET, body, complete=True)


def test_a_long_range_comes_through_the_memory_of_a_frame() -> None:
    sent = [Sent(os.urandom(1 << 20), 1 << 20) for _ in range(9)]
    body = b"".join(frame.encoded for frame in sent)
    with Conversation() as talk:
        asked = talk.ask(OFFSET, len(body))
        server = threading.Thread(target=_send, args=(talk, plain_head(OFFSET, len(body)) + body, [], False))
        server.start()
        for frame, (encoded, _, _) in zip(_frames(sent), sent, strict=True):
            taken = asked.take(frame)
            assert taken is not None and bytes(taken.data) == encoded
        server.join()
