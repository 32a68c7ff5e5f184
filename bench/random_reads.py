"""Random 4 KiB reads by some processes at once: python -m bench.random_reads --jobs 4 --reads 2000 FILE…

Each process opens all files, tells the kernel that it reads at random, drops the page cache once all are there, and
then reads; files are chosen by their size. Prints the seconds from the first read to the last as JSON. The places are
the same for the same files and sizes: mounts of one tree are read alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from itertools import accumulate
from multiprocessing.synchronize import Barrier

from bench.node import drop_caches

BLOCK = 4096


def _places(sizes: Sequence[int], reads: int, seed: int) -> list[tuple[int, int]]:
    """Files by number, and block-aligned offsets in them."""
    generator = random.Random(seed)
    blocks = [size // BLOCK for size in sizes]
    files = generator.choices(range(len(sizes)), cum_weights=list(accumulate(blocks)), k=reads)
    return [(file, generator.randrange(blocks[file]) * BLOCK) for file in files]


def _job(files: Sequence[str], reads: int, seed: int, ready: Barrier) -> None:
    opened = [os.open(file, os.O_RDONLY) for file in files]
    for fd in opened:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    places = _places([os.fstat(fd).st_size for fd in opened], reads, seed)
    ready.wait()
    ready.wait()  # the caches were dropped
    for file, offset in places:
        if len(os.pread(opened[file], BLOCK, offset)) != BLOCK:
            raise OSError(f"{files[file]} ends before {offset + BLOCK}")


def main() -> None:
    parser = argparse.ArgumentParser(description="random reads of 4 KiB")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--reads", type=int, default=2000, help="of each job")
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    ready = multiprocessing.Barrier(options.jobs + 1)
    jobs = [
        multiprocessing.Process(target=_job, args=(options.files, options.reads, seed, ready))
        for seed in range(options.jobs)
    ]
    for job in jobs:
        job.start()
    ready.wait()
    drop_caches()
    ready.wait()
    begin = time.monotonic()
    for job in jobs:
        job.join()
    seconds = time.monotonic() - begin
    if any(job.exitcode for job in jobs):
        raise SystemExit("a job failed")
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
