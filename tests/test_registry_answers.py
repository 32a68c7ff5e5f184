"""What the client makes of answers, well-formed and not: table-driven through the HTTP seam."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, IntegrityError
from loader.errors import NotFoundError, RegistryError, TransientRegistryError, UnreachableError
from loader.registry.auth import parse_challenges
from loader.registry.base import Descriptor
from loader.registry.client import Registry
from loader.registry.config import HostConfig, RegistryConfig
from loader.registry.credentials import Credentials, Keychain
from loader.registry.known import KnownHosts
from loader.registry.transport import HttpRequest, PlainHttpError
from loader.worker.sources import Sources
from tests.support.http import FakeResponse, FakeTransport

BLOB = bytes(range(256)) * 64
DIGEST = Digest.of(BLOB)
DESCRIPTOR = Descriptor("application/octet-stream", DIGEST, len(BLOB))
MANIFEST = json.dumps({"schemaVersion": 2, "config": {}, "layers": []}).encode()
HOST = "registry.example"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.registry.patience.FIRST_PAUSE", 0.0)


BLOB_URL = f"https://{HOST}/v2/a/b/blobs/{DIGEST}"
Handler = Callable[[HttpRequest], FakeResponse]


def client(handler: Handler, config: RegistryConfig | None = None) -> tuple[Registry, FakeTransport]:
    transport = FakeTransport(handler)
    return Registry(HOST, "a/b", config or RegistryConfig(), transport, Keychain([])), transport


def ranged(request: HttpRequest) -> FakeResponse:
    """A well-behaved blob server."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not match:
        return FakeResponse(200, BLOB)
    first, last = int(match[1]), min(int(match[2] or len(BLOB) - 1), len(BLOB) - 1)
    return FakeResponse(206, BLOB[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(BLOB)}"})


def test_range() -> None:
    registry, transport = client(ranged)
    assert registry.read_range(DIGEST, 100, 50) == BLOB[100:150]
    assert transport.lines == [f"GET {BLOB_URL}"]
    assert transport.requests[0].headers["Range"] == "bytes=100-149"
    assert transport.responses[0].closed


def test_a_blob_that_its_descriptor_brings_along_is_not_asked_for() -> None:
    registry, transport = client(ranged)
    assert registry.blob(replace(DESCRIPTOR, data=BLOB)) == BLOB
    assert transport.lines == []


def test_range_ignored() -> None:
    registry, _ = client(lambda request: FakeResponse(200, BLOB))
    assert registry.read_range(DIGEST, 100, 50) == BLOB[100:150]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (FakeResponse(206, BLOB[:50]), RegistryError),
        (FakeResponse(206, BLOB[:50], {"Content-Range": "bytes 0-49/100"}), RegistryError),
        (FakeResponse(206, BLOB[:50], {"Content-Range": "bytes 100-200/16384"}), RegistryError),
        (FakeResponse(206, BLOB[:50], {"Content-Range": "bytes garbage"}), RegistryError),
        (FakeResponse(206, BLOB[:40], {"Content-Range": "bytes 100-139/140"}), IntegrityError),
        (FakeResponse(206, BLOB[:40], {"Content-Range": "bytes 100-149/16384"}), TransientRegistryError),
        (FakeResponse(206, BLOB, {"Content-Range": "bytes 100-149/16384"}, cut=10), TransientRegistryError),
        (FakeResponse(200, BLOB[:120]), TransientRegistryError),
        (FakeResponse(200, BLOB[:20]), TransientRegistryError),
        (FakeResponse(204), RegistryError),
        (FakeResponse(302), RegistryError),
        (FakeResponse(400), RegistryError),
        (FakeResponse(403), RegistryError),
        (FakeResponse(404), NotFoundError),
        (FakeResponse(408), TransientRegistryError),
        (FakeResponse(416), RegistryError),
        (FakeResponse(429), TransientRegistryError),
        (FakeResponse(500), TransientRegistryError),
        (FakeResponse(501), RegistryError),
        (FakeResponse(503), TransientRegistryError),
    ],
)
def test_bad_range_answers(answer: FakeResponse, error: type[Exception]) -> None:
    registry, transport = client(lambda request: answer)
    with pytest.raises(error) as caught:
        registry.read_range(DIGEST, 100, 50)
    assert type(caught.value) is error
    assert all(response.closed for response in transport.responses)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("99999999", 3600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", None), ("", None)],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    registry, _ = client(lambda request: FakeResponse(429, headers={"Retry-After": value}))
    with pytest.raises(TransientRegistryError) as caught:
        registry.read_range(DIGEST, 0, 1)
    assert caught.value.retry_after == seconds


def test_the_registrys_words_are_shown_printable_and_short() -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "no\x1b[31m" + "x" * 999}]}).encode()
    registry, _ = client(lambda request: FakeResponse(403, body))
    with pytest.raises(RegistryError, match="DENIED no") as caught:
        registry.read_range(DIGEST, 0, 1)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


