"""R8, R9: reading one large cold file: all of it in order, and 4 KiB here and there, without and with a prefetch.

Each read is a pread(2) in this process, which is none of the daemon's. What is fetched alone, for comparison, is
fetched by the daemon's own client over one kept connection, frame by frame the same ranges in the same order.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from bench.bigfile import NAME, BigFile, publish, publish_database
from bench.link import Link
from bench.measure import Row, Sample, ratios, timed
from bench.node import Node, drop_caches
from bench.quick import Quick
from erofs_builder.frames import Frame
from loader.registry.ranges import Origin, RangePool
from loader.worker.readahead import NEAR
from tests.support.registry import docker_registry

RATE, RTT = 3e6, 0.02
COLD_READS, WARM_UP = 180, 10
PREFETCH_READS = 120
APART = NEAR + 1
COLD_NOTE = (
    "whatever is read of a frame, the kernel decodes all of its 128 KiB, for it reads ahead to the frame's end: 200 µs"
    " and more, the limit below. Timed step by step: 30 µs go by until the kernel has queued the event, 30 to 40 for"
    " each of three sleepers to be woken on another processor, 70 for verifying and writing (45 since what the"
    " processor can do is asked for once: the question leaves a virtual machine). That is more than the goal without a"
    " line of Python, of which the worker has 75 µs a READ if it does nothing else, and twice as much here, where each"
    " step finds the processor's caches cold. Tried, and no faster: the answer sent in C by who has written the frame,"
    " no thread woken to listen meanwhile, and the processor given up to who was woken. In C all of it would take about"
    " 500 µs. Smaller frames help: a database's are of 64 KiB, and its blob is 18 % larger for that. Next: C for what"
    " the worker does between the request and its answer"
)
DECODED_NOTE = (
    "of a frame of 44 KiB, the worker needs 25 µs to verify it, 140 to decode its 128 KiB, and 35 to write them; the"
    " rest is four changes of process, and the interpreters of worker and keeper. Next: C for the worker, as in the"
    " other form"
)
DATABASE_NOTE = (
    "frames of a database are of 64 KiB, a quarter of other files' (its blob is 18 % larger for that); what remains is"
    " the kernel's decoding, the four changes of process, and the interpreters of worker and keeper. Next: C for the"
    " worker"
)
PIPE_NOTE = (
    "the kernel decodes in the thread that reads, also what it reads ahead: cat decodes a frame while sha256sum waits"
    " for the next 64 KiB of their pipe, so both take as long as one after the other, the row above and sha256 alone."
    " And fetch and check share the two processors with both. Next: nothing of ours, but a kernel that decodes what it"
    " reads ahead on another processor; where files are read through pipes the decoded form is faster, the row below"
)
# What is said of it, the command, and the form of the mount
_READERS = (
    ("", "cat $W/mnt/data >/dev/null", "encoded"),
    ("piped into sha256sum as well, ", "cat $W/mnt/data | sha256sum", "encoded"),
    ("piped into sha256sum as well, decoded form, ", "cat $W/mnt/data | sha256sum", "decoded"),
)
PAUSE = 0.05  # seconds between two reads that meet a prefetch
HUNDRED = 100


def rows(runs: int) -> list[Row]:
    """All of it; the slow link is read over once, for it takes minutes."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with docker_registry(scratch / "registry") as registry:
            big, database = publish(registry, scratch), publish_database(registry, scratch)
            with Quick(registry, scratch / "registry/storage") as quick:
                cold = _cold_reads(runs, big, database, quick.address, scratch)
            return [
                *_loopback(runs, big, registry, scratch),
                _slow_link(big, registry, scratch),
                *cold,
                _with_prefetch(runs, big, registry, scratch),
            ]


@contextmanager
def _mounted(scratch: Path, big: BigFile, registry: str, form: str = "encoded") -> Iterator[tuple[Node, Path]]:
    """A fresh node that mounts the image after the page cache was dropped; its file.

    Not before: the index that the mount has just fetched would be read from the disk again, page by page.
    """
    with tempfile.TemporaryDirectory(prefix="node-", dir=scratch) as name, Node(Path(name), "--insecure") as node:
        mount = Path(name) / "mnt"
        drop_caches()
        node.mount(big.reference(registry), mount, form)
        try:
            yield node, mount / NAME
        finally:
            node.umount(mount)


def _plain(big: BigFile, registry: str) -> str:
    return f"curl -fsS {big.url(registry)} | zstd -dcq | sha256sum"


