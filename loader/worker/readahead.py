"""What to fetch before it is asked for.

A byte that is fetched in vain costs as much as one that is needed, so each way of guessing is judged by what became
of its guesses, also of those that were not followed, and is followed only while most of them come true:

    whole      a file of a few frames is read at all: all of it
    package    two frames of a directory of modules are read: the rest of it
    near       READs close to others in a large file: the frame behind, or frames on both sides
    companion  byte code is read: its source
    stream     READs follow each other: the next frames, as far as the link needs to stay busy or as much again as
               this reader has read already, in steps that make large ranges
    scan       most of what lies before a frame in the blob was read: all of a tree is, file after file, as tar or a
               search does; what lies behind, whichever files that is
    rest       a third of a blob was read: all of it, as readers go on (bounded by itself, and not judged)

Groups, packages and companions come from the image (erofs_builder/hints.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass

from erofs_builder.hints import NO_HINTS, Hints
from loader.cache.files import CacheFile
from loader.worker.follows import Follows
from loader.worker.link_estimate import LinkEstimate
from loader.worker.rest import Rest
from loader.worker.scan import Scan

MAX_STREAMS = 64  # sequential readers remembered per worker
FIRST_WINDOW = 16 << 10  # bytes ahead of a new stream: one frame, mostly
LEAST_LIMIT = 64 << 10  # bytes that any stream may grow to
WHOLE_LIMIT = 256 << 10  # encoded bytes of a file that is fetched whole
NEAR = 8  # frames on either side that count as close
CLOSE = 2  # of these read, the next frame is expected
DENSE = 4  # of these read, two frames on either side are expected instead of the next one
STREAM_START = 5  # READs in a row, outside of a known file, that make a stream
SCAN_LIMIT = 2 << 20  # bytes ahead of a scan, or as many as the link needs
MEMORY = 256  # READs after which a guess that has not come true was wrong
FOLLOWED = 0.65  # share of guesses that must come true

Key = tuple[CacheFile, int]


class Judge:
    """Keeps the score of one way of guessing. `hits` and `misses` are what it starts with."""

    def __init__(self, hits: float, misses: float) -> None:
        self._hits = hits
        self._misses = misses
        self._open: dict[Key, int] = {}
        self._order: deque[Key] = deque()

    @property
    def trusted(self) -> bool:
        return self._hits >= FOLLOWED * (self._hits + self._misses)

    def guess(self, key: Key, now: int) -> None:
        """A frame that nobody has read yet is expected to be read."""
        if key not in self._open:
            self._open[key] = now
            self._order.append(key)

    def read(self, key: Key) -> None:
        """A frame is read."""
        if self._open.pop(key, None) is not None:
            self._count(1, 0)

    def forget(self, now: int) -> None:
        """Count guesses that are too old as wrong."""
        while self._order:
            made = self._open.get(self._order[0])
            if made is not None and now - made < MEMORY:
                break
            if self._open.pop(self._order.popleft(), None) is not None:
                self._count(0, 1)

    def drop(self, file: CacheFile) -> None:
        """The file was closed: what was guessed of it comes neither true nor wrong."""
        self._open = {key: made for key, made in self._open.items() if key[0] is not file}
        self._order = deque(key for key in self._order if key[0] is not file)

    def _count(self, hits: int, misses: int) -> None:
        self._hits += hits
        self._misses += misses
        if self._hits + self._misses > 128:  # what was long ago counts less
            self._hits /= 2
            self._misses /= 2


@dataclass(slots=True)
class _Stream:
    """A sequential reader: READs in a row, their encoded bytes, bytes to be ahead of it, where what was asked ends."""

    row: int = 0
    read: int = 0
    window: int = 0
    asked: int = 0


class ReadAhead:
    """Guesses for all cache files of a worker. Thread-safe."""

    def __init__(self, link: LinkEstimate, limit: int, rest: bool = True) -> None:
        """`limit`: bytes ahead of one reader; 0: the rest of a blob is not fetched either, `rest` or not."""
        self._link = link
        self._limit = limit
        self._rest = rest and limit > 0
        self._pays = True
        self._lock = threading.Lock()
        self._clock = 0
        self._streams: OrderedDict[Key, _Stream] = OrderedDict()  # by the frame that is to be read next
        self._read: dict[CacheFile, dict[int, int]] = {}  # frame → when it was read first
        self._scans: dict[CacheFile, Scan] = {}
        self._rests: dict[CacheFile, Rest] = {}
        self._listed: dict[bytes, frozenset[int]] = {}
        self._followers: dict[CacheFile, dict[int, list[Follows]]] = {}
        self._hints: dict[bytes, tuple[int, Hints]] = {}
        self._idle: set[bytes] = set()  # blobs in these two that had no open file when that was looked at last
        self._judges = {
            "whole": Judge(8, 0),
            "package": Judge(8, 0),
            "near": Judge(8, 0),
            "stream": Judge(8, 0),
            "companion": Judge(0, 1),  # most Pythons do not read sources: only once it was seen here
            "scan": Judge(0, 16),  # a start reads some of what lies together, and nothing more
        }

    def learn(self, blob: bytes, frames: int, hints: Hints) -> None:
        """Hints about a blob (its raw digest) of so many frames."""
        with self._lock:
            self._hints[blob] = frames, hints

    def expect(self, blob: bytes, frames: Iterable[int]) -> None:
        """A list has what a start reads of a blob (its raw digest): near that, nothing more is needed."""
        with self._lock:
            self._listed[blob] = frozenset(frames)

    def keep(self, blobs: set[bytes]) -> None:
        """Only these have open files: forget what was told of others, which had none at the last call either.

        (Once is not enough: a file that is open now may not have been when its caller looked.)
        """
        with self._lock:
            idle = (self._hints.keys() | self._listed.keys()) - blobs
            for blob in idle & self._idle:
                self._hints.pop(blob, None)
                self._listed.pop(blob, None)
            self._idle = idle

    def rest_pays(self, pays: bool) -> None:
        """Whether files that are whole lose their marks, and there is room for them."""
        self._pays = pays

    def follow(self, file: CacheFile, frame: int, follows: list[Follows]) -> None:
        """Once a frame is read, others are, of any file: a plug-in's libraries. What was told before of it is over."""
        with self._lock:
            self._followers.setdefault(file, {})[frame] = follows

    def followers(self, file: CacheFile, frames: range) -> list[Key]:
        """What follows these frames, told once."""
        known = self._followers.get(file)
        if not known:
            return []
        with self._lock:
            told = [each for frame in frames for each in known.pop(frame, ())]
            return [key for each in told if not any(map(self._was_read, each.unless)) for key in each.others]

    def _was_read(self, key: Key) -> bool:
        return key[1] in self._read.get(key[0], ())

    def reads(self, file: CacheFile) -> dict[int, int]:
        """Frames of a file that were read since it was opened, with the moment of the first time (larger is later)."""
        with self._lock:
            return dict(self._read.get(file, ()))

    def after(self, file: CacheFile, frames: range) -> list[int]:
        """A reader wants `frames`: which others to fetch."""
        with self._lock:
            read = self._read.setdefault(file, {})
            if all(frame in read for frame in frames) and not self._moves_stream(file, frames):
                return []  # mostly: a frame holds many small files, and each of them is read
            self._clock += 1
            fresh = sum(file.table.frame_encoded_size(frame) for frame in frames if frame not in read)
            for frame in frames:
                read.setdefault(frame, self._clock)
                for judge in self._judges.values():
                    judge.read((file, frame))
            if file.ready.complete:
                return []
            hints = self._hints_of(file)
            listed = self._listed.get(file.blob.raw)
            if listed and listed.issuperset(frames):
                return []
            chosen: dict[int, None] = {}
            guesses = {
                "whole": self._whole(file, frames, hints),
                "package": self._package(frames, hints, read),
                "near": self._near(frames, hints, read),
                "companion": [other for frame in frames for other in hints.companions.get(frame, ())],
                "stream": self._stream(file, frames, hints),
                "scan": self._scan(file, frames, hints, read),
            }
            for name, guessed in guesses.items():
                if guessed:
                    chosen.update(self._judged(self._judges[name], file, guessed, read))
            if self._rest and self._pays and file.trusted:  # a cachefiles object has no mark to lose
                chosen.update(dict.fromkeys(self._rest_of(file).after(fresh, read, file.ready)))
        return list(chosen)

    def _moves_stream(self, file: CacheFile, frames: range) -> bool:
        """Whether a sequential reader passes over frames that were read before."""
        return any((file, frame) in self._streams for frame in frames)

    def _hints_of(self, file: CacheFile) -> Hints:
        """None if they were of another frame table."""
        frames, hints = self._hints.get(file.blob.raw, (0, NO_HINTS))
        return hints if frames == len(file.table) else NO_HINTS

    def _judged(self, judge: Judge, file: CacheFile, frames: Iterable[int], read: Container[int]) -> dict[int, None]:
        judge.forget(self._clock)
        fresh = [frame for frame in frames if frame not in read]
        for frame in fresh:
            judge.guess((file, frame), self._clock)
        return dict.fromkeys(fresh) if judge.trusted else {}

    def _whole(self, file: CacheFile, frames: range, hints: Hints) -> list[int]:
        table = file.table
        guessed: list[int] = []
        for frame in frames:
            group = hints.groups.get(frame)
            if group is None:
                continue
            last = table[group.stop - 1]
            if last.encoded_offset + last.encoded_size - table[group.start].encoded_offset <= WHOLE_LIMIT:
                guessed += [*range(frame + 1, group.stop), *range(group.start, frame)]
        return guessed

    def _package(self, frames: range, hints: Hints, read: Container[int]) -> list[int]:
        guessed: list[int] = []
        for frame in frames:
            for package in hints.packages.get(frame, ()):
                if any(other in read for other in package if other not in frames):
                    guessed += [other for other in package if other != frame]
        return guessed

    def _near(self, frames: range, hints: Hints, read: Container[int]) -> list[int]:
        guessed: list[int] = []
        for frame in frames:
            group = hints.groups.get(frame)
            if group is None:
                continue
            close = range(max(group.start, frame - NEAR), min(group.stop, frame + NEAR + 1))
            count = sum(other in read for other in close if other not in frames)
            for step in range(1, 1 + (count >= CLOSE) + (count >= DENSE)):
                sides = (frame + step, frame - step) if count >= DENSE else (frame + step,)
                guessed += [other for other in sides if other in group]
        return guessed

    def _stream(self, file: CacheFile, frames: range, hints: Hints) -> range:
        """The frames behind a sequential reader, inside of the file that it reads if that is known."""
        group = hints.groups.get(frames.stop - 1)
        table, stop = file.table, frames.stop
        passed = [self._streams.pop((file, frame)) for frame in reversed(frames) if (file, frame) in self._streams]
        again = self._streams.pop((file, stop), None)  # the same frame again: a frame is larger than most READs
        stream = passed[0] if passed else again or _Stream()
        if passed or again is None:
            stream.row += 1
            stream.read += table.encoded_size_of(frames)
            if stream.row >= (2 if group else STREAM_START):
                most = max(2 * self._link.in_flight, LEAST_LIMIT, stream.read)
                stream.window = min(max(2 * stream.window, FIRST_WINDOW), most, self._limit)
        self._streams[file, stop] = stream
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        begin = max(stream.asked, stop)
        ahead = table.encoded_size_of(range(stop, begin))
        if 2 * ahead > stream.window:
            return range(0)
        end, asked = group.stop if group else len(table), begin
        while asked < end and ahead < stream.window:
            ahead += table.frame_encoded_size(asked)
            asked += 1
        stream.asked = asked
        return range(begin, asked)

    def _rest_of(self, file: CacheFile) -> Rest:
        rest = self._rests.get(file)
        if rest is None:
            rest = self._rests[file] = Rest(file.table)
        return rest

    def _scan(self, file: CacheFile, frames: range, hints: Hints, read: Container[int]) -> list[int]:
        scan = self._scans.setdefault(file, Scan(file.table))
        group = hints.groups.get(frames.stop - 1)  # of its own file others take care
        most = min(max(2 * self._link.in_flight, SCAN_LIMIT), self._limit)
        return scan.after(frames, group.stop if group else frames.stop, read, most)

    def forget(self, file: CacheFile) -> None:
        """The file was closed."""
        with self._lock:
            for key in [key for key in self._streams if key[0] is file]:
                del self._streams[key]
            self._read.pop(file, None)
            self._scans.pop(file, None)
            self._rests.pop(file, None)
            self._followers.pop(file, None)
            for judge in self._judges.values():
                judge.drop(file)
