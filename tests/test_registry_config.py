"""The `[registry]` table."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.errors import UsageError
from loader.registry.config import HostConfig, RegistryConfig, load_registry_config

TEXT = """
log_level = "info"
[registry]
timeout = 5
auth_file = "/a"
[registry.hosts."docker.io"]
mirrors = ["https://m.example", "n.example:5000"]
ca_file = "/ca.pem"
connect_timeout = 2.5
"""


def load(tmp_path: Path, text: str) -> RegistryConfig:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load_registry_config(file)


def test_reads(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    host = config.host("docker.io")
    assert host == HostConfig(("https://m.example", "n.example:5000"), False, "/ca.pem", 5, 2.5, 0)
    assert config.host("other.example").timeout == 5 and not config.host("other.example").insecure
    assert config.auth_file == "/a"


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3", "[::1]:5000", "[::1]"])
def test_loopback_is_insecure(host: str) -> None:
    assert RegistryConfig().host(host).insecure


@pytest.mark.parametrize("host", ["example.org", "localhost.example.org", "10.0.0.1:5000", "[::2]:5000"])
def test_others_are_not(host: str) -> None:
    assert not RegistryConfig().host(host).insecure
    assert RegistryConfig(insecure=True).host(host).insecure


def test_insecure_of_the_whole_daemon_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "insecure = true").insecure


@pytest.mark.parametrize(
    "text",
    [
        "registry = 1",
        "[registry]\nunknown = 1",
        "[registry]\ntimeout = '5'",
        "[registry]\ntimeout = true",
        "[registry]\ntimeout = 0",
        "[registry]\ntimeout = -1",
        "[registry]\ninsecure = 1",
        "[registry]\nhosts = 1",
        "[registry.hosts]\na = 1",
        "[registry.hosts.a]\nmirrors = 'x'",
        "[registry.hosts.a]\nmirrors = [1]",
        "[registry.hosts.a]\nupload_chunk = -1",
        "[registry.hosts.a]\nwhat = 1",
        "broken",
    ],
)
def test_refuses(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}/config.toml: "):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[registry]\nunknown = 1", "registry.unknown: unknown key"),
        ("[registry]\ntimeout = '5'", "registry.timeout must be a float, not '5'"),
        ("[registry.hosts.'a.b']\nupload_chunk = -1", 'registry.hosts."a.b".upload_chunk must be positive, not -1'),
        ("[registry.hosts.'a.b']\nmirrors = [1]", 'registry.hosts."a.b".mirrors must be a list of strings'),
    ],
)
def test_says_where_the_mistake_is(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert str(caught.value) == f"{tmp_path}/config.toml: {problem}"


def test_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_registry_config(tmp_path / "none")
    (tmp_path / "c.toml").write_text("[registry]\ntimeout = 7")
    assert load_registry_config(environ={"EROFS_LOADER_CONFIG": f"{tmp_path}/c.toml"}).timeout == 7
