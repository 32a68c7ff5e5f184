"""A login stays in the worker's memory: no log, file, argument, environment, answer or error has it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import BUILDER, REPOSITORY, Daemon, convert, make_files, read_all
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry, htpasswd_auth, login_file

pytestmark = pytest.mark.root
PASSWORD = "hush-d2a97c04"
FORMS = (PASSWORD, base64.b64encode(f"user:{PASSWORD}".encode()).decode())


def _told(text: str) -> bool:
    return any(form in text for form in FORMS)


def _processes(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in _processes(int(child)))]


def test_a_login_is_nowhere_to_be_found(tmp_path: Path) -> None:
    digests = make_files(tmp_path / "tree", 8, 150_000)
    auth = htpasswd_auth(tmp_path, "user", PASSWORD)
    with docker_registry(tmp_path / "registry", auth) as address, FaultyRegistry(address) as registry:
        config = tmp_path / "config.toml"
        login = login_file(tmp_path, "user", PASSWORD, address, registry.address)
        config.write_text(f'log_level = "debug"\n[fetch]\ndeadline = 1\n[registry]\nauth_file = "{login}"\n')
        image = f"docker://{registry.address}/sample:1"
        convert(tmp_path / "tree", f"docker://{address}/sample:1", config)
        said = subprocess.run(
            [*BUILDER, "-vv", "check", "--config", str(config), image],
            capture_output=True, text=True, cwd=REPOSITORY, check=True,
        )  # fmt: skip
        assert not _told(said.stdout + said.stderr)
        with Daemon(tmp_path / "d", "--config", str(config)) as daemon:
            target = daemon.mount(image)
            registry.refuse = 403
            assert set(read_all(target).values()) == {"errno 5"}
            assert not _told(json.dumps([daemon.command("status"), daemon.command("stats"), daemon.command("list")]))
            registry.refuse = None
            daemon.command("prefetch", image)
            assert read_all(target) == digests
            for pid in _processes(daemon.pid):
                for name in ("cmdline", "environ"):
                    assert not _told(Path(f"/proc/{pid}/{name}").read_text(errors="replace")), (pid, name)
        for directory, _, names in os.walk(tmp_path / "d"):
            for name in names:
                path = Path(directory, name)
                assert not path.is_file() or not _told(path.read_text(errors="replace")), path