def test_redirect_leaves_the_login_behind_and_is_remembered() -> None:
    signed = "https://storage.example/blob?signature=hush"

    def handler(request: HttpRequest) -> FakeResponse:
        if request.url.startswith("https://storage.example"):
            return ranged(request)
        if "Authorization" not in request.headers:
            return FakeResponse(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return FakeResponse(307, headers={"Location": signed})

    transport = FakeTransport(handler)
    keychain = Keychain([])
    keychain.get = lambda host, repository="": Credentials("me", "pw")  # type: ignore[method-assign]
    registry = Registry(HOST, "a/b", RegistryConfig(), transport, keychain)
    assert registry.read_range(DIGEST, 0, 10) == BLOB[:10]
    assert registry.read_range(DIGEST, 10, 10) == BLOB[10:20]
    assert transport.lines == [f"GET {BLOB_URL}", f"GET {BLOB_URL}", f"GET {signed}", f"GET {signed}"]
    assert [("Authorization" in request.headers) for request in transport.requests] == [False, True, False, False]


def test_a_signed_url_that_ran_out_is_asked_for_again() -> None:
    issued = 0

    def handler(request: HttpRequest) -> FakeResponse:
        nonlocal issued
        if "storage.example" in request.url:
            return ranged(request) if request.url.endswith(f"/{valid}") else FakeResponse(403)
        issued += 1
        return FakeResponse(302, headers={"Location": f"https://storage.example/{issued}"})

    valid = 1
    registry, transport = client(handler)
    registry.read_range(DIGEST, 0, 10)
    valid = 2
    assert registry.read_range(DIGEST, 10, 10) == BLOB[10:20]
    hosts = [line.split("/")[2] for line in transport.lines]
    assert hosts == [HOST, "storage.example", "storage.example", HOST, "storage.example"]


@pytest.mark.parametrize("location", ["", "file:///etc/passwd", "http://registry.example/x", "ftp://h/x"])
def test_bad_redirects(location: str) -> None:
    registry, _ = client(lambda request: FakeResponse(302, headers={"Location": location}))
    with pytest.raises(RegistryError):
        registry.read_range(DIGEST, 0, 1)


def test_errors_do_not_quote_signed_urls() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        if "storage" in request.url:
            return FakeResponse(500)
        return FakeResponse(302, headers={"Location": "https://storage.example/x?sig=hush"})

    registry, _ = client(handler)
    with pytest.raises(TransientRegistryError) as caught:
        registry.read_range(DIGEST, 0, 1)
    assert "hush" not in str(caught.value)


def test_stream_goes_on_where_it_broke() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        return ranged(request) if "Range" in request.headers else FakeResponse(200, BLOB, cut=1000)

    registry, transport = client(handler)
    with registry.open_blob(DESCRIPTOR) as stream:
        assert stream.read() == BLOB
    assert [request.headers.get("Range") for request in transport.requests] == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("body", "error"),
    [(BLOB[:-1] + b"x", IntegrityError), (BLOB + b"x", IntegrityError), (BLOB[:-1], TransientRegistryError)],
)
def test_wrong_blob(body: bytes, error: type[Exception]) -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        return FakeResponse(503) if "Range" in request.headers else FakeResponse(200, body)

    registry, _ = client(handler)
    with pytest.raises(error), registry.open_blob(DESCRIPTOR) as stream:
        stream.read()
    with pytest.raises(error):
        registry.blob(DESCRIPTOR)


