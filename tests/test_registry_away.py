"""A registry that is away for a minute, half of the default deadline: its readers wait, and none fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loader.config import Config
from tests.support.daemon import Daemon, convert, make_files, start_cat
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]
MINUTE = 60


def test_a_minute_without_a_registry_is_waited_out(tmp_path: Path) -> None:
    """For many readers, past the longest pause between two attempts."""
    assert Config().deadline == 2 * MINUTE
    digests = make_files(tmp_path / "tree", 6, 150_000)
    with docker_registry(tmp_path / "registry") as address, FaultyRegistry(address) as registry:
        convert(tmp_path / "tree", f"docker://{address}/sample:1")
        with Daemon(tmp_path / "d") as daemon:
            target = daemon.mount(f"docker://{registry.address}/sample:1")
            with registry.closed():
                readers = {name: start_cat(target / name) for name in digests}
                time.sleep(MINUTE)
                assert all(reader.poll() is None for reader in readers.values())
            assert {name: reader.communicate(timeout=60)[0].strip() for name, reader in readers.items()} == digests
            assert daemon.counters()["requests_failed"] == 0
