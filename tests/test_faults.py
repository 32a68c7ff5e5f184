"""What a reader sees of each fault of a registry: nothing but time, or an error by the deadline; never a wrong byte.

The reader is a process, the mount the kernel's, the registry a real one behind a proxy that breaks the ranges.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loader.worker.outages import TRY_AGAIN
from tests.support import faults
from tests.support.daemon import BUILDER, REPOSITORY, Daemon, convert, make_files, start_cat
from tests.support.faults import Fault, Plan, closed_port
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import certificates, docker_registry, htpasswd_auth, login_file
from tests.support.token_server import token_server

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
DEADLINE = 2.0
PATIENT = 30.0  # a deadline that no passing fault comes near, on a busy machine either
GRACE = 8.0  # seconds for the rest of a request, on a busy machine
FILES = 44


@dataclass
class Published:
    """A mounted image of files that each have frames of their own; every test reads files that nobody has read."""

    daemon: Daemon
    registry: FaultyRegistry
    target: Path
    digests: dict[str, str]
    settings: Path
    fresh: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = iter(sorted(self.digests))

    def read(self, name: str) -> str:
        """The file's sha256, or `errno N`, as another process sees it."""
        return start_cat(self.target / name).communicate(timeout=60)[0].strip()

    def heals(self, name: str) -> bool:
        """Whether the file can be read soon: what has just failed is not tried again for a moment."""
        until = time.monotonic() + 5 * TRY_AGAIN + GRACE
        while time.monotonic() < until:
            if self.read(name) == self.digests[name]:
                return True
            time.sleep(TRY_AGAIN / 4)
        return False

    def status_text(self) -> str:
        status = self.daemon.command("status")
        return f"{status['source_errors']} {status['failed_reads']}"


Sample = tuple[Path, FaultyRegistry, dict[str, str]]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sample]:
    """A published image: a directory, the registry in front of it, its files."""
    directory = tmp_path_factory.mktemp("faults")
    digests = make_files(directory / "tree", FILES, 150_000)
    (directory / "tree/names").mkdir()
    for number in range(400):  # so much metadata that it is a blob of its own, and not in the manifest
        (directory / "tree/names" / hashlib.sha256(b"%d" % number).hexdigest()).touch()
    with docker_registry(directory / "registry") as address, FaultyRegistry(address) as registry:
        convert(directory / "tree", f"docker://{address}/sample:1")
        yield directory, registry, digests


@contextmanager
def mounted(sample: Sample, deadline: float, timeout: float) -> Iterator[Published]:
    directory, registry, digests = sample
    settings = directory / f"{deadline}.toml"
    settings.write_text(
        f'[fetch]\ndeadline = {deadline}\nreadahead = "0"\n[registry]\ntimeout = {timeout}\nconnect_timeout = 5\n'
    )
    with Daemon(directory / f"{deadline}", "--config", str(settings)) as daemon:
        yield Published(daemon, registry, daemon.mount(f"docker://{registry.address}/sample:1"), digests, settings)


@pytest.fixture(scope="module")
def image(sample: Sample) -> Iterator[Published]:
    """For faults that stay: with a short deadline, before which a stall is noticed."""
    with mounted(sample, DEADLINE, 1.0) as ready:
        yield ready


@pytest.fixture(scope="module")
def patient(sample: Sample) -> Iterator[Published]:
    """For faults that pass."""
    with mounted(sample, PATIENT, 2.0) as ready:
        yield ready


