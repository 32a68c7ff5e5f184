"""Session set-up: sweep what an aborted run left behind; decide what this machine can run.

A session notes its process in its base directory. A later session that finds such a note of a dead process unmounts
what is mounted below that directory and ends the processes that were given a path in it, and touches nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import sweep

# Parallel sessions and the caller's own daemon must not leak into tests.
for _name in ("EROFS_LOADER_ROOT", "EROFS_LOADER_SOCKET", "EROFS_LOADER_CONFIG"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def _swept(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    sweep.sweep_dead_sessions(base.parent)
    sweep.note_session(base)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_report_header() -> str:
    kernel = os.uname()
    return f"kernel {kernel.release}, {os.cpu_count()} processors, cache {Path.home() / '.cache'}"
