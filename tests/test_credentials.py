"""Logins: docker's and podman's files, and credential helper programs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from loader.errors import LoaderError, RegistryError, UsageError
from loader.registry.credentials import Credentials, Keychain


def auth(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def keychain(tmp_path: Path, document: Any) -> Keychain:
    file = tmp_path / "config.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return Keychain([file])


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    program = tmp_path / "bin" / f"docker-credential-{name}"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\nread server\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("host.example:5000", "host.example:5000"),
        ("https://host.example/v2/", "host.example"),
        ("http://host.example", "host.example"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("host.example/team", "host.example"),
    ],
)
def test_auths(tmp_path: Path, key: str, host: str) -> None:
    found = keychain(tmp_path, {"auths": {key: auth("me", "p:w")}}).get(host, "team/app")
    assert found == Credentials("me", "p:w")


def test_the_longest_repository_prefix_wins(tmp_path: Path) -> None:
    chain = keychain(tmp_path, {"auths": {"h.example": auth("a", "1"), "h.example/team": auth("b", "2")}})
    assert chain.get("h.example", "team/app") == Credentials("b", "2")
    assert chain.get("h.example", "other") == Credentials("a", "1")
    assert chain.get("g.example", "team/app") is None


def test_identity_token_and_plain_fields(tmp_path: Path) -> None:
    auths = {"a.example": {**auth("me", ""), "identitytoken": "tok"}, "b.example": {"username": "u", "password": "p"}}
    chain = keychain(tmp_path, {"auths": auths})
    assert chain.get("a.example") == Credentials("me", "", "tok")
    assert chain.get("b.example") == Credentials("u", "p")


def test_helper_before_store_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '{"ServerURL":"%s","Username":"%s","Secret":"%s"}'
    helper(tmp_path, monkeypatch, "one", f'printf \'{answer}\' "$server" one "$server"')
    helper(tmp_path, monkeypatch, "store", "echo 'credentials not found in native keychain'; exit 1")
    document = {
        "credHelpers": {"a.example": "one"},
        "credsStore": "store",
        "auths": {"a.example": auth("file", "x"), "b.example": auth("file", "x")},
    }
    chain = keychain(tmp_path, document)
    assert chain.get("a.example") == Credentials("one", "a.example")
    assert chain.get("b.example") == Credentials("file", "x")


def test_store_is_asked_for_the_hub_by_its_old_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, "s", 'printf \'{"Username":"<token>","Secret":"%s"}\' "$server"')
    assert keychain(tmp_path, {"credsStore": "s"}).get("docker.io") == Credentials(
        "", "", "https://index.docker.io/v1/"
    )


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("not json", UsageError),
        ("[]", UsageError),
        ({"auths": []}, UsageError),
        ({"auths": {"h": "x"}}, UsageError),
        ({"auths": {"h": {"auth": "!!!"}}}, UsageError),
        ({"auths": {"h": {"auth": "bm9jb2xvbg=="}}}, UsageError),
        ({"credHelpers": {"h": "../evil"}}, UsageError),
        ({"credHelpers": {"h": "not-installed"}}, RegistryError),
    ],
)
def test_malformed_files(tmp_path: Path, document: Any, error: type[LoaderError]) -> None:
    with pytest.raises(error):
        keychain(tmp_path, document).get("h")


@pytest.mark.parametrize("script", ["echo oops; exit 1", "echo '{'", "echo '{}'", "echo '[]'"])
def test_helper_failures_do_not_quote_the_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    helper(tmp_path, monkeypatch, "bad", script)
    with pytest.raises(RegistryError, match="docker-credential-bad") as caught:
        keychain(tmp_path, {"credHelpers": {"h": "bad"}}).get("h")
    assert "oops" not in str(caught.value)


def test_places(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"a": auth("docker", "1")}}))
    podman = tmp_path / "auth.json"
    podman.write_text(json.dumps({"auths": {"a": auth("podman", "2"), "b": auth("podman", "2")}}))
    chain = Keychain.default(None, {"DOCKER_CONFIG": str(tmp_path), "REGISTRY_AUTH_FILE": str(podman)})
    assert chain.get("a") == Credentials("docker", "1")
    assert chain.get("b") == Credentials("podman", "2")
    assert Keychain.default(str(podman), {}).get("a") == Credentials("podman", "2")
    assert Keychain.default(None, {"HOME": str(tmp_path / "nothing")}).get("a") is None


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(Credentials("me", "hush", "hush2"))