@pytest.fixture(autouse=True)
def _heal(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "sample" in request.fixturenames:
        registry = request.getfixturevalue("sample")[1]
        registry.plan, registry.documents = None, []


# What a fault is called, what it is, and what `status` says of it
TRANSIENT: list[tuple[str, Fault, str]] = [
    ("reset before the answer", lambda answer: answer.reset(), "connection broke"),
    ("hung up before the answer", faults.hang_up, "connection broke"),
    ("reset mid-body", faults.reset_mid_body, "connection broke"),
    ("stall mid-body", faults.stall_mid_body, "timed out"),
    ("trickle mid-body", faults.trickle, "timed out"),
    ("trickled head", faults.trickled_head, "timed out"),
    ("truncated body", faults.truncated_body, "connection broke"),
    ("wrong range", faults.wrong_range, "another range"),
    ("short range", faults.short_range, "ends before"),
    ("redirect loop", faults.redirect_to_itself, "more than 5 redirects"),
    ("redirect to a dead host", faults.redirect_to(f"http://127.0.0.1:{closed_port()}/blob"), "cannot connect"),
    ("redirect to a name that does not resolve", faults.redirect_to("http://blobs.invalid/blob"), "cannot connect"),
    ("redirect to a file", faults.redirect_to("file:///etc/passwd"), "redirects to"),
    *((str(code), faults.status(code), f"told to ({code})") for code in (403, 408, 416, 425, 429, 500, 502, 503, 504)),
    ("429 with Retry-After", faults.status(429, Retry_After="1"), "(429)"),
    ("503 with a date as Retry-After", faults.status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), "(503)"),
]
CORRUPT: list[tuple[str, Fault]] = [
    ("bit flip", faults.bit_flip),
    ("swapped range", faults.swapped_range),
    ("zeros", faults.zeros),
    ("an error page as success", faults.not_gzip),
]


@pytest.mark.parametrize(("fault", "named"), [row[1:] for row in TRANSIENT], ids=[row[0] for row in TRANSIENT])
def test_a_passing_fault_costs_time_only(patient: Published, fault: Fault, named: str) -> None:
    image = patient
    before = image.daemon.counters()["requests_failed"]
    image.registry.plan = Plan(
        fault, times=6 if fault is faults.redirect_to_itself else 2
    )  # the first hang-up of a kept connection is none
    name = next(image.fresh)
    assert image.read(name) == image.digests[name]
    assert image.registry.plan.met >= 1
    assert image.daemon.counters()["requests_failed"] == before
    assert named in image.status_text()


@pytest.mark.parametrize(("fault", "named"), [row[1:] for row in TRANSIENT], ids=[row[0] for row in TRANSIENT])
def test_a_fault_that_stays_is_an_error_at_the_deadline(image: Published, fault: Fault, named: str) -> None:
    image.registry.plan = Plan(fault)
    name = next(image.fresh)
    started = time.monotonic()
    assert image.read(name) == "errno 5"
    assert DEADLINE <= time.monotonic() - started < 2 * (DEADLINE + GRACE)  # the kernel may ask for a part twice
    failed = image.daemon.command("status")["failed_reads"][-1]
    assert named in failed["reason"]
    assert failed["reason"] in image.daemon.log.read_text()
    image.registry.plan = None
    assert image.heals(name)


@pytest.mark.parametrize("fault", [row[1] for row in CORRUPT], ids=[row[0] for row in CORRUPT])
def test_wrong_bytes_are_never_seen(patient: Published, fault: Fault) -> None:
    image = patient
    image.registry.plan = Plan(fault, times=1)
    once, always = next(image.fresh), next(image.fresh)
    assert image.read(once) == image.digests[once]
    image.registry.plan = Plan(fault)
    started = time.monotonic()
    assert image.read(always) == "errno 5"
    assert time.monotonic() - started < PATIENT  # more time would not make them right
    assert "expected sha256" in image.daemon.command("status")["failed_reads"][-1]["reason"]
    checked = subprocess.run(
        [*BUILDER, "check", f"docker://{image.registry.address}/sample:1"], cwd=REPOSITORY, capture_output=True
    )
    image.registry.plan = None
    assert image.heals(always)
    assert checked.returncode in (0, 12)  # a whole download is not a range; see the next test


DOCUMENTS: list[tuple[str, Fault]] = [
    ("reset mid-body", faults.reset_mid_body),
    ("truncated body", faults.truncated_body),
    ("stall mid-body", faults.stall_mid_body),
    ("trickle mid-body", faults.trickle),
    ("trickled head", faults.trickled_head),
    ("503 with Retry-After", faults.status(503, Retry_After="1")),
]


