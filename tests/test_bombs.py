"""What little input may not cost much: decompression bombs, endless archives, sizes that nobody has memory for."""

from __future__ import annotations

import gc
import gzip
import io
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import zstandard

from erofs_builder import layer
from erofs_builder.contents import Contents, encode_contents
from erofs_builder.decompress import CHUNK, plain_chunks
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, TarError, UnsupportedError
from fuzz.seeds import FINDS
from loader.artifact import CONTENTS_TYPE, PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.convert.load import decompress, load_contents
from loader.errors import LoaderError, RegistryError
from loader.registry.auth import parse_challenges
from loader.registry.base import SMALL_BLOB_LIMIT, Descriptor
from loader.registry.client import Registry
from loader.registry.config import RegistryConfig
from loader.registry.credentials import Keychain
from loader.registry.status import retry_after
from loader.registry.transport import HttpRequest, PooledTransport
from tests.support.http import FakeResponse, FakeTransport
from tests.support.tars import Tar, pax_header


@pytest.fixture
def peak() -> Iterator[list[int]]:
    """Bytes that Python's own allocations reached; read it after the test's work with `measured`."""
    tracemalloc.start()
    yield []
    tracemalloc.stop()


def measured() -> int:
    return tracemalloc.get_traced_memory()[1]


def zstd(data: bytes) -> bytes:
    """`zstandard.compress`, whose result would keep memory for the worst case."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_layer_comes_in_bounded_pieces(compress: Callable[[bytes], bytes], peak: list[int]) -> None:
    bomb = compress(bytes(256 << 20))
    tracemalloc.reset_peak()
    sizes = [len(chunk) for chunk in plain_chunks(io.BytesIO(bomb))]
    assert sum(sizes) == 256 << 20 and max(sizes) <= CHUNK
    assert measured() < 16 << 20


def test_members_of_gzip_by_the_thousand() -> None:
    members = [b"", b"a", b"b" * 5000, bytes(3 << 20), b"", b"c"] * 5 + [b""] * 3000
    stream = b"".join(gzip.compress(member, mtime=0) for member in members) + bytes(1000)
    assert b"".join(plain_chunks(io.BytesIO(stream))) == b"".join(members)
    with pytest.raises(TarError, match="behind the last member"):
        list(plain_chunks(io.BytesIO(stream + b"x")))
    with pytest.raises(TarError, match="cut off"):
        list(plain_chunks(io.BytesIO(stream[:-1003])))


def test_a_zstd_window_of_gigabytes_is_refused() -> None:
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x01\x00\x00"  # window log 31
    with pytest.raises(TarError, match="zstd"):
        list(plain_chunks(io.BytesIO(frame)))


def test_a_layer_with_too_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "MAX_ENTRIES", 3)
    archive = Tar()
    for number in range(4):
        archive.add(f"f{number}")
    with pytest.raises(UnsupportedError, match="more than 3 entries"):
        layer.build_layer(io.BytesIO(bytes(archive)), io.BytesIO())


def test_global_records_are_few() -> None:
    records = pax_header({f"SCHILY.xattr.user.{number}": b"x" for number in range(300)}, b"g")
    with pytest.raises(TarError, match="300 global PAX records"):
        layer.build_layer(io.BytesIO(records), io.BytesIO())


class _Blobs:
    """Gives every blob the same bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def blob(self, descriptor: Descriptor) -> bytes:
        return self._data


def test_a_content_index_is_what_digests_allow(peak: list[int]) -> None:
    descriptor = Descriptor(CONTENTS_TYPE, Digest(bytes(32)), 1)
    sound = zstd(encode_contents([(Digest(bytes(32)), Contents())]))
    artifact = Artifact([], {}, descriptor)
    assert [digest for digest, _ in load_contents(_Blobs(sound), artifact)] == [Digest(bytes(32))]  # type: ignore[arg-type]
    bomb = zstd(bytes(512 << 20))
    tracemalloc.reset_peak()
    with pytest.raises(ArtifactError, match="should decompress to"):
        load_contents(_Blobs(bomb), artifact)  # type: ignore[arg-type]
    assert measured() < 32 << 20


def test_a_promise_of_gigabytes_costs_nothing(peak: list[int]) -> None:
    small = zstd(b"small")
    tracemalloc.reset_peak()
    with pytest.raises(ArtifactError):
        decompress(small, 1 << 32, "payload")
    assert measured() < 16 << 20


def test_a_blob_of_exabytes_is_not_asked_for() -> None:
    transport = FakeTransport(lambda request: FakeResponse(200, b""))
    registry = Registry("registry.example", "a/b", RegistryConfig(), transport, Keychain([]))
    annotations = {PAYLOAD_SIZE_ANNOTATION: "65536"}
    with pytest.raises(RegistryError, match="too many"):
        registry.blob(Descriptor("", Digest(bytes(32)), SMALL_BLOB_LIMIT + 1, annotations))
    assert not transport.requests


def test_a_challenge_of_one_long_word() -> None:
    header = (FINDS / "headers/challenge-of-one-long-word").read_bytes().decode("latin-1")
    assert [challenge.scheme for challenge in parse_challenges(header * 100)] == ["bearer"]
    assert retry_after({"Retry-After": "\xb2"}) is None


ANSWERS = [
    b"",
    b"no HTTP",
    b"HTTP/1.1 99999 x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000,
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"A" * 100_000,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
]


# The HTTP library leaves the socket of some of them to the collector: that is called here, not in another test.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_that_are_hardly_http(answer: bytes) -> None:
    """Over a real connection: whatever the HTTP library makes of it becomes an error of ours."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):  # a connection that breaks is tried once more
                with suppress(OSError):  # the test is over, or the client has hung up
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        transport = PooledTransport(RegistryConfig(connect_timeout=5, timeout=5))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/a/b/blobs/x"
        with pytest.raises(LoaderError):
            response = transport.send(HttpRequest("GET", url))
            try:
                while response.read(1 << 16):
                    pass
            finally:
                response.close()
        transport.close()
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread before the descriptor's number is another's
        server.join()
        gc.collect()


@pytest.mark.parametrize(
    "url", ["http://[", "http://x:99999999/", "http://a..b/", "http://\xb2/", "http:///x", "ftp://x/"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(RegistryError):
        PooledTransport(RegistryConfig()).send(HttpRequest("GET", url))
