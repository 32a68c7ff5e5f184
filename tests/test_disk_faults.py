"""What a reader sees when the cache's disk is full, fails, forgets or rots: time or an error, never a wrong byte."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.files import CacheFile, load_table, prepare_blob
from loader.cache.layout import Layout
from loader.cache.ready import HEADER_SIZE, NotTakenError, ReadyMap
from loader.cache.writer import BufferedWriter
from tests.support.cache_files import sample, table_of
from tests.support.daemon import Daemon, convert, drop_caches, make_files, make_tree, read_all, start_cat, start_reader
from tests.support.daemon import result as result_of
from tests.support.faulty_registry import FaultyRegistry
from tests.support.loop_disk import FailingDisk, LoopDisk, QuotaDisk
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
FORMS = ("encoded", "decoded")
Published = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A registry's address and what `sample:1` holds; `big:1` and `big:2` are 6 MB that do not compress."""
    directory = tmp_path_factory.mktemp("published")
    digests = make_tree(directory / "tree")
    with docker_registry(directory / "registry") as address:
        convert(directory / "tree", f"docker://{address}/sample:1")
        for number in (1, 2):
            make_files(directory / f"big{number}", 5 + number, 1_000_000)
            convert(directory / f"big{number}", f"docker://{address}/big:{number}")
        yield address, digests