@pytest.mark.parametrize("fault", [row[1] for row in DOCUMENTS], ids=[row[0] for row in DOCUMENTS])
def test_a_passing_fault_of_a_document_delays_the_mount(image: Published, tmp_path: Path, fault: Fault) -> None:
    """Once for the image's manifest, once for the metadata that is mounted."""
    plans = [Plan(fault, 1, "/manifests/"), Plan(fault, 1, "/blobs/")]
    name = f"docker://{image.registry.address}/sample:1"
    with Daemon(tmp_path / "d", "--config", str(image.settings)) as daemon:
        image.registry.documents = plans
        target = daemon.mount(name)
        assert [plan.met for plan in plans] == [1, 1]
        assert start_cat(target / "000").communicate(timeout=60)[0].strip() == image.digests["000"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
def test_a_document_that_trickles_does_not_hold_the_mount_for_ever(
    image: Published, tmp_path: Path, where: str
) -> None:
    with Daemon(tmp_path / "d", "--config", str(image.settings)) as daemon:
        image.registry.documents = [Plan(faults.trickle, where=where)]
        (target := tmp_path / "mnt").mkdir()
        done = daemon.run("mount", f"docker://{image.registry.address}/sample:1", str(target))
        assert done.returncode == 11, done.stderr
        assert "timed out" in done.stderr


def test_check_ends_with_12_where_the_registry_lies(image: Published) -> None:
    image.registry.spoil_blobs = True
    try:
        checked = subprocess.run(
            [*BUILDER, "check", f"docker://{image.registry.address}/sample:1"],
            cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        image.registry.spoil_blobs = False
    assert checked.returncode == 12, checked.stderr


def test_a_blob_that_is_gone_is_an_error_at_once(patient: Published) -> None:
    image = patient
    image.registry.plan = Plan(faults.status(404))
    name = next(image.fresh)
    started = time.monotonic()
    assert image.read(name) == "errno 5"
    assert time.monotonic() - started < PATIENT
    assert "told to (404)" in image.daemon.command("status")["failed_reads"][-1]["reason"]


def test_a_server_without_ranges_serves(patient: Published) -> None:
    image = patient
    image.registry.whole = True
    try:
        names = list(itertools.islice(image.fresh, 2))
        assert [image.read(name) for name in names] == [image.digests[name] for name in names]
    finally:
        image.registry.whole = False
    assert image.registry.ranges


def test_a_refused_connection_is_waited_out(patient: Published) -> None:
    image = patient
    name = next(image.fresh)
    with image.registry.closed():
        reader = start_cat(image.target / name)
        time.sleep(1.5)
        assert reader.poll() is None
    assert reader.communicate(timeout=60)[0].strip() == image.digests[name]


LIES = """
[registry.hosts."{registry}"]
mirrors = ["http://{mirrors[0]}", "http://{mirrors[1]}", "http://{mirrors[2]}"]
"""


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_mirrors_that_lie_are_found_out(tmp_path: Path, liars: int) -> None:
    digests = make_files(tmp_path / "tree", 6, 150_000)
    with docker_registry(tmp_path / "registry") as address, FaultyRegistry(address) as registry:
        convert(tmp_path / "tree", f"docker://{address}/sample:1")
        with FaultyRegistry(address) as one, FaultyRegistry(address) as two, FaultyRegistry(address) as three:
            mirrors = [one, two, three]
            for mirror in mirrors[:liars]:
                mirror.corrupt = True
            config = tmp_path / "config.toml"
            config.write_text(LIES.format(registry=registry.address, mirrors=[mirror.address for mirror in mirrors]))
            with Daemon(tmp_path / "d", "--config", str(config)) as daemon:
                target = daemon.mount(f"docker://{registry.address}/sample:1")
                seen = {name: start_cat(target / name).communicate(timeout=60)[0].strip() for name in digests}
                assert seen == digests
                assert daemon.counters()["corrupt_frames"] >= liars
                assert daemon.counters()["requests_failed"] == 0


def test_an_expired_token_is_replaced(tmp_path: Path) -> None:
    """The registry itself refuses the old token; nobody waits for a deadline."""
    digests = make_files(tmp_path / "tree", 8, 150_000)
    with token_server(tmp_path / "t") as server, docker_registry(tmp_path / "registry", server.auth) as address:
        with FaultyRegistry(address) as registry:
            config = tmp_path / "config.toml"
            login = login_file(tmp_path, "user", "secret", address, registry.address)
            config.write_text(f'[fetch]\nreadahead = "0"\n[registry]\nauth_file = "{login}"\n')
            convert(tmp_path / "tree", f"docker://{address}/sample:1", config)
            with Daemon(tmp_path / "d", "--config", str(config)) as daemon:
                target = daemon.mount(f"docker://{registry.address}/sample:1")
                names = sorted(digests)
                assert read_files(target, names[:2]) == {name: digests[name] for name in names[:2]}
                asked = len(server.requests)
                registry.revoke_logins()
                assert read_files(target, names[2:]) == {name: digests[name] for name in names[2:]}
                assert len(server.requests) == asked + 1
                assert daemon.counters()["requests_failed"] == daemon.counters()["fetch_retries"] == 0


def test_credentials_may_change_under_way(tmp_path: Path) -> None:
    """A password is changed: readers wait until the login file has the new one."""
    digests = make_files(tmp_path / "tree", 8, 150_000)
    auth = htpasswd_auth(tmp_path, "user", "old")
    with docker_registry(tmp_path / "registry", auth) as address:
        config = tmp_path / "config.toml"
        login = login_file(tmp_path, "user", "old", address)
        config.write_text(f'[fetch]\nreadahead = "0"\n[registry]\nauth_file = "{login}"\n')
        convert(tmp_path / "tree", f"docker://{address}/sample:1", config)
        with Daemon(tmp_path / "d", "--config", str(config)) as daemon:
            target = daemon.mount(f"docker://{address}/sample:1")
            names = sorted(digests)
            assert read_files(target, names[:2]) == {name: digests[name] for name in names[:2]}
            time.sleep(1.1)  # the registry reads its file again when its time of change, in seconds, is another one
            htpasswd_auth(tmp_path, "user", "new")
            reader = start_cat(target / names[4])
            while not daemon.counters()["fetch_retries"]:
                time.sleep(0.05)
            assert reader.poll() is None
            assert "(401)" in str(daemon.command("status")["source_errors"])
            login_file(tmp_path, "user", "new", address)
            assert reader.communicate(timeout=60)[0].strip() == digests[names[4]]
            assert read_files(target, names) == digests
            assert daemon.counters()["requests_failed"] == 0


def test_an_expired_certificate_is_named_and_its_successor_taken(tmp_path: Path) -> None:
    digests = make_files(tmp_path / "tree", 8, 150_000)
    good, expired = certificates(tmp_path / "tls")
    config = tmp_path / "config.toml"
    storage = tmp_path / "registry"
    port = closed_port()
    with docker_registry(storage) as address:
        convert(tmp_path / "tree", f"docker://{address}/sample:1")
    config.write_text(
        f'[fetch]\nreadahead = "0"\n[registry.hosts."127.0.0.1:{port}"]\nca_file = "{tmp_path}/tls/ca.pem"\n'
    )
    with ExitStack() as daemons, ExitStack() as registries:
        registries.enter_context(docker_registry(storage, tls=good, port=port))
        daemon = daemons.enter_context(Daemon(tmp_path / "d", "--config", str(config)))
        target = daemon.mount(f"docker://127.0.0.1:{port}/sample:1")
        names = sorted(digests)
        assert read_files(target, names[:1]) == {names[0]: digests[names[0]]}
        registries.pop_all().close()
        registries.enter_context(docker_registry(storage, tls=expired, port=port))
        reader = start_cat(target / names[3])
        while "certificate has expired" not in str(daemon.command("status")["source_errors"]):
            time.sleep(0.1)
        assert reader.poll() is None
        registries.pop_all().close()
        registries.enter_context(docker_registry(storage, tls=good, port=port))
        assert reader.communicate(timeout=60)[0].strip() == digests[names[3]]
        assert daemon.counters()["requests_failed"] == 0


def read_files(target: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: start_cat(target / name).communicate(timeout=60)[0].strip() for name in names}
