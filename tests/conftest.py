"""Session set-up: sweep what an aborted run left behind; decide what this machine can run.

A session notes its process in its base directory. A later session that finds such a note of a dead process unmounts
what is mounted below that directory and ends the processes that were given a path in it, and touches nothing else.

`make test` runs three processes of pytest side by side (pytest-xdist), as many tests wait. The virtual machines keep
one of them for minutes, so they come first; a file's tests stay together, as its module fixtures are dear.
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
def _swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    base, process = tmp_path_factory.getbasetemp(), os.getpid()
    # Not the environment: a session that a test of such a process starts finds the variable there too.
    worker = getattr(request.config, "workerinput", {}).get("workerid")
    if worker:  # the session is the parent's, and its directory the one above
        base, process = base.parent, os.getppid()
    if worker in (None, "gw0"):
        sweep.sweep_dead_sessions(base.parent)
        sweep.note_session(base, process)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("vm") is None)
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_report_header() -> str:
    kernel = os.uname()
    return f"kernel {kernel.release}, {os.cpu_count()} processors, cache {Path.home() / '.cache'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which cells of the kernel matrix ran, and how they ended."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    cells = [value for report in reports for name, value in report.user_properties if name == "cell"]
    if cells:
        terminalreporter.section("kernels")
        for cell in cells:
            terminalreporter.line(str(cell))