def test_a_busy_registry_is_asked_again() -> None:
    answers = iter([429, 503, 200])
    registry, transport = client(lambda request: FakeResponse(next(answers), MANIFEST))
    assert registry.resolve("tag").digest == Digest.of(MANIFEST)
    registry, transport = client(lambda request: FakeResponse(503))
    with pytest.raises(TransientRegistryError):
        registry.resolve("tag")
    assert len(transport.requests) == 5


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000])
def test_manifest_is_not_json(body: bytes) -> None:
    registry, _ = client(lambda request: FakeResponse(200, body))
    with pytest.raises(ArtifactError):
        registry.resolve("tag")


def test_manifest_too_large() -> None:
    registry, _ = client(lambda request: FakeResponse(200, b" " * (5 << 20)))
    with pytest.raises(RegistryError, match="larger"):
        registry.resolve("tag")


def test_manifest_of_another_digest() -> None:
    registry, _ = client(lambda request: FakeResponse(200, MANIFEST))
    with pytest.raises(IntegrityError):
        registry.resolve(str(DIGEST))
    assert registry.resolve("tag").digest == Digest.of(MANIFEST)


def test_a_manifest_is_fetched_once() -> None:
    registry, transport = client(lambda request: FakeResponse(200, MANIFEST))
    descriptor = registry.resolve("tag")
    assert registry.manifest(descriptor) == MANIFEST
    assert registry.resolve(str(descriptor.digest)) == descriptor
    assert len(transport.requests) == 1


def test_insecure_hosts_are_tried_with_tls_first() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        if request.url.startswith("https:"):
            raise PlainHttpError("no TLS")
        return ranged(request)

    registry, transport = client(handler, RegistryConfig(insecure=True))
    registry.read_range(DIGEST, 0, 1)
    registry.read_range(DIGEST, 0, 1)
    assert [line.split(":")[0] for line in transport.lines] == ["GET https", "GET http", "GET http"]
    registry, transport = client(handler)
    with pytest.raises(PlainHttpError):
        registry.read_range(DIGEST, 0, 1)
    assert not any("http://" in line for line in transport.lines)


def test_mirrors_first_and_the_failed_one_last() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(mirrors=("https://one.example", "https://two.example/prefix/"))})
    down = True

    def handler(request: HttpRequest) -> FakeResponse:
        if request.url.startswith("https://one.example"):
            if down:
                raise UnreachableError("down")
            return ranged(request)
        if request.url.startswith("https://two.example/prefix/v2/a/b/"):
            return FakeResponse(404)
        return ranged(request)

    registry, transport = client(handler, config)
    assert registry.read_range(DIGEST, 0, 4) == BLOB[:4]
    assert registry.read_range(DIGEST, 0, 4) == BLOB[:4]
    hosts = [line.split("/")[2] for line in transport.lines]
    assert hosts == ["one.example", "two.example", HOST, HOST]


def test_distrust_asks_the_next_endpoint() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(mirrors=("https://one.example",))})
    registry, transport = client(ranged, config)
    registry.read_range(DIGEST, 0, 4)
    registry.distrust(DIGEST)
    registry.read_range(DIGEST, 0, 4)
    assert [line.split("/")[2] for line in transport.lines] == ["one.example", HOST]


def test_many_threads_distrust_one_mirror_only() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(mirrors=("https://one.example",))})
    registry, transport = client(ranged, config)
    together = threading.Barrier(4)

    def read_then_distrust(_: int) -> None:
        registry.read_range(DIGEST, 0, 4)
        together.wait(10)
        registry.distrust(DIGEST)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_then_distrust, range(4)))
    registry.read_range(DIGEST, 0, 4)
    assert transport.lines[-1].split("/")[2] == HOST


