"""What a start that got descriptors back does about a mistake in the configuration: it goes on with the last one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from loader.cli import loader_serve
from loader.cli.loader import cli
from loader.cli.loader_settled import VARIABLE, settled
from loader.config import Config
from loader.errors import KernelSupportError, LoaderError, UsageError
from loader.keeper import supervisor
from loader.keeper.config import KeeperConfig

GUARDING = {"group": 100, "journal": 101}


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The settings of a start in a unit."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    config = Config(root=tmp_path, plane="fanotify", form="decoded", quota=7, given=("quota",))
    assert settled(lambda: config, {}) == config
    return config


def _mistaken(error: Exception) -> NoReturn:
    raise error


@pytest.mark.parametrize("error", [UsageError("quota"), KernelSupportError("no plane"), OSError(30, "read-only")])
def test_the_settings_of_the_last_start_stand_in(
    good: Config, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    assert settled(lambda: _mistaken(error), GUARDING) == good
    assert "settings of before" in caplog.text


def test_another_plane_has_to_wait(good: Config, caplog: pytest.LogCaptureFixture) -> None:
    assert settled(lambda: Config(plane="cachefiles"), GUARDING) == good
    assert "plane fanotify are still held" in caplog.text
    assert settled(lambda: _mistaken(UsageError("again")), GUARDING) == good


def test_a_mistake_is_one_where_nothing_depends_on_the_start(good: Config) -> None:
    with pytest.raises(UsageError, match="quota"):
        settled(lambda: _mistaken(UsageError("quota")), {"control": 100})


@pytest.mark.parametrize("kept", [None, "[", '{"colour": 1}'])
def test_without_settings_the_start_is_tried_again(good: Config, tmp_path: Path, kept: str | None) -> None:
    """Status 2 would have systemd give up, and close what readers wait at."""
    (tmp_path / "settings.json").unlink()
    if kept is not None:
        (tmp_path / "settings.json").write_text(kept)
    with pytest.raises(LoaderError, match="quota; readers of what is mounted wait") as caught:
        settled(lambda: _mistaken(UsageError("quota")), GUARDING)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("mistake", ["quota = [", "colour = 1", "[registry]\nwhat = 1"])
def test_serve_goes_on_with_a_mistake_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """By the command itself, which reads the file."""
    seen: list[KeeperConfig] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(loader_serve, "resolved", lambda config: config)
    monkeypatch.setattr(supervisor, "run", seen.append)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text(f'root = "{tmp_path}/root"\nplane = "fanotify"\n[fetch]\ndeadline = 7.0\n')
    cli.main(["--config", str(file), "serve"], standalone_mode=False)
    file.write_text(mistake)
    monkeypatch.setattr(loader_serve, "listen_fds", lambda _environment, _pid: GUARDING)
    cli.main(["--config", str(file), "serve"], standalone_mode=False)
    assert seen[0] == seen[1]
    assert seen[0].root == tmp_path / "root" and seen[0].deadline == 37.0
