"""What a new worker takes from the configuration file; the page about the file has the defaults."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from loader.config import Config, load_config, parse_size
from loader.registry.config import RegistryConfig, load_registry_config
from loader.worker.settings import RELOADED, current_settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "man" / "erofs-loader.toml.5"


@pytest.fixture
def started(tmp_path: Path) -> Config:
    """As a daemon was started with `--quota`, and a file."""
    (tmp_path / "tmp").mkdir()
    file = tmp_path / "c.toml"
    file.write_text('quota = "1G"\nlog_level = "debug"\n[fetch]\nconnections = 3\n[registry]\ntimeout = 3\n')
    return Config.decode(load_config(file, {}, {"root": tmp_path, "quota": "2G", "plane": "fanotify"}).encode())


def test_a_worker_follows_the_file_but_not_over_the_command_line(started: Config, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'quota = "3G"\nplane = "cachefiles"\ninsecure = true\n[fetch]\nconnections = 4\n[registry]\ntimeout = 4\n'
    )
    config, registries = current_settings(started)
    assert (config.quota, config.connections, config.log_level) == (2 << 30, 4, "info")
    assert config.plane == "fanotify"
    assert registries.timeout == 4 and registries.insecure


@pytest.mark.parametrize("text", ["quota = [", "colour = 1", '[registry]\ntimeout = "soon"', None])
def test_a_mistake_in_the_file_changes_nothing(
    started: Config, tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = current_settings(started)
    assert before[1].timeout == 3
    if text is None:
        (tmp_path / "c.toml").unlink()
    else:
        (tmp_path / "c.toml").write_text(text)
    assert current_settings(started) == before
    assert "stay as they were" in caplog.text


def test_a_mistake_from_the_start_is_survived(started: Config, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[")
    assert current_settings(started)[0] == started


def test_a_file_that_came_later_counts(tmp_path: Path) -> None:
    started = load_config(None, {"EROFS_LOADER_ROOT": str(tmp_path)}, {})
    assert current_settings(started, tmp_path / "later.toml")[1].timeout == 30
    (tmp_path / "tmp").mkdir()
    (tmp_path / "later.toml").write_text("scrub_days = 1\n[registry]\ntimeout = 8\n")
    config, registries = current_settings(started, tmp_path / "later.toml")
    assert (config.scrub_days, registries.timeout) == (1, 8)


def test_the_example_of_the_page_is_the_default(tmp_path: Path) -> None:
    example = PAGE.read_text().split(".SH EXAMPLE")[1].split(".EX\n")[1].split(".EE")[0]
    file = tmp_path / "c.toml"
    file.write_text(example.replace("\\-", "-"))
    assert load_config(file, {}) == replace(Config(), quota=20 << 30, file=file)
    registries = load_registry_config(file)
    assert replace(registries, auth_file=None, hosts={}) == RegistryConfig()
    assert registries.hosts["docker.io"].mirrors == ("https://mirror.example.org", "10.0.0.5:5000")
    named = {name for cls in (Config, RegistryConfig) for name in asdict(cls())} - {"file", "given", "hosts"}
    assert all(re.search(rf"^{name} =", example, re.MULTILINE) for name in named)


@pytest.mark.parametrize("text", ["insecure = true", "[registry]\ninsecure = true"])
def test_both_commands_obey_either_insecure(tmp_path: Path, text: str) -> None:
    (tmp_path / "tmp").mkdir()
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert load_registry_config(file).insecure
    assert current_settings(load_config(file, {}, {"root": tmp_path}))[1].insecure


def test_the_page_has_every_setting_and_its_default() -> None:
    page = PAGE.read_text().replace("\\-", "-")
    for name, value in asdict(Config()).items():
        if name in ("file", "given"):
            continue
        entry = re.search(rf"^\.B {name}\n(.*?)(?=^\.)", page, re.MULTILINE | re.DOTALL)
        assert entry, f"{name} is not on the page"
        if isinstance(value, int | float) and not isinstance(value, bool):
            said = re.search(r"\((\d+[KMGT]?)\)", entry[1])
            assert said and parse_size(said[1]) == value, f"{name}: {entry[1]!r}, not {value}"
    for name in RELOADED:
        assert name in page.split(".SH TOP LEVEL")[0], f"the page does not say that a reload takes {name}"