def test_what_a_host_is_like_is_asked_once_for_all_repositories() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        if request.url.startswith("https://"):
            raise PlainHttpError("no TLS")
        return FakeResponse(404) if "/referrers/" in request.url else ranged(request)

    transport, known = FakeTransport(handler), KnownHosts()
    for name in ("a/b", "c/d"):
        config = RegistryConfig(insecure=True)
        registry = Registry(HOST, name, config, transport, Keychain([]), known)
        registry.read_range(DIGEST, 0, 4)
        with pytest.raises(ArtifactError):  # the fallback tag is there, and no index
            registry.referrers(DIGEST, "mine")
    assert sum(line.startswith("GET https:") for line in transport.lines) == 1
    assert sum("/referrers/" in line for line in transport.lines) == 1


def test_sources_pass_distrust_on() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(mirrors=("https://one.example",))})
    registry, transport = client(ranged, config)
    sources = Sources(lambda source: registry)
    for _ in range(2):
        with sources.open_range("repository", DIGEST, 0, 4) as stream:
            assert stream.read(3) + stream.read(1) == BLOB[:4]
        sources.distrust("repository", DIGEST)
    assert [line.split("/")[2] for line in transport.lines] == ["one.example", HOST]


def test_a_stream_that_breaks_off_is_read_from_the_next_endpoint() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(mirrors=("https://one.example",))})

    def handler(request: HttpRequest) -> FakeResponse:
        answer = ranged(request)
        return FakeResponse(206, answer.read(), answer.headers, cut=6) if "one.example" in request.url else answer

    registry, transport = client(handler, config)
    sources = Sources(lambda source: registry)
    with sources.open_range("repository", DIGEST, 0, 8) as stream:
        assert stream.read(4) == BLOB[:4]
        with pytest.raises(TransientRegistryError):
            stream.read(4)
    with sources.open_range("repository", DIGEST, 4, 4) as stream:
        assert stream.read(4) == BLOB[4:8]
    assert [line.split("/")[2] for line in transport.lines] == ["one.example", HOST]
    assert all(response.closed for response in transport.responses)


def test_referrers_follow_pages_and_match_the_type_exactly() -> None:
    def entry(number: int, artifact_type: str) -> dict[str, object]:
        digest = str(Digest.of(bytes([number])))
        return {"mediaType": "m", "digest": digest, "size": 1, "artifactType": artifact_type}

    def handler(request: HttpRequest) -> FakeResponse:
        first = "last=" not in request.url
        entries = [entry(1, "mine"), entry(2, "mine.not")] if first else [entry(3, "mine")]
        headers = {"Link": f'</v2/a/b/referrers/{DIGEST}?last=2>; rel="next"'} if first else {}
        return FakeResponse(200, json.dumps({"manifests": entries}).encode(), headers)

    registry, transport = client(handler)
    found = registry.referrers(DIGEST, "mine")
    assert [item.digest for item in found] == [Digest.of(b"\1"), Digest.of(b"\3")]
    assert transport.lines[1] == f"GET https://{HOST}/v2/a/b/referrers/{DIGEST}?last=2"


def test_endless_pages_end() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        return FakeResponse(200, b'{"manifests": []}', {"Link": f'<{request.url}>; rel="next"'})

    registry, _ = client(handler)
    with pytest.raises(RegistryError, match="does not end"):
        registry.referrers(DIGEST, "mine")


