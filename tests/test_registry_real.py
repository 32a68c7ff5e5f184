"""The client against a real docker-registry: with and without logins, TLS, redirects through nginx."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from loader.artifact import ARTIFACT_TYPE, MANIFEST_TYPE, Artifact
from loader.errors import NotFoundError, RegistryError, UsageError
from loader.registry.base import Descriptor
from loader.registry.client import Registry
from loader.registry.config import HostConfig, RegistryConfig
from loader.registry.credentials import Keychain
from loader.registry.documents import fallback_tag
from loader.registry.patience import patiently
from tests.support.registry import docker_registry, free_port, get_json, htpasswd_auth, self_signed, wait_for_port
from tests.support.token_server import token_server

BLOB = bytes(range(256)) * 4096
DESCRIPTOR = Descriptor("application/octet-stream", Digest.of(BLOB), len(BLOB))
EMPTY = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


def login_file(tmp_path: Path, host: str, username: str, password: str, identity: str = "") -> str:
    file = tmp_path / "login.json"
    entry = {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}
    file.write_text(json.dumps({"auths": {host: {**entry, "identitytoken": identity} if identity else entry}}))
    return str(file)


def round_trip(registry: Registry) -> None:
    """Upload a blob and an artifact, read everything back."""
    for descriptor, data in ((DESCRIPTOR, BLOB), (EMPTY, b"{}")):
        if not registry.has_blob(descriptor.digest):
            registry.put_blob(descriptor, iter((data[:100], data[100:])))
        assert registry.has_blob(descriptor.digest)
    stored = registry.put_manifest(MANIFEST_TYPE, Artifact([DESCRIPTOR], {}).encode(), "tag")
    assert registry.resolve("tag").digest == stored.digest
    assert registry.blob(DESCRIPTOR) == BLOB
    with registry.open_blob(DESCRIPTOR) as stream:
        assert stream.read() == BLOB
    assert registry.read_range(DESCRIPTOR.digest, 12345, 6789) == BLOB[12345 : 12345 + 6789]


def test_round_trip(host: str) -> None:
    registry = Registry(host, "plain/repo", RegistryConfig(), keychain=Keychain([]))
    round_trip(registry)
    with pytest.raises(NotFoundError):
        registry.resolve("no-such-tag")
    with pytest.raises(NotFoundError):
        registry.read_range(Digest.of(b"not there"), 0, 1)
    registry.close()


def test_upload_in_chunks(host: str) -> None:
    config = RegistryConfig(hosts={host: HostConfig(upload_chunk=300_000)})
    registry = Registry(host, "chunked/repo", config, keychain=Keychain([]))
    registry.put_blob(DESCRIPTOR, iter((BLOB,)))
    assert registry.blob(DESCRIPTOR) == BLOB
    registry.close()


def test_the_registry_refuses_a_blob_of_another_digest(host: str) -> None:
    registry = Registry(host, "wrong/repo", RegistryConfig(), keychain=Keychain([]))
    with pytest.raises(RegistryError, match="DIGEST_INVALID"):
        registry.put_blob(DESCRIPTOR, iter((BLOB[:-1] + b"x",)))
    registry.close()


def test_mount_from_another_repository(host: str) -> None:
    origin = Registry(host, "origin/repo", RegistryConfig(), keychain=Keychain([]))
    origin.put_blob(DESCRIPTOR, iter((BLOB,)))
    target = Registry(host, "mounted/repo", RegistryConfig(), keychain=Keychain([]))
    assert not target.has_blob(DESCRIPTOR.digest)
    assert target.mount_blob(DESCRIPTOR.digest, "origin/repo")
    assert target.has_blob(DESCRIPTOR.digest)
    assert not target.mount_blob(Digest.of(b"not there"), "origin/repo")
    origin.close()
    target.close()


def test_referrers_by_fallback_tag(host: str) -> None:
    registry = Registry(host, "referred/repo", RegistryConfig(), keychain=Keychain([]))
    registry.put_blob(EMPTY, iter((b"{}",)))
    subject = registry.put_manifest(
        MANIFEST_TYPE,
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": {"mediaType": EMPTY.media_type, "digest": str(EMPTY.digest), "size": 2},
                "layers": [],
            }
        ).encode(),
        "image",
    )
    assert registry.referrers(subject.digest, ARTIFACT_TYPE) == []
    artifacts = [Artifact([], {}, subject=subject, annotations={"n": str(number)}).encode() for number in range(6)]
    with ThreadPoolExecutor(3) as pool:
        # This registry answers 500 to who reads a tag while another writes it.
        stored = list(
            pool.map(lambda data: patiently(lambda: registry.put_manifest(MANIFEST_TYPE, data, None)), artifacts)
        )
    registry.put_manifest(MANIFEST_TYPE, artifacts[0], None)  # again: stays one entry
    found = registry.referrers(subject.digest, ARTIFACT_TYPE)
    assert {entry.digest for entry in found} <= {entry.digest for entry in stored} and found
    assert registry.referrers(subject.digest, "another/type") == []
    index = get_json(f"http://{host}/v2/referred/repo/tags/list")
    assert set(index["tags"]) == {"image", fallback_tag(subject.digest)}
    registry.close()


def test_many_threads_read_over_kept_connections(host: str) -> None:
    registry = Registry(host, "threads/repo", RegistryConfig(), keychain=Keychain([]))
    registry.put_blob(DESCRIPTOR, iter((BLOB,)))
    threads: set[int] = set()

    def read(number: int) -> bool:
        threads.add(threading.get_ident())
        return registry.read_range(DESCRIPTOR.digest, number * 4096, 4096) == BLOB[number * 4096 :][:4096]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, list(range(256)) * 2))
    registry.close()


def test_basic_login(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "r", htpasswd_auth(tmp_path, "me", "hush")) as host:
        anonymous = Registry(host, "a/b", RegistryConfig(), keychain=Keychain([]))
        with pytest.raises(RegistryError, match="needs a login") as caught:
            anonymous.resolve("tag")
        assert "docker login" in str(caught.value.hint)
        wrong = Registry(host, "a/b", RegistryConfig(auth_file=login_file(tmp_path, host, "me", "wrong")))
        with pytest.raises(RegistryError, match="refused") as caught:
            wrong.resolve("tag")
        assert "wrong" not in str(caught.value)
        known = Registry(host, "a/b", RegistryConfig(auth_file=login_file(tmp_path, host, "me", "hush")))
        round_trip(known)
        for registry in (anonymous, wrong, known):
            registry.close()


@pytest.mark.parametrize("identity", ["", "identity-token"])
def test_token_login(tmp_path: Path, identity: str) -> None:
    with token_server(tmp_path / "t", identity_token=identity) as server:
        with docker_registry(tmp_path / "r", server.auth) as host:
            password = "" if identity else "secret"
            known = Registry(
                host, "a/b", RegistryConfig(auth_file=login_file(tmp_path, host, "user", password, identity))
            )
            round_trip(known)
            granted = list(server.requests)
            assert set(granted) == {"POST user" if identity else "GET user"}
            assert len(granted) <= 3  # one for each scope, not one for each request
            anonymous = Registry(host, "a/b", RegistryConfig(), keychain=Keychain([]))
            assert anonymous.blob(DESCRIPTOR) == BLOB
            with pytest.raises(RegistryError):
                anonymous.put_manifest(MANIFEST_TYPE, Artifact([], {}).encode(), "mine")
            other = Registry(
                host, "c/d", RegistryConfig(auth_file=login_file(tmp_path, host, "user", password, identity))
            )
            assert other.mount_blob(DESCRIPTOR.digest, "a/b")
            for registry in (known, anonymous, other):
                registry.close()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS")
def test_private_ca(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with docker_registry(tmp_path / "r", tls=(certificate, key)) as host:
        good = RegistryConfig(hosts={host: HostConfig(ca_file=str(certificate))})
        registry = Registry(host, "a/b", good, keychain=Keychain([]))
        round_trip(registry)
        registry.close()
        other, _ = self_signed(tmp_path / "other")
        bad = RegistryConfig(hosts={host: HostConfig(ca_file=str(other))})
        registry = Registry(host, "a/b", bad, keychain=Keychain([]))
        with pytest.raises(RegistryError, match="not trusted") as caught:
            registry.resolve("tag")
        assert "ca_file" in str(caught.value.hint)
        registry.close()
        registry = Registry(host, "a/b", RegistryConfig(), keychain=Keychain([]))  # loopback: unchecked
        assert registry.blob(DESCRIPTOR) == BLOB
        registry.close()


@pytest.fixture
def nginx_redirect(tmp_path: Path, host: str) -> Iterator[tuple[str, Path]]:
    """nginx that redirects blobs to a second port, which refuses requests with an Authorization header."""
    front, storage = free_port(), free_port()
    log = tmp_path / "storage.log"
    config = tmp_path / "nginx.conf"
    config.write_text(f"""
        user root; daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;
        events {{}}
        http {{
          access_log off; client_max_body_size 0;
          client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;
          log_format header '$http_authorization $request_uri';
          server {{ listen 127.0.0.1:{front};
            location ~ ^/v2/.*/blobs/sha256: {{
              if ($request_method = GET) {{ return 307 http://127.0.0.1:{storage}$request_uri?sig=hush; }}
              proxy_pass http://{host}; }}
            location / {{ proxy_pass http://{host}; proxy_set_header Host $http_host; }} }}
          server {{ listen 127.0.0.1:{storage}; access_log {log} header;
            location / {{
              if ($http_authorization) {{ return 400; }}
              if ($arg_sig != hush) {{ return 403; }}
              proxy_pass http://{host}; }} }} }}""")
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        wait_for_port(front, process)
        yield f"127.0.0.1:{front}", log
    finally:
        process.terminate()
        process.wait(30)


def test_redirected_blobs(nginx_redirect: tuple[str, Path]) -> None:
    address, log = nginx_redirect
    registry = Registry(address, "redirected/repo", RegistryConfig(), keychain=Keychain([]))
    round_trip(registry)
    for number in range(10):
        assert registry.read_range(DESCRIPTOR.digest, number, 10) == BLOB[number : number + 10]
    registry.close()
    assert all(line.startswith("- ") for line in log.read_text().splitlines())


@pytest.fixture
def http_proxy(tmp_path: Path, host: str) -> Iterator[str]:
    """nginx as a proxy that sends whatever it is asked for to the registry; it knows no CONNECT."""
    port = free_port()
    config = tmp_path / "nginx.conf"
    config.write_text(f"""
        user root; daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;
        events {{}}
        http {{ access_log {tmp_path}/access.log; client_max_body_size 0;
          client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;
          server {{ listen 127.0.0.1:{port};
            location / {{ proxy_pass http://{host}; proxy_set_header Host $host; }} }} }}""")
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_proxy_of_the_environment(http_proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, http_proxy)
    registry = Registry("registry.invalid", "proxied/repo", RegistryConfig(insecure=True), keychain=Keychain([]))
    round_trip(registry)
    registry.close()
    assert "/v2/proxied/repo/" in (tmp_path / "access.log").read_text()
    monkeypatch.setenv("no_proxy", "registry.invalid")
    registry = Registry("registry.invalid", "proxied/repo", RegistryConfig(insecure=True), keychain=Keychain([]))
    with pytest.raises(RegistryError, match="cannot connect|resolve"):
        registry.resolve("tag")
    registry.close()


@pytest.mark.parametrize("proxy", ["http://user:secret@host:port", "socks5://host:1", "://"])
def test_a_proxy_that_is_none(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the proxy that is named, not the registry; and not its password."""
    monkeypatch.setenv("https_proxy", proxy)
    registry = Registry("registry.invalid", "a/b", RegistryConfig(), keychain=Keychain([]))
    with pytest.raises(UsageError, match="^HTTPS_PROXY names no proxy$"):
        registry.resolve("tag")
    registry.close()


def test_unreachable() -> None:
    registry = Registry(f"127.0.0.1:{free_port()}", "a/b", RegistryConfig(), keychain=Keychain([]))
    with pytest.raises(RegistryError, match="cannot connect"):
        registry.resolve("tag")
    registry.close()
