"""Hints about what is read together: found in a tree, and as a payload brings them along."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder.errors import ArtifactError
from erofs_builder.hints import MAX_PACKAGE, MOST_PACKAGES, Hints, find_hints
from erofs_builder.hints_codec import decode_hints, encode_hints
from erofs_builder.model import Extent, Node
from tests.format_reader import FormatError, parse_hints
from tests.support.cache_files import sample, table_of

FRAMES = 40
BLOB = sample(FRAMES)
TABLE = table_of(BLOB)


def _file(*frames: int) -> Node:
    return Node(0o100644, size=4096 * len(frames), extents=tuple(Extent(BLOB.blob, frame, 0, 4096) for frame in frames))


def _directory(**children: Node) -> Node:
    return Node(0o040755, children={name.encode().replace(b"_dot_", b"."): node for name, node in children.items()})


def _hints(root: Node) -> Hints:
    (found,) = find_hints(root, [TABLE])
    assert decode_hints(encode_hints([found], [TABLE]), [TABLE]) == [found]
    return found


def test_a_file_of_frames_of_its_own_is_a_group() -> None:
    scattered = _file(9, 11)
    with_hole = Node(0o100644, size=12288, extents=(*_file(20).extents, Extent(None, 0, 0, 4096), *_file(21).extents))
    found = _hints(_directory(large=_file(3, 4, 5), small=_file(7), scattered=scattered, with_hole=with_hole))
    assert found.groups == {3: range(3, 6), 4: range(3, 6), 5: range(3, 6), 20: range(20, 22), 21: range(20, 22)}


def test_modules_of_a_directory_are_a_package() -> None:
    package = _directory(a_dot_js=_file(1), b_dot_js=_file(8), c_dot_js=_file(1), text=_file(5))
    found = _hints(_directory(package=package, alone=_directory(d_dot_js=_file(9))))
    assert found.packages == {1: ((1, 8),), 8: ((1, 8),)}


def test_a_large_directory_is_no_package() -> None:
    modules = {f"m{number}_dot_pm": _file(number) for number in range(MAX_PACKAGE + 1)}
    assert _hints(_directory(**modules)).packages == {}


def test_sources_are_companions_of_their_byte_code() -> None:
    cache = Node(0o040755, children={b"m.cpython-311.pyc": _file(30), b"n.cpython-311.pyc": _file(2)})
    found = _hints(_directory(__pycache__=cache, m_dot_py=_file(4), n_dot_py=_file(33)))
    assert found.companions == {2: (33,), 30: (4,)}


def test_an_image_without_any_has_a_payload_that_says_so() -> None:
    assert encode_hints([], []) == b"\x01"
    assert encode_hints([Hints(), Hints()], [TABLE, TABLE]) == b"\x01" + bytes(6)
    assert decode_hints(b"\x01\0\0\0", [TABLE]) == [Hints()]


FRAME = st.integers(0, FRAMES - 1)
GROUPS = st.dictionaries(st.integers(0, FRAMES - 2), st.integers(2, 3), max_size=FRAMES)
PACKAGES = st.sets(st.sets(FRAME, min_size=2, max_size=MAX_PACKAGE).map(lambda each: tuple(sorted(each))), max_size=9)
COMPANIONS = st.dictionaries(FRAME, st.lists(FRAME, min_size=1, max_size=3).map(tuple), max_size=FRAMES)


@given(st.lists(st.tuples(GROUPS, PACKAGES, COMPANIONS), max_size=3))
def test_another_reader_finds_the_same(
    blobs: list[tuple[dict[int, int], set[tuple[int, ...]], dict[int, tuple[int, ...]]]],
) -> None:
    hints = []
    for firsts, packages, companions in blobs:
        each = Hints(companions=dict(sorted(companions.items())))
        for first, count in sorted(firsts.items()):
            group = range(first, min(FRAMES, first + count))
            each.groups.update(dict.fromkeys(group, group))
        by_frame: dict[int, tuple[tuple[int, ...], ...]] = {}
        for package in sorted(packages):
            for frame in package:
                by_frame[frame] = (*by_frame.get(frame, ()), package)
        each.packages.update(by_frame)
        hints.append(each)
    data = encode_hints(hints, [TABLE] * len(hints))
    assert data
    parsed = parse_hints(data, [FRAMES] * len(hints))
    assert decode_hints(data, [TABLE] * len(hints)) == hints
    for each, read in zip(hints, parsed, strict=True):
        assert set(read.groups) == {(group.start, len(group)) for group in each.groups.values()}
        assert set(read.packages) == {package for known in each.packages.values() for package in known}
        assert read.companions == each.companions


MALFORMED = {
    "empty": b"",
    "another version": b"\x02\0\0\0",
    "cut off": b"\x01\x01\x03",
    "a number of more than 32 bits": b"\x01\xff\xff\xff\xff\xff\x01",
    "bytes behind the last one": b"\x01\0\0\0\0",
    "a group beyond the blob": b"\x01\x01\x27\x02\0\0",
    "a group of no frame": b"\x01\x01\x05\0\0\0",
    "a group of one frame": b"\x01\x01\x05\x01\0\0",
    "groups that are not sorted": b"\x01\x02\x05\x03\0\x02\0\0",
    "a group given twice": b"\x01\x02\x05\x03\0\x03\0\0",
    "more groups than frames can be in": b"\x01\x05" + b"\0\x28" * 5 + b"\0\0",
    "a frame in 33 packages": b"\x01\0\x21" + b"".join(bytes((2, 0, step)) for step in range(1, 34)) + b"\0",
    "a package given twice": b"\x01\0\x02\x02\0\x01\x02\0\x01\0",
    "a package of one frame": b"\x01\0\x01\x01\x03\0",
    "a frame given twice": b"\x01\0\x01\x02\x03\0\0",
    "companions given twice": b"\x01\0\0\x02\x02\x01\x02\0\x01\x02",
    "too large": b"\x01\0\0\0" + bytes(16 * FRAMES),
    "a package of too many": b"\x01\0\x01\x11" + b"\x01" * 17 + b"\0",
    "a package beyond the blob": b"\x01\0\x01\x02\x01\x27\0",
    "a companion before the blob": b"\x01\0\0\x01\x02\x01\x05",
    "a companion beyond the blob": b"\x01\0\0\x01\x02\x01\x7e",
    "four companions": b"\x01\0\0\x01\x02\x04\x02\x02\x02\x02",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_hints_are_refused(what: str) -> None:
    with pytest.raises(ArtifactError, match="hints"):
        decode_hints(MALFORMED[what], [TABLE])
    if MALFORMED[what]:
        with pytest.raises(FormatError, match="hints"):
            parse_hints(MALFORMED[what], [FRAMES])


def test_a_frame_is_in_few_packages_and_small_ones_come_first() -> None:
    packages = {f"p{number}": _directory(a_dot_js=_file(0), b_dot_js=_file(number + 1)) for number in range(39)}
    large = _directory(**{f"m{number}_dot_js": _file(number) for number in range(5)})
    found = _hints(_directory(large=large, **packages))
    assert len(found.packages[0]) == MOST_PACKAGES
    assert all(len(package) == 2 for package in found.packages[0])


def test_hints_that_would_be_too_large_are_none() -> None:
    companions = dict.fromkeys(range(FRAMES), (1, 2, 3))
    small = encode_hints([Hints(companions={**companions})], [TABLE])
    packages = {tuple(sorted({a, b, *range(20, 34)})) for a in range(10) for b in range(10, 20)}
    by_frame = dict.fromkeys(range(20), tuple(packages))
    assert small and not encode_hints([Hints(packages=by_frame)], [TABLE])