def big_digests(files: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as directory:
        return make_files(Path(directory), files, 1_000_000)


def data_files(daemon: Daemon) -> list[Path]:
    return sorted((daemon.root / "blobs").glob("*/*/data"))


def flip_bits(path: Path) -> None:
    """One bit in every 100,000 bytes."""
    with path.open("r+b") as stream:
        for offset in range(50_000, path.stat().st_size, 100_000):
            stream.seek(offset)
            byte = stream.read(1)[0]
            stream.seek(offset)
            stream.write(bytes((byte ^ 4,)))


def punch(path: Path) -> None:
    """What a disk that lied about its writes may leave: a hole."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as stream:
        size = ctypes.c_int64(200_704)
        assert libc.fallocate(stream.fileno(), 3, ctypes.c_int64(8192), size) == 0


def read_until_right(target: Path, digests: dict[str, str], seconds: float = 30) -> bool:
    """Read everything until all of it can be read. Whatever is read meanwhile is right, or an error."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        drop_caches()
        seen = read_all(target)
        assert all(value in ("errno 5", "errno 117", digests[name]) for name, value in seen.items())
        if seen == digests:
            return True
        time.sleep(0.5)
    return False


@pytest.mark.parametrize(("damage", "registry_away"), [(flip_bits, False), (flip_bits, True), (punch, False)])
def test_the_kernel_notices_bit_rot_and_the_frame_is_fetched_again(
    tmp_path: Path, published: Published, damage: Callable[[Path], None], registry_away: bool
) -> None:
    address, digests = published
    with FaultyRegistry(address) as registry, Daemon(tmp_path / "d", "--form", "encoded") as daemon:
        target = daemon.mount(f"docker://{registry.address}/sample:1")
        daemon.command("prefetch", f"docker://{registry.address}/sample:1")
        assert read_all(target) == digests
        for path in data_files(daemon):
            damage(path)
        drop_caches()
        registry.off = registry_away
        first = result_of(start_reader(target, 1)) if not registry_away else {}
        registry.off = False
        assert all(value in ("errno 5", "errno 117", digests[name]) for name, value in first.items())
        assert read_until_right(target, digests)
        assert daemon.counters()["damaged_frames"] > 0
        assert "damaged on disk" in daemon.log.read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mounted", [True, False])
def test_scrub_finds_and_repairs(tmp_path: Path, published: Published, form: str, mounted: bool) -> None:
    address, digests = published
    image = f"docker://{address}/sample:1"
    with Daemon(tmp_path / "d", "--form", form) as daemon:
        target = daemon.mount(image)
        daemon.command("prefetch", image)
        clean = daemon.command("scrub")
        assert clean["finished"] and not clean["damaged"] and not clean["skipped"]
        assert clean["checked"] == clean["total"] > 0
        assert clean["frames"] == daemon.command("stats")["frames"]
        if not mounted:
            daemon.command("umount", str(target))
        for path in data_files(daemon):
            flip_bits(path)
        done = daemon.run("scrub")
        assert done.returncode == 12, done.stderr
        assert "were damaged" in done.stdout
        if not mounted:
            daemon.mount(image)
        assert read_until_right(target, digests)
        assert daemon.command("scrub")["damaged"] == 0


def test_what_stays_guarded_is_not_called_damaged(tmp_path: Path, published: Published) -> None:
    """After a lazy unmount the keeper denies what is read by path; all of it is there for the next mount."""
    address, digests = published
    image = f"docker://{address}/sample:1"
    with Daemon(tmp_path / "d", "--form", "decoded") as daemon:
        target = daemon.mount(image)
        for name in sorted(digests)[-3:]:
            (target / name).read_bytes()
        held = os.open(target / "large/7", os.O_RDONLY)
        daemon.command("umount", str(target), "--lazy")
        assert not daemon.command("scrub")["damaged"]
        frames = daemon.command("stats")["frames"]
        os.close(held)
        until = time.monotonic() + 30
        while not (done := daemon.command("scrub"))["skipped"] and time.monotonic() < until:
            time.sleep(0.5)
        assert "guarded for users of an unmounted image" in done["skipped"][0]
        assert not done["damaged"] and daemon.counters().get("damaged_frames", 0) == 0
        daemon.mount(image)
        assert daemon.command("stats")["frames"] == frames
        assert daemon.command("scrub")["frames"] > 0
        assert read_all(target) == digests


def test_a_patrol_finds_what_nobody_else_would(tmp_path: Path, published: Published) -> None:
    """Rot in the decoded form, and nobody asks for a scrub."""
    address, digests = published
    image = f"docker://{address}/sample:1"
    config = tmp_path / "config.toml"
    config.write_text("scrub_days = 0.00001\n")
    with Daemon(tmp_path / "d", "--config", str(config), "--form", "decoded") as daemon:
        target = daemon.mount(image)
        daemon.command("prefetch", image)
        for path in data_files(daemon):
            flip_bits(path)
        rotten = time.time()
        for _ in range(2):  # the round that was under way, and one that began since
            while daemon.command("status")["scrubbed"] <= rotten:
                time.sleep(0.1)
            rotten = time.time()
        assert daemon.counters()["damaged_frames"]
        drop_caches()
        assert read_until_right(target, digests)
        assert daemon.command("scrub")["damaged"] == 0


def payload_of(daemon: Daemon) -> Path:
    (path,) = (daemon.root / "images").glob("*/*.payload")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_rotten_metadata_is_fetched_again_before_it_is_mounted(tmp_path: Path, published: Published, form: str) -> None:
    address, digests = published
    with FaultyRegistry(address) as registry, Daemon(tmp_path / "d", "--form", form) as daemon:
        image = f"docker://{registry.address}/sample:1"
        target = daemon.mount(image)
        right = payload_of(daemon).read_bytes()
        daemon.command("umount", str(target))
        flip_bits(payload_of(daemon))
        registry.off = True
        os.kill(daemon.worker(), signal.SIGKILL)  # it knows this image's manifest, and so its metadata, by heart
        digest = payload_of(daemon).parent.name
        refused = daemon.run("mount", digest, str(target))
        assert refused.returncode == 11 and read_all(target) == {}
        registry.off = False
        daemon.mount(image)
        drop_caches()
        assert read_all(target) == digests
        assert payload_of(daemon).read_bytes() == right
        assert daemon.counters()["damaged_payloads"] > 0


@pytest.mark.parametrize("form", FORMS)
def test_scrub_repairs_metadata_under_its_mount(tmp_path: Path, published: Published, form: str) -> None:
    address, digests = published
    with Daemon(tmp_path / "d", "--form", form) as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        payload = payload_of(daemon)
        right, inode = payload.read_bytes(), payload.stat().st_ino
        assert daemon.command("scrub")["payloads"] == 1
        flip_bits(payload)
        done = daemon.run("scrub")
        assert done.returncode == 12 and "1 were damaged" in done.stdout
        assert (payload.read_bytes(), payload.stat().st_ino) == (right, inode)
        drop_caches()
        assert read_all(target) == digests
        assert daemon.command("scrub")["damaged"] == 0


def test_a_new_worker_repairs_what_is_mounted(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with Daemon(tmp_path / "d") as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        payload = payload_of(daemon)
        right = payload.read_bytes()
        flip_bits(payload)
        os.kill(daemon.worker(), signal.SIGKILL)
        until = time.monotonic() + 30
        while payload.read_bytes() != right and time.monotonic() < until:
            time.sleep(0.1)
        assert payload.read_bytes() == right
        drop_caches()
        assert read_all(target) == digests


@pytest.mark.parametrize(("form", "losses"), [("encoded", ("damaged", "gone")), ("decoded", ("header", "empty"))])
def test_the_database_is_made_again(tmp_path: Path, published: Published, form: str, losses: tuple[str, str]) -> None:
    address, digests = published
    image = f"docker://{address}/sample:1"
    with Daemon(tmp_path / "d", "--form", form) as daemon:
        target = daemon.mount(image)
        daemon.command("add", image, "--pin")
        assert read_all(target) == digests
        before = daemon.command("list")
        database = daemon.root / "records" / "state.db"
        for loss in losses:
            daemon.stop()
            lose(database, loss)
            daemon.start()
            drop_caches()
            assert read_all(target) == digests
            assert daemon.command("list") == before
        assert len(list(database.parent.glob("state.db.damaged-*"))) == 1  # what had something in it


def lose(database: Path, how: str) -> None:
    if how == "gone":
        database.unlink()
        return
    data = bytearray(database.read_bytes())
    if how == "damaged":
        data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    elif how == "header":
        data[:100] = bytes(100)
    else:
        data.clear()
    database.write_bytes(data)


def test_a_full_disk_is_waited_for(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with LoopDisk(tmp_path, 48 << 20) as disk, Daemon(disk.path / "d") as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        ballast = disk.fill()
        reader = start_reader(target, 1)
        while not daemon.counters()["write_errors"]:
            time.sleep(0.1)
        time.sleep(1)
        assert reader.poll() is None
        assert "No space left" in str(daemon.command("status")["source_errors"])
        ballast.unlink()
        assert result_of(reader) == digests
        assert daemon.counters()["requests_failed"] == 0


def test_a_full_disk_is_an_error_at_the_deadline(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with LoopDisk(tmp_path, 48 << 20) as disk, Daemon(disk.path / "d", "--deadline", "2") as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        ballast = disk.fill()
        assert start_cat(target / "large/5").communicate(timeout=60)[0] == "errno 5\n"
        assert "No space left" in daemon.command("status")["failed_reads"][-1]["reason"]
        ballast.unlink()
        assert read_until_right(target, digests)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_full_disk_is_evicted_from(tmp_path: Path, published: Published, mounted: bool) -> None:
    """What nothing has mounted goes, then what was read least recently."""
    address, _ = published
    with LoopDisk(tmp_path, 24 << 20) as disk, Daemon(disk.path / "d") as daemon:
        first = f"docker://{address}/big:1"
        target = daemon.mount(first)
        daemon.command("prefetch", first, *(f"/{number:03}" for number in range(5)))
        if not mounted:
            daemon.command("umount", str(target))
        ballast = disk.path / "ballast"
        free = os.statvfs(disk.path)
        with ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_frsize - (4 << 20))
        target = daemon.mount(f"docker://{address}/big:2", "second")
        seen = read_all(target)
        assert len(seen) == 7 and not any(value.startswith("errno") for value in seen.values())
        counters = daemon.counters()
        assert counters["evicted_bytes"] > 3_000_000 and counters["requests_failed"] == 0
        if mounted:
            ballast.unlink()
            assert read_all(daemon.directory / "mnt") == big_digests(6)


@pytest.mark.parametrize("form", FORMS)
def test_a_quota_of_the_file_system_is_waited_for(tmp_path: Path, published: Published, form: str) -> None:
    """EDQUOT, where not even a bit can be changed in place; a worker that is killed meanwhile starts again."""
    address, digests = published
    with QuotaDisk(tmp_path, 24 << 20) as disk:
        root = disk.limited / "root"
        with Daemon(tmp_path / "d", "--form", form, root=root) as daemon:
            target = daemon.mount(f"docker://{address}/sample:1")
            disk.fill()
            reader = start_reader(target, 1)
            for _ in range(2):
                while not daemon.counters()["write_errors"]:
                    time.sleep(0.1)
                assert reader.poll() is None
                assert "Disk quota exceeded" in str(daemon.command("status")["source_errors"])
                os.kill(daemon.worker(), signal.SIGKILL)
            disk.set_limit("none")
            assert result_of(reader) == digests
            status = daemon.command("status")
            assert status["keeper"]["counters"]["denied"] == 0
            assert daemon.counters()["requests_failed"] == 0


def test_a_quota_of_the_file_system_is_an_error_at_the_deadline(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with QuotaDisk(tmp_path, 24 << 20) as disk:
        with Daemon(tmp_path / "d", "--deadline", "2", root=disk.limited / "root") as daemon:
            target = daemon.mount(f"docker://{address}/sample:1")
            disk.fill()
            assert start_cat(target / "large/5").communicate(timeout=60)[0] == "errno 5\n"
            assert "Disk quota exceeded" in daemon.command("status")["failed_reads"][-1]["reason"]
            disk.set_limit("none")
            assert read_until_right(target, digests)


def test_a_quota_of_the_file_system_is_evicted_for(tmp_path: Path, published: Published) -> None:
    address, _ = published
    with QuotaDisk(tmp_path, 24 << 20) as disk, Daemon(tmp_path / "d", root=disk.limited / "root") as daemon:
        first = f"docker://{address}/big:1"
        target = daemon.mount(first)
        daemon.command("prefetch", first)
        daemon.command("umount", str(target))
        disk.fill(leave=4 << 20)
        seen = read_all(daemon.mount(f"docker://{address}/big:2"))
        assert seen == big_digests(7)
        counters = daemon.counters()
        assert counters["evicted_bytes"] > 3_000_000 and counters["requests_failed"] == 0


def test_a_disk_that_can_not_be_written_serves_what_it_has(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with LoopDisk(tmp_path, 48 << 20) as disk, Daemon(tmp_path / "d", root=disk.path / "root") as daemon:
        image = f"docker://{address}/sample:1"
        target = daemon.mount(image)
        daemon.command("prefetch", image, "/small")
        small = {name: value for name, value in digests.items() if name.startswith("small/")}
        _await_sync(daemon)
        assert not disk.remount_read_only(), "files are open for writing: only the kernel itself can do it, as here"
        disk.abort()
        drop_caches()
        assert {f"small/{name}": value for name, value in read_all(target / "small").items()} == small
        seen = read_all(target / "large")
        assert {value for name, value in seen.items() if value != digests[f"large/{name}"]} == {"errno 5"}
        failed = str(daemon.command("status")["failed_reads"])
        assert "Read-only file system" in failed or "Input/output error" in failed


def _await_sync(daemon: Daemon) -> None:
    """Until all that is ready is recorded as synced."""
    for file in data_files(daemon):
        until = time.monotonic() + 30
        while not (synced := file.with_name("synced")).exists() or (
            synced.read_bytes()[HEADER_SIZE:] != file.with_name("ready").read_bytes()[HEADER_SIZE:]
        ):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("form", FORMS)
def test_a_quota_evicts_what_nobody_reads(tmp_path: Path, published: Published, form: str) -> None:
    address, digests = published
    with Daemon(tmp_path / "d", "--form", form, "--quota", "6M") as daemon:
        first = f"docker://{address}/big:1"
        target = daemon.mount(first)
        daemon.command("prefetch", first)
        daemon.command("umount", str(target))
        mounted = daemon.mount(f"docker://{address}/sample:1", "sample")
        readers = [start_reader(mounted, seed) for seed in range(4)]
        second = daemon.mount(f"docker://{address}/big:2", "second")
        for reader in readers:
            assert result_of(reader) == digests
        assert not any(value.startswith("errno") for value in read_all(second).values())
        until = time.monotonic() + 20
        while not daemon.counters()["evicted_bytes"] and time.monotonic() < until:
            time.sleep(0.2)
        assert daemon.counters()["evicted_bytes"] > 5_000_000
        drop_caches()
        assert read_all(mounted) == digests
        assert not any(value.startswith("errno") for value in read_all(second).values())
        assert daemon.counters()["requests_failed"] == 0


@pytest.mark.parametrize("form", list(Form))
def test_what_a_failing_disk_did_not_take_is_not_there(tmp_path: Path, form: Form) -> None:
    """The kernel says so once, and from then on has zeros or what it has."""
    blob = sample(64)
    table = table_of(blob)
    whole = bytes(blob.decoded if form is Form.DECODED else blob.encoded)
    with FailingDisk(tmp_path / "device", 32 << 20) as disk:
        file = _open(disk.path / "root", table.blob_digest, form, 0, table)
        _write(file, whole, range(20))
        file.checkpoint()
        disk.fail()
        _write(file, whole, range(40, 64))  # not next to others: to a loop device half a write is a whole one
        with pytest.raises(NotTakenError):
            file.checkpoint()
        drop_caches()
        assert file.ready.count == 20
        file.ready.set(50)  # was just being written
        file.checkpoint()
        assert file.ready.count == 20
        _check_ready(file, whole)
        disk.mend()
        _write(file, whole, (frame for frame in range(64) if not file.ready[frame]))
        file.checkpoint()
        drop_caches()
        assert file.ready.complete
        _check_ready(file, whole)
        file.detach()
        file.ready.close()


def _write(file: CacheFile, whole: bytes, frames: Iterable[int]) -> None:
    for frame in frames:
        offset, size = file.place(file.table[frame])
        file.write(file.table[frame], whole[offset : offset + size])


@pytest.mark.parametrize("form", list(Form))
def test_after_a_loss_of_power_only_what_was_synced_counts(tmp_path: Path, form: Form) -> None:
    """Fifteen times on a real file system that forgets what it had not been told to keep."""
    rng = random.Random(7)
    blob = sample(64)
    table = table_of(blob)
    whole = bytes(blob.decoded if form is Form.DECODED else blob.encoded)
    with LoopDisk(tmp_path, 64 << 20) as disk:
        for boot in range(15):
            file = _open(disk.path / "root", table.blob_digest, form, boot, table if not boot else None)
            _check_ready(file, whole)
            synced = 0
            for _ in range(rng.randrange(1, 4)):
                for frame in rng.sample(range(64), rng.randrange(1, 9)):
                    offset, size = file.place(table[frame])
                    file.write(table[frame], whole[offset : offset + size])
                if rng.random() < 0.5:
                    file.checkpoint()
                    synced = file.ready.count
            file.detach()
            file.ready.close()
            disk.lose_power()
            again = _open(disk.path / "root", table.blob_digest, form, boot + 1, None)
            assert again.ready.count >= synced
            _check_ready(again, whole)
            if rng.random() < 0.3:
                again.forget(range(64))
            again.checkpoint()
            again.detach()
            again.ready.close()


def _open(root: Path, blob: Digest, form: Form, boot: int, table: object) -> CacheFile:
    layout = Layout(root)
    layout.prepare()
    if table is not None:
        prepare_blob(layout, form, table)  # type: ignore[arg-type]
        os.sync()
    stored = load_table(layout, form, blob)
    ready = ReadyMap(
        layout.blob(blob, form), len(stored), layout.tmp, boot.to_bytes(16, "little"), table=stored.identity
    )
    file = CacheFile(blob.hex, form, stored, ready, trusted=True)
    file.writer = BufferedWriter(os.open(layout.data(blob, form), os.O_RDWR | os.O_CLOEXEC))
    return file


def _check_ready(file: CacheFile, whole: bytes) -> None:
    assert file.writer is not None
    with file.writer.descriptor() as fd:
        for frame in file.table:
            offset, size = file.place(frame)
            if file.ready[frame.number]:
                assert os.pread(fd, size, offset) == whole[offset : offset + size]