def _loopback(runs: int, big: BigFile, registry: str, scratch: Path) -> list[Row]:
    """Bytes that are verified, as the peer's are once it has their digest; and hashed by their reader once more."""
    samples = {name: Sample() for name in ("peer", *(what for what, _, _ in _READERS))}
    ranges = Sample()
    for _ in range(runs):
        timed(["curl", "-fsSo", "/dev/null", big.url(registry)])  # the registry's disk is warm for all
        samples["peer"].add(timed(["sh", "-c", _plain(big, registry)]))
        for what, command, form in _READERS:
            with _mounted(scratch, big, registry, form) as (node, file):
                timed(["curl", "-fsSo", "/dev/null", big.url(registry)])
                samples[what].add(timed(["sh", "-c", command.replace("$W/mnt/data", str(file))]))
                ranges.add(node.ask("stats")["counters"]["fetches"])
    limit = _parts(big, registry)
    return [
        Row(
            "R8", f"cold sequential read, {what}loopback",
            f"{samples[what].text('s', 2)}, {ranges.median:.0f} ranges",
            f"curl, zstd -d, sha256sum {samples['peer'].text('s', 2)}",
            ratios(samples["peer"], samples[what]).median, 0.9, larger=True, unit="×", limit=limit,
            samples={"ours": samples[what].values, "peer": samples["peer"].values},
            commands=[_plain(big, "REGISTRY"), command], note=PIPE_NOTE if form == "encoded" and what else "",
        )
        for what, command, form in _READERS
    ]  # fmt: skip


def _parts(big: BigFile, registry: str) -> str:
    """What each step alone takes: nothing that does them all can be faster than the slowest."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        blob, data = Path(name) / "blob", Path(name) / "data"
        link = timed(["curl", "-fsSo", blob, big.url(registry)])
        decode = timed(["zstd", "-dcqf", blob], stdout=data)
        digest = timed(["sha256sum", data])
        verify = timed(["sha256sum", blob])
    return f"alone: link {link:.2f} s, zstd -d {decode:.2f} s, sha256 {digest:.2f} s, of the blob {verify:.2f} s"


def _slow_link(big: BigFile, registry: str, scratch: Path) -> Row:
    """The bytes that crossed, at the link's rate, against what it took."""
    with Link(registry, RATE, RTT) as link, _mounted(scratch, big, link.address) as (_, file):
        link.reset()
        ours = timed(["sha256sum", file])
        down = link.counters().down
    best = big.table.blob_size / RATE
    return Row(
        "R8", "cold sequential read, 3 MB/s, 20 ms", f"{ours:.1f} s, {down / 1e6:.1f} MB",
        f"the blob's {big.table.blob_size / 1e6:.1f} MB at the link's rate {best:.1f} s", best / ours, 0.95,
        larger=True, unit="×", samples={"ours": [ours]}, commands=[f"sha256sum $W/mnt/{NAME}"],
    )  # fmt: skip


def _scattered(big: BigFile, count: int, seed: int) -> list[Frame]:
    """Frames in random order, so far from each other that no read makes the daemon guess another."""
    whole = [frame for frame in big.table if frame.decoded_offset + frame.decoded_size <= big.size]
    return random.Random(seed).sample(whole[seed % APART :: APART], count)


