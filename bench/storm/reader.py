"""Readers: `python -m bench.storm.reader BOARD READERS SPEC` forks them; they end with their standard input.

Each reads files of the mounts in five ways, each time another, and compares every byte with the tree that the image was
made from. SPEC is JSON: [[mount, form, tree, [path, …]], …].
"""

from __future__ import annotations

import errno
import functools
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from bench.storm.board import METHODS, Board, Row
from bench.storm.images import TOOL

_SLICE = 128 << 10
_PAGE = 4096
_PAUSE = 0.5  # seconds that a reader waits at most between two operations


class WrongBytesError(Exception):
    """A reader got something else than what the image holds."""


def _slices(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """Some pieces of a file, page-aligned."""
    starts = [rng.randrange(0, max(1, size)) // _PAGE * _PAGE for _ in range(rng.randint(1, 6))]
    return [(start, min(_SLICE, size - start)) for start in starts]


def _compare(got: bytes, source: int, offset: int, length: int, what: str) -> None:
    if got != os.pread(source, length, offset):
        zeros = "zeros" if not any(got) else f"{len(got)} bytes"
        raise WrongBytesError(f"{what}: {zeros} in place of {length} at {offset}")


def by_read(path: Path, source: int, rng: random.Random) -> None:
    with open(path, "rb", buffering=0) as stream:
        for offset, length in _slices(rng, os.fstat(source).st_size):
            done = 0
            while done < length:  # an error behind the first pages gives those, then itself
                got = os.pread(stream.fileno(), length - done, offset + done)
                _compare(got, source, offset + done, len(got) or length - done, str(path))
                done += len(got)


def by_direct(path: Path, source: int, rng: random.Random) -> None:
    """O_DIRECT; what the kernel does not read so is read through the page cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(-1, _SLICE) as buffer:
            for offset, length in _slices(rng, os.fstat(source).st_size):
                count = min(os.preadv(fd, [buffer], offset), length)
                if count < length and not count % _PAGE:
                    os.preadv(fd, [mmap.mmap(-1, _PAGE)], offset + count)  # the error, if there was one
                _compare(buffer[:count], source, offset, count or length, str(path))
    finally:
        os.close(fd)


def by_sendfile(path: Path, source: int, rng: random.Random) -> None:
    into = os.memfd_create("sendfile")
    try:
        with open(path, "rb", buffering=0) as stream:
            for offset, length in _slices(rng, os.fstat(source).st_size):
                os.lseek(into, 0, os.SEEK_SET)
                sent = 0
                while sent < length:
                    count = os.sendfile(into, stream.fileno(), offset + sent, length - sent)
                    if not count:
                        break
                    sent += count
                _compare(os.pread(into, sent, 0), source, offset, length, str(path))
    finally:
        os.close(into)


def by_mmap(path: Path, source: int, rng: random.Random) -> None:
    """In a child, since an error is a SIGBUS there."""
    pieces = _slices(rng, os.fstat(source).st_size)
    child = os.fork()
    if not child:
        status = 2
        try:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                same = all(mapped[o : o + n] == os.pread(source, n, o) for o, n in pieces)
                status = 0 if same else 1
        except OSError:
            status = 2
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 1:
        raise WrongBytesError(f"{path}: mapped")
    if code:
        raise OSError(errno.EIO, "mapped")


def by_exec(path: Path, source: int, rng: random.Random) -> None:
    """Run the image's program. A wrong byte in its code may do anything: only its right output counts."""
    root = Path(str(path)[: -len(TOOL)])
    expected = _output_of(os.readlink(f"/proc/self/fd/{source}"))  # noqa: PTH115
    try:
        done = subprocess.run([root / TOOL], capture_output=True)
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            raise WrongBytesError(f"{path}: executed, {error}") from None
        raise
    if done.returncode in (-signal.SIGBUS, -signal.SIGKILL, -signal.SIGSEGV):
        # Pages that could not be read: in exec(2) itself the kernel makes a SIGSEGV of it. Wrong ones would be cached.
        with open(path, "rb", buffering=0) as stream:
            for offset in range(0, os.fstat(source).st_size, _PAGE):
                got = os.pread(stream.fileno(), _PAGE, offset)
                _compare(got, source, offset, len(got), f"{path} after {done.returncode}")
        raise OSError(errno.EIO, "executed")
    if done.returncode or done.stdout != expected:
        raise WrongBytesError(f"{path}: executed: {done.returncode} {done.stdout!r}")


@functools.cache
def _output_of(program: str) -> bytes:
    return subprocess.run([program], capture_output=True, check=True).stdout


_CALLS = dict(zip(METHODS, (by_read, by_mmap, by_direct, by_sendfile, by_exec), strict=True))


def _begin(board: Board, number: int, row: Row, began: float) -> bool:
    """Say that an operation begins; false if a pause began meanwhile: who paused may have seen that nothing goes on."""
    board[number] = row._replace(since=began)
    if board.paused:
        board[number] = row
        return False
    return True


def run(board: Board, number: int, spec: list[tuple[str, str, str, list[str]]]) -> None:
    rng = random.Random(number)
    while not select.select([0], [], [], rng.uniform(0, _PAUSE))[0]:
        if board.paused:
            continue
        mount, form, tree, paths = rng.choice(spec)
        method = METHODS[(number + rng.randrange(2)) % len(METHODS)]
        path = TOOL if method == "exec" else rng.choice(paths)
        row = board[number]
        began, kills = time.monotonic(), board.kills
        if not _begin(board, number, row, began):
            continue
        changes: dict[str, int] = {method: getattr(row, method) + 1}
        source = os.open(Path(tree, path), os.O_RDONLY)
        try:
            _CALLS[method](Path(mount, path), source, rng)
        except WrongBytesError as error:
            print(f"{form} {method}: {error}", flush=True)
            name = f"wrong_{form}"
            changes[name] = getattr(row, name) + 1
        except OSError as error:
            print(f"{form} {method}: {path}: {error}, {began:.1f} to {time.monotonic():.1f}", flush=True)
            changes["errors"] = row.errors + 1
        finally:
            os.close(source)
        board[number] = row._replace(since=began, **changes)  # before it can be seen that nothing goes on
        board[number] = row = row._replace(since=0.0, **changes)
        if (took := time.monotonic() - began) > row.longest:
            board[number] = row._replace(longest=took, kills=board.kills - kills)


def fork_readers(board: Board, spec: list[tuple[str, str, str, list[str]]]) -> int:
    """Run them all; how many ended otherwise than they should."""
    children = []
    for number in range(board.readers):
        child = os.fork()
        if not child:
            status = 1
            try:
                run(board, number, spec)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(min(1, fork_readers(Board(Path(sys.argv[1]), int(sys.argv[2])), json.loads(sys.argv[3]))))
