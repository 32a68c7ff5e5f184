"""A registry whose name does not resolve: its readers wait for the resolver, and get an error by the deadline.

Names are looked up as ever, by the C library; only which name server it asks is the test's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import faults
from tests.support.daemon import CAT, LOADER, Daemon, convert, make_files
from tests.support.faults import Plan
from tests.support.faulty_registry import FaultyRegistry
from tests.support.name_server import Answers, NameServer
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
HOST = "registry.example"
DEADLINE = 1.0
PATIENT = 60.0

# What the name server does, and what `status` says of it: the C library's own words.
FAULTS: list[tuple[Answers, str]] = [
    ("no such name", "Name or service not known"),
    ("no address", "No address associated with hostname"),
    ("failure", "Temporary failure in name resolution"),
    ("silence", "Temporary failure in name resolution"),
    ("down", "Temporary failure in name resolution"),
]


@dataclass
class Named:
    """An image of a registry that is known by name, and files that nobody has read."""

    names: NameServer
    registry: FaultyRegistry
    digests: dict[str, str]
    directory: Path

    def __post_init__(self) -> None:
        self.fresh = iter(sorted(self.digests))
        self.image = f"docker://{HOST}:{self.registry.address.partition(':')[2]}/sample:1"

    def fail(self, answers: Answers) -> None:
        """From now on the name does not resolve, and kept connections end."""
        self.names.answers = answers
        self.registry.plan = Plan(faults.hang_up, times=1)

    @contextmanager
    def daemon(self, deadline: float) -> Iterator[Daemon]:
        settings = self.directory / f"{deadline}.toml"
        settings.write_text(f'[fetch]\ndeadline = {deadline}\nreadahead = "0"\n[registry]\ninsecure = true\n')
        directory = self.directory / f"{deadline}"
        with Daemon(directory, "--config", str(settings), command=self.names.asking(*LOADER)) as daemon:
            daemon.mount(self.image)
            yield daemon


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    directory = tmp_path_factory.mktemp("names")
    digests = make_files(directory / "tree", 2 * len(FAULTS), 150_000)
    with docker_registry(directory / "registry") as address, FaultyRegistry(address) as registry:
        convert(directory / "tree", f"docker://{address}/sample:1")
        with NameServer(directory) as names:
            yield Named(names, registry, digests, directory)


@pytest.fixture(scope="module")
def patient(named: Named) -> Iterator[Daemon]:
    with named.daemon(PATIENT) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def impatient(named: Named) -> Iterator[Daemon]:
    with named.daemon(DEADLINE) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def _heal(named: Named) -> Iterator[None]:
    yield
    named.names.answers, named.registry.plan = "address", None


def start_cat(daemon: Daemon, name: str) -> subprocess.Popen[str]:
    """A process that prints a file's sha256, or `errno N`: where the daemon's mounts are."""
    inside = ["nsenter", f"--mount=/proc/{daemon.pid}/ns/mnt"]
    command = [*inside, sys.executable, "-S", "-c", CAT, str(daemon.directory / "mnt" / name)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def cat(daemon: Daemon, name: str) -> str:
    return start_cat(daemon, name).communicate(timeout=60)[0].strip()


@pytest.mark.parametrize(("answers", "said"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_name_that_does_not_resolve_for_a_while_costs_time_only(
    named: Named, patient: Daemon, answers: Answers, said: str
) -> None:
    retries = patient.counters()["fetch_retries"]
    named.fail(answers)
    name = next(named.fresh)
    reader = start_cat(patient, name)
    while patient.counters()["fetch_retries"] < retries + 2:
        time.sleep(0.05)
    assert reader.poll() is None
    assert f"cannot connect ({said})" in str(patient.command("status")["source_errors"])
    named.names.answers = "address"
    assert reader.communicate(timeout=60)[0].strip() == named.digests[name]
    assert patient.counters()["requests_failed"] == 0
    assert HOST in named.names.asked


@pytest.mark.parametrize(("answers", "said"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_name_that_does_not_resolve_is_an_error_at_the_deadline(
    named: Named, impatient: Daemon, answers: Answers, said: str
) -> None:
    named.fail(answers)
    name = next(named.fresh)
    started = time.monotonic()
    assert cat(impatient, name) == "errno 5"
    assert time.monotonic() - started >= DEADLINE
    failed = impatient.command("status")["failed_reads"][-1]
    assert f"cannot connect ({said})" in failed["reason"]
    assert failed["reason"] in impatient.log.read_text()
    named.names.answers = "address"
    until = time.monotonic() + 30
    while (seen := cat(impatient, name)) != named.digests[name]:
        assert seen == "errno 5" and time.monotonic() < until


@pytest.mark.parametrize("answers", ["no such name", "down"])
def test_a_mount_from_a_name_that_does_not_resolve_is_refused(
    named: Named, impatient: Daemon, answers: Answers
) -> None:
    named.names.answers = answers
    (target := named.directory / "other").mkdir(exist_ok=True)
    image = named.image.replace(HOST, "other.example")  # one to which no connection is kept
    done = impatient.run("mount", image, str(target))
    assert done.returncode == 11, done.stderr
    assert f"cannot connect ({dict(FAULTS)[answers]})" in done.stderr
