"""`erofs-loader`: configuration from file, environment and options; what the commands print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from erofs_builder.payload import Form
from loader.cli import loader as command
from loader.cli import loader_serve
from loader.config import Config, load_config, parse_size
from loader.errors import BusyError, LoaderError, UsageError
from loader.probe import Finding


def test_options_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('root = "/file"\nform = "decoded"\nquota = "2G"\n[fetch]\ndeadline = 5\n[registry]\ntimeout = 3\n')
    environment = {"EROFS_LOADER_ROOT": "/environment"}
    config = load_config(file, environment, {"form": "encoded", "plane": None})
    assert (config.root, config.form, config.quota, config.deadline) == (Path("/environment"), "encoded", 2 << 30, 5.0)
    assert config.plane == "auto"
    assert config.file == file
    assert Config.decode(config.encode()) == config
    assert Config.decode(Config().encode()) == Config()


@pytest.mark.parametrize(
    "text",
    [
        'plane = "magic"',
        "unknown = 1",
        "root = [",
        "deadline = 0",
        "[fetch]\nconnections = 0",
        'quota = "many"',
        'insecure = "yes"',
        "fetch = 3",
        "root = 3",
        "domain = 3",
        'file = "/x"',
        "[fetsh]\ndeadline = 5",
        "[fetch]\nconnections = true",
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError):
        load_config(tmp_path / "c.toml", {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[fetch]\nreadahead = 'x'", "fetch.readahead: not a size: 'x'"),
        ("readahead = 'x'", "readahead: not a size: 'x'"),
        ("quota = 'x'", "quota: not a size: 'x'"),
        ("[fetch]\ndeadline = 0", "fetch.deadline must be seconds, more than 0 and at most 86400, not 0"),
        ("[fetch]\nconnections = 999", "fetch.connections must be from 1 to 256, not 999"),
        ("[fetch]\nspeed = 1", "unknown setting fetch.speed"),
    ],
)
def test_a_mistake_is_said_with_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "c.toml", {})
    assert str(caught.value) == f"{tmp_path}/c.toml: {problem}"


@pytest.mark.parametrize("text", ["[registry]\nwhat = 1", "[registry]\ntimeout = 'x'", "[registry.hosts]\na = 1"])
def test_serve_does_not_start_with_a_mistake_about_registries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("loader.cli.loader_serve.resolved", lambda _: pytest.fail("it went on"))
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=f"{tmp_path}/c.toml: registry"):
        CliRunner().invoke(command.cli, ["serve", "--config", str(tmp_path / "c.toml")], catch_exceptions=False)


def test_a_missing_file_is_an_error_only_if_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        load_config(tmp_path / "none", {})
    with pytest.raises(UsageError):
        load_config(None, {"EROFS_LOADER_CONFIG": str(tmp_path / "none")})


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("scrub_days = 3")
    config = load_config(None, {"EROFS_LOADER_CONFIG": str(tmp_path / "c.toml")})
    assert (config.scrub_days, config.file) == (3, tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("4096", 4096), ("20G", 20 << 30), ("1.5K", 1536), ("3 MiB", 3 << 20)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e3", -1, True])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_layouts_are_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.absolute("oci:a/b:tag") == f"oci:{tmp_path}/a/b:tag"
    assert command.absolute("oci:/x") == "oci:/x"
    assert command.absolute("registry/image:tag") == "registry/image:tag"


class FakeClient:
    """Answers of a daemon, by method and path."""

    answers: dict[tuple[str, str], Any] = {}
    requests: list[tuple[Any, ...]] = []

    def __init__(self, path: Path) -> None:
        self.path = path

    def request(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        self.requests.append((method, path, body, query))
        return self.answers[method, path]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(command, "Client", FakeClient)
    FakeClient.answers, FakeClient.requests = {}, []
    return FakeClient


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(command.cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_add_prints_what_a_mount_by_hand_needs(fake: type[FakeClient]) -> None:
    added = {
        "name": "docker://h/r:1",
        "digest": "sha256:00",
        "form": "encoded",
        "fsid": "00-encoded",
        "domain_id": "erofs-ondemand",
        "options": "cache_strategy=disabled",
    }
    fake.answers["POST", "/v1/images"] = added
    output = _run("add", "h/r:1", "--pin")
    assert "fsid=00-encoded\ndomain_id=erofs-ondemand\n" in output
    options = "fsid=00-encoded,domain_id=erofs-ondemand,cache_strategy=disabled"
    assert f"mount -t erofs none DIR -o {options}" in output
    assert fake.requests == [("POST", "/v1/images", {"image": "h/r:1", "pinned": True}, None)]
    assert json.loads(_run("add", "h/r:1", "--json")) == added


@pytest.mark.parametrize(
    ("mounts", "hint"),
    [(["/elsewhere"], None), (["/elsewhere", "a mount"], "unmount it first: erofs-loader umount '{}'")],
)
def test_mount_says_how_to_free_a_target_of_ours(
    fake: type[FakeClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: list[str], hint: str | None
) -> None:
    target = tmp_path / "a mount"
    target.mkdir()

    def request(self: FakeClient, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        if (method, path) == ("POST", "/v1/mounts"):
            raise BusyError(f"{target}: something is mounted there")
        return [{"target": str(tmp_path / name)} for name in mounts]

    monkeypatch.setattr(FakeClient, "request", request)
    with pytest.raises(BusyError) as caught:
        _run("mount", "h/r:1", str(target))
    assert caught.value.hint == (hint and hint.format(target))


def test_list_is_a_table(fake: type[FakeClient]) -> None:
    fake.answers["GET", "/v1/images"] = [
        {
            "name": "docker://h/r:1",
            "digest": "sha256:" + "ab" * 32,
            "size": 199_000_000,
            "forms": ["encoded"],
            "pinned": True,
            "mounts": ["/mnt"],
        }
    ]
    header, row = _run("list").splitlines()
    assert header.split() == ["DIGEST", "SIZE", "FORMS", "IMAGE", "MOUNTED", "ON"]
    assert row.split() == ["abababababab", "199", "MB", "encoded", "docker://h/r:1", "(pinned)", "/mnt"]


def test_umount_names_the_directory_in_full(
    fake: type[FakeClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake.answers["DELETE", "/v1/mounts"] = {"unmounted": "x"}
    _run("umount", "mnt", "--lazy")
    assert fake.requests == [("DELETE", "/v1/mounts", None, {"target": f"{tmp_path}/mnt", "lazy": "1"})]


def test_location_options_may_stand_behind_the_command(
    fake: type[FakeClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    class Spy(FakeClient):
        def __init__(self, path: Path) -> None:
            seen.append(path)

    monkeypatch.setattr(command, "Client", Spy)
    fake.answers["GET", "/v1/images"] = []
    _run("list", "--socket", str(tmp_path / "a"))
    _run("--socket", str(tmp_path / "b"), "list")
    assert seen == [tmp_path / "a", tmp_path / "b"]


def test_a_root_that_others_can_write_in_is_refused(tmp_path: Path) -> None:
    for mode in (0o777, 0o775):
        tmp_path.chmod(mode)
        with pytest.raises(UsageError, match="can be written by others"):
            loader_serve.resolved(Config(root=tmp_path))


@pytest.mark.parametrize("name", ["serve", "probe"])
def test_what_mounts_says_that_it_must_run_as_root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LoaderError, match="must run as root") as caught:
        if name == "serve":
            loader_serve.serve(lambda: Config(root=tmp_path))
        else:
            loader_serve.probe(Config(root=tmp_path), as_json=False)
    assert caught.value.hint == f"sudo erofs-loader {name}"
    assert not list(tmp_path.iterdir())


def test_probe_gives_no_hint_where_the_preferred_plane_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Finding("fanotify", Form.ENCODED, True, 0.1, not_shared="a kernel"),
        Finding("cachefiles", Form.DECODED, False, 0.1, "a device", "load the module"),
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(loader_serve, "probe_all", lambda root: found)
    assert loader_serve.probe(Config(), as_json=False) == 0
    assert "hint" not in capsys.readouterr().out
    monkeypatch.setattr(loader_serve, "probe_all", lambda root: found[1:])
    assert loader_serve.probe(Config(), as_json=False) == 13
    assert "hint: load the module\n" in capsys.readouterr().out