class _Reader:
    """Reads 4 KiB of a file here and there."""

    def __init__(self, file: Path, seed: int) -> None:
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._place = random.Random(seed)

    def read_time(self, frame: Frame) -> float:
        """Seconds of one read in a frame."""
        offset = frame.decoded_offset + 4096 * self._place.randrange(frame.decoded_size // 4096)
        begin = time.perf_counter()
        if len(os.pread(self._fd, 4096, offset)) != 4096:
            raise RuntimeError(f"a short read at {offset}")
        return time.perf_counter() - begin

    def forget(self) -> None:
        """Have the kernel forget what it decoded."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)


class _Client:
    """The daemon's own client, with one kept connection."""

    def __init__(self, big: BigFile, registry: str) -> None:
        self._url = urlsplit(big.url(registry))
        self._pool = RangePool(Origin(self._url.hostname or "", self._url.port or 80, None, 10, 10))

    def fetch_time(self, frame: Frame) -> float:
        """Seconds of a frame's range request, to its last byte."""
        span = f"bytes={frame.encoded_offset}-{frame.encoded_offset + frame.encoded_size - 1}"
        begin = time.perf_counter()
        answer = self._pool.send(self._url.path, {"Range": span}, self._url.geturl())
        if answer is None or answer.status != 206 or len(answer.read()) != frame.encoded_size:
            raise RuntimeError("the registry did not answer with the range")
        answer.close()
        return time.perf_counter() - begin


def percentile(values: list[float], percent: int) -> float:
    """The value below which so many per cent of all lie."""
    return statistics.quantiles(values, n=HUNDRED, method="inclusive")[percent - 1]


def _cold_reads(runs: int, big: BigFile, database: BigFile, registry: str, scratch: Path) -> list[Row]:
    return [
        row
        for what, file, form, note in (
            ("", big, "encoded", COLD_NOTE),
            ("", big, "decoded", DECODED_NOTE),
            (" of a database", database, "encoded", DATABASE_NOTE),
            (" of a database", database, "decoded", DATABASE_NOTE),
        )
        for row in _cold_rows(what, form, note, _cold_samples(runs, file, registry, scratch, form))
    ]


def _cold_rows(what: str, form: str, note: str, of: dict[str, Sample]) -> list[Row]:
    said, by = (", decoded form", "") if form == "decoded" else ("", ", decoded by the kernel")
    return [
        Row(
            "R9", f"a cold 4 KiB read{what} beyond its fetch, p{percent}, loopback{said}",
            of[f"read p{percent}"].text("µs", 0), f"the fetch alone {of[f'fetch p{percent}'].text('µs', 0)}",
            of[f"beyond p{percent}"].median, goal, larger=False, unit=" µs",
            samples={name: sample.values for name, sample in of.items() if name.endswith(f"p{percent}")},
            limit=f"the same reads of what is there{by}: {of['again'].text('µs', 0)}",
            note=note if percent == 50 else "",
        )
        for percent, goal in ((50, 250.0), (99, 1000.0))
    ]  # fmt: skip


def _cold_samples(runs: int, big: BigFile, registry: str, scratch: Path, form: str) -> dict[str, Sample]:
    """Microseconds, of each run: of reads, of fetches, and of reads beyond fetches; and of reads of what is there."""
    names = [f"{what} p{percent}" for what in ("read", "fetch", "beyond") for percent in (50, 99)]
    samples = {name: Sample() for name in (*names, "again")}
    client = _Client(big, registry)
    for run in range(runs):
        frames = _scattered(big, WARM_UP + COLD_READS, run)
        with _mounted(scratch, big, registry, form) as (_, file), _Reader(file, run) as reader:
            timed(["curl", "-fsSo", "/dev/null", big.url(registry)])
            reads, fetches = _side_by_side(reader, client, frames, run)
            reader.forget()
            samples["again"].add(percentile([reader.read_time(frame) for frame in frames[WARM_UP:]], 50) * 1e6)
        for percent in (50, 99):
            read, fetch = (percentile(values, percent) * 1e6 for values in (reads, fetches))
            samples[f"read p{percent}"].add(read)
            samples[f"fetch p{percent}"].add(fetch)
            samples[f"beyond p{percent}"].add(read - fetch)
    return samples


def _side_by_side(reader: _Reader, client: _Client, frames: list[Frame], seed: int) -> tuple[list[float], list[float]]:
    """Seconds of reads and of fetches, one of each a frame, in no regular order: a registry that collects garbage at
    every second request must not always do so for the same side."""
    coin = random.Random(seed)
    reads: list[float] = []
    fetches: list[float] = []
    for number, frame in enumerate(frames):
        sides = [(reads, reader.read_time), (fetches, client.fetch_time)]
        coin.shuffle(sides)
        for seconds, measure in sides:
            took = measure(frame)
            if number >= WARM_UP:
                seconds.append(took)
    return reads, fetches


def _with_prefetch(runs: int, big: BigFile, registry: str, scratch: Path) -> Row:
    """p99 of cold reads over the slow link while a prefetch of the whole image runs, and without."""
    alone, beside = Sample(), Sample()
    for run in range(runs):
        frames = _scattered(big, PREFETCH_READS, run)
        with Link(registry, RATE, RTT) as link:
            with _mounted(scratch, big, link.address) as (_, file):
                alone.add(_p99(file, frames, run))
            with _mounted(scratch, big, link.address) as (node, file), _prefetching(node, big, link.address):
                beside.add(_p99(file, frames, run))
    ratio = ratios(beside, alone)
    return Row(
        "R9", "p99 of cold reads with a prefetch / without, 3 MB/s, 20 ms", beside.text("ms", 0),
        f"without {alone.text('ms', 0)}", ratio.median, 1.5, larger=False, unit="×",
        samples={"with": beside.values, "without": alone.values},
    )  # fmt: skip


def _p99(file: Path, frames: list[Frame], seed: int) -> float:
    """Milliseconds."""
    seconds = []
    with _Reader(file, seed) as reader:
        for frame in frames:
            time.sleep(PAUSE)
            seconds.append(reader.read_time(frame))
    return percentile(seconds, 99) * 1e3


@contextmanager
def _prefetching(node: Node, big: BigFile, registry: str) -> Iterator[None]:
    process = node.begin("prefetch", big.reference(registry))
    try:
        time.sleep(1.0)
        yield
        if process.poll() is not None:
            raise RuntimeError("the prefetch was over before the reads were")
    finally:
        process.kill()
        process.wait()