def test_an_upload_elsewhere_gets_no_login() -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        if request.method == "PUT":
            return FakeResponse(201)
        if "Authorization" not in request.headers:
            return FakeResponse(401, headers={"WWW-Authenticate": "Basic realm=x"})
        return FakeResponse(202, headers={"Location": "https://upload.example/1?state=x"})

    transport = FakeTransport(handler)
    keychain = Keychain([])
    keychain.get = lambda host, repository="": Credentials("me", "pw")  # type: ignore[method-assign]
    registry = Registry(HOST, "a/b", RegistryConfig(), transport, keychain)
    registry.put_blob(DESCRIPTOR, iter([BLOB[:5], BLOB[5:]]))
    put = transport.requests[-1]
    assert put.url == f"https://upload.example/1?state=x&digest=sha256%3A{DIGEST.hex}"
    assert "Authorization" not in put.headers and put.body == BLOB


def test_upload_in_chunks() -> None:
    config = RegistryConfig(hosts={HOST: HostConfig(upload_chunk=10_000)})

    def handler(request: HttpRequest) -> FakeResponse:
        return FakeResponse(201 if request.method == "PUT" else 202, headers={"Location": "/v2/a/b/blobs/uploads/1"})

    registry, transport = client(handler, config)
    registry.put_blob(DESCRIPTOR, iter([BLOB[:3], BLOB[3:]]))
    patches = [request for request in transport.requests if request.method == "PATCH"]
    assert [request.headers["Content-Range"] for request in patches] == ["0-9999", "10000-16383"]
    assert b"".join(body for request in patches if isinstance(body := request.body, bytes)) == BLOB


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"',
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a:pull,push"})],
        ),
        ("Basic realm=x", [("basic", {"realm": "x"})]),
        (
            'Negotiate, Basic realm="x, y", Bearer realm="z\\"w"',
            [("basic", {"realm": "x, y"}), ("bearer", {"realm": 'z"w'})],
        ),
        ("Basic", [("basic", {})]),
        ("", []),
        ("Digest nonce=1", []),
    ],
)
def test_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert [tuple(challenge) for challenge in parse_challenges(header)] == expected


@pytest.mark.parametrize(
    ("challenge", "token", "error"),
    [
        ("", FakeResponse(200), RegistryError),
        ("Digest nonce=1", FakeResponse(200), RegistryError),
        ("Basic realm=x", FakeResponse(200), RegistryError),
        ("Bearer service=x", FakeResponse(200), RegistryError),
        ('Bearer realm="file:///etc/shadow"', FakeResponse(200), RegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(200, b"{}"), TransientRegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(200, b"["), TransientRegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(200, b'{"token": 5}'), TransientRegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(200, b'{"token": "a\\nb"}'), TransientRegistryError),
        (
            'Bearer realm="https://t.example/"',
            FakeResponse(200, b'{"token": "t", "expires_in": "x"}'),
            TransientRegistryError,
        ),
        ('Bearer realm="https://t.example/"', FakeResponse(503), TransientRegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(401), RegistryError),
        ('Bearer realm="https://t.example/"', FakeResponse(200, b'{"token": "t"}'), RegistryError),
    ],
)
def test_logins_that_do_not_go(challenge: str, token: FakeResponse, error: type[Exception]) -> None:
    def handler(request: HttpRequest) -> FakeResponse:
        if "t.example" in request.url:
            return token
        return FakeResponse(401, headers={"WWW-Authenticate": challenge})

    registry, transport = client(handler)
    with pytest.raises(error) as caught:
        registry.read_range(DIGEST, 0, 1)
    assert type(caught.value) is error
    assert len(transport.requests) <= 3


def test_an_expired_token_is_replaced_once() -> None:
    tokens = iter(["one", "two"])

    def handler(request: HttpRequest) -> FakeResponse:
        if "t.example" in request.url:
            return FakeResponse(200, json.dumps({"token": next(tokens)}).encode())
        if request.headers.get("Authorization") == valid:
            return ranged(request)
        return FakeResponse(401, headers={"WWW-Authenticate": 'Bearer realm="https://t.example/"'})

    valid = "Bearer one"
    registry, transport = client(handler)
    registry.read_range(DIGEST, 0, 1)
    valid = "Bearer two"
    registry.read_range(DIGEST, 0, 1)
    assert len([line for line in transport.lines if "t.example" in line]) == 2
