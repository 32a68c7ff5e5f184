"""The tar reader against other programs' archives, malformed input and its header parser's Python twin."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder import pax, tarstream
from erofs_builder.errors import FormatError, TarError, UnsupportedError
from erofs_builder.hot import parse_tar_header, scan_tar_headers
from erofs_builder.tarstream import TarEntry, TarReader
from tests.support import twins
from tests.support.tars import END, Tar, checked, header, pax_header

ENTRY_FIELDS = [field.name for field in dataclasses.fields(TarEntry) if field.name != "digest"]


def read_all(data: bytes, step: int = 1 << 20) -> list[tuple[TarEntry, bytes]]:
    """Entries with their stored bytes; the stream comes in pieces of `step` bytes."""
    reader = TarReader(iter([data[at : at + step] for at in range(0, len(data), step)]))
    found = []
    for entry in reader:
        stored = sum(length for _, length in entry.segments) if entry.segments is not None else entry.size
        found.append((entry, bytes(reader.read(stored))))
    return found


def only(data: bytes) -> TarEntry:
    ((entry, _),) = read_all(data)
    return entry


# --- the header parser and its twin ---------------------------------------------------------------------------------


@given(
    st.binary(min_size=12, max_size=12),
    st.binary(min_size=8, max_size=8),
    st.sampled_from([b"ustar\x0000", b"ustar  \0", b"\0" * 8]),
    st.binary(max_size=155),
    st.booleans(),
)
def test_header_parser_agrees_with_its_twin(wide: bytes, narrow: bytes, magic: bytes, text: bytes, star: bool) -> None:
    block = bytearray(header(text[:100], magic=magic, size=wide, uid=narrow, devmajor=narrow, link=text[:90]))
    block[345 : 345 + len(text)] = text
    if star:
        block[508:512] = b"tar\0"
    agree(checked(block))


@given(st.binary(min_size=512, max_size=512))
def test_header_parser_agrees_on_noise(block: bytes) -> None:
    agree(block)


@given(st.integers(0, 511), st.integers(0, 255), st.booleans())
def test_header_parser_agrees_on_near_misses(at: int, value: int, right: bool) -> None:
    block = bytearray(header(b"some/name", link=b"target", uid=b"\x80\0\0\0\xff\xff\xff\xff", prefix=b"pre/fix"))
    block[at] = value
    agree(checked(block) if right else bytes(block))


def agree(block: bytes) -> None:
    status, fields = parse_tar_header(block)
    expected, expected_fields = twins.parse_tar_header(block)
    assert status == expected
    if status == 0:
        assert fields == expected_fields


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(b"\x0005xLS")), max_size=90), st.integers(0, 2000))
def test_scanned_headers_are_those_parsed_singly(specs: list[tuple[int, int]], cut: int) -> None:
    data = b""
    expected = []
    for size, kind in specs:
        expected.append(len(data))
        data += header(b"f", bytes([kind]), size=b"%011o\0" % size)
        data += bytes(-(-size // 512) * 512) if kind != ord("5") else b""
    data = (data + END)[: len(data) + len(END) - cut]
    found = scan_tar_headers(data)
    whole = [at for at in expected if at + 512 <= len(data)]
    assert [record[0] for record in found][: len(expected)] == whole[:64]
    for at, status, *fields in found:
        expected_status, expected_fields = parse_tar_header(data[at : at + 512])
        assert status == expected_status
        if status == 0:
            assert tuple(fields) == expected_fields


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"f", b"d/", b"./a/b", b"n" * 100, b""]),
            st.sampled_from(b"0123456\x007SgxL"),
            st.sampled_from([b"00000000000\0", b"00000000005\0", b"00000002000\0", b"\xff" * 12, b"9" * 12]),
            st.sampled_from([b"", b"target"]),
            st.sampled_from([b"", b"pre/fix"]),
        ),
        max_size=12,
    ),
    st.integers(0, 600),
)
def test_entries_at_hand_are_those_read_header_by_header(
    specs: list[tuple[bytes, int, bytes, bytes, bytes]], cut: int
) -> None:
    data = b""
    for name, kind, size, link, prefix in specs:
        data += header(name, bytes([kind]), size=size, link=link, prefix=prefix)
        if kind in b"0\x007SgxL" and size[0] == ord("0"):
            data += b"7 a=b\n".ljust(-(-int(size[:-1], 8) // 512) * 512, b"x")
    data = (data + END)[: len(data) + len(END) - cut]
    whole, pieces = outcome(data, 1 << 20), outcome(data, 512)
    assert whole == pieces


def outcome(data: bytes, step: int) -> tuple[list[tuple[object, ...]], str]:
    """The entries, without the digests that reading ahead gives some of them, and the error that ends them."""
    found: list[tuple[object, ...]] = []
    reader = TarReader(iter([data[at : at + step] for at in range(0, len(data), step)]))
    try:
        for entry in reader:
            body = bytes(reader.read(entry.size)) if entry.segments is None else b""
            assert entry.digest in (None, hashlib.sha256(body).digest())
            found.append((*(getattr(entry, name) for name in ENTRY_FIELDS), body))
    except FormatError as error:
        return found, str(error)
    return found, ""


# --- what other programs write --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 511, 1 << 20])
def test_python_archives(form: int, step: int) -> None:
    tar = Tar(form).add("a", "dir", mtime=5).add("a/file", data=b"x" * 700, uid=1000, gid=7, mode=0o4755)
    tar.add("a/link", "link", linkname="a/file").add("s", "symlink", linkname="a/file")
    tar.add("c", "char", devmajor=5, devminor=300).add("b", "block", devmajor=8, devminor=1).add("p", "fifo")
    tar.add("/".join(["d" * 40] * 5), data=b"long")
    found = read_all(bytes(tar), step)
    names = [entry.name for entry, _ in found]
    assert names == [b"a/", b"a/file", b"a/link", b"s", b"c", b"b", b"p", b"/".join([b"d" * 40] * 5)]
    file, data = found[1]
    assert (file.uid, file.gid, file.mode, file.size, data) == (1000, 7, 0o4755, 700, b"x" * 700)
    assert found[2][0].link == b"a/file"
    assert found[4][0].rdev == (5, 300)
    assert found[7][1] == b"long"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(form: int) -> None:
    long_name, link = "n/" * 200 + "f", "t/" * 300 + "g"
    odd = b"caf\xe9-\xff\xfe".decode(errors="surrogateescape")
    found = read_all(bytes(Tar(form).add(long_name, "symlink", linkname=link).add(odd)))
    assert (found[0][0].name, found[0][0].link) == (long_name.encode(), link.encode())
    assert found[1][0].name == b"caf\xe9-\xff\xfe"


def test_gnu_numbers_beyond_octal() -> None:
    found = only(bytes(Tar(tarfile.GNU_FORMAT).add("f", uid=-2, gid=1 << 31, mtime=-7)))
    assert (found.uid, found.gid, found.mtime) == (-2, 1 << 31, -7)


@pytest.mark.parametrize("size", [8 << 30, (1 << 63) - 1])
def test_huge_sizes(size: int) -> None:
    with pytest.raises(TarError, match="cut off"):
        list(TarReader(iter([header(size=b"\x80" + size.to_bytes(11, "big"))])))


def test_pax_fields() -> None:
    records = {
        "path": b"p\xffq",
        "linkpath": b"x",
        "uid": b"4294967295",
        "gid": b"-3",
        "mtime": b"-1.25",
        "SCHILY.xattr.security.capability": b"\x01\0=\n\xff",
        "LIBARCHIVE.xattr.user.a%3Db": b"AAEC",
        "hdrcharset": b"BINARY",
        "SCHILY.devmajor": b"4000",
        "comment": b"ignored",
    }
    entry = only(pax_header(records) + header(kind=b"3") + END)
    assert (entry.name, entry.link, entry.uid, entry.gid) == (b"p\xffq", b"x", 4294967295, -3)
    assert (entry.mtime, entry.mtime_nsec) == (-2, 750_000_000)
    assert entry.rdev == (4000, 0)
    assert entry.xattrs == {b"security.capability": b"\x01\0=\n\xff", b"user.a=b": b"\0\1\2"}


def test_global_records_hold_until_changed() -> None:
    data = pax_header({"uid": b"7", "mtime": b"3"}, b"g") + header(b"a") + pax_header({"uid": b"8"}) + header(b"b")
    data += pax_header({"uid": b""}, b"g") + header(b"c") + END
    assert [(entry.uid, entry.mtime) for entry, _ in read_all(data)] == [(7, 3), (8, 3), (0, 3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"0", (0, 0)),
        (b"1.5", (1, 500_000_000)),
        (b"-0.5", (-1, 500_000_000)),
        (b"-1", (-1, 0)),
        (b"1.9999999999", (1, 999_999_999)),
        (b"-1.0000000001", (-2, 999_999_999)),
        (b"9223372036854775807.999999999", ((1 << 63) - 1, 999_999_999)),
        (b"-9223372036854775808", (-(1 << 63), 0)),
    ],
)
def test_pax_times(text: bytes, expected: tuple[int, int]) -> None:
    assert pax.parse_time(b"mtime", text) == expected


@pytest.mark.parametrize("text", [b"", b"x", b"1.x", b"1e5", b"--1", b"9223372036854775808", b"1" * 40])
def test_bad_pax_times(text: bytes) -> None:
    with pytest.raises(TarError):
        pax.parse_time(b"mtime", text)


def test_v7_ustar_prefix_and_contiguous() -> None:
    v7 = header(b"old/", b"\0", magic=b"\0" * 8, devmajor=b"garbage!")
    data = v7 + header(b"name", b"7", prefix=b"pre") + header(b"x", b"\0", magic=b"\0" * 8) + END
    kinds = [(entry.name, entry.kind) for entry, _ in read_all(data)]
    assert kinds == [(b"old/", tarstream.DIRECTORY), (b"pre/name", tarstream.REGULAR), (b"x", tarstream.REGULAR)]


def test_links_have_no_data_whatever_their_size_says() -> None:
    data = header(b"l", b"1", size=b"00000001000\0", link=b"t") + header(b"next") + END
    assert [entry.name for entry, _ in read_all(data)] == [b"l", b"next"]


def test_the_end_may_be_missing_or_followed_by_anything() -> None:
    assert len(read_all(header())) == 1
    assert len(read_all(header() + bytes(512))) == 1
    assert len(read_all(header() + END + b"junk" * 1000)) == 1
    assert read_all(b"") == []


# --- sparse ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 islands of data in 8 MiB, the last bytes a hole: more than one extension block of the old format."""
    path = tmp_path_factory.mktemp("sparse") / "file"
    with path.open("wb") as file:
        for index in range(30):
            file.seek(index * 262144 + 4096)
            file.write(hashlib.sha256(bytes([index])).digest() * 128)
        file.truncate(8 << 20)
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=["old-gnu", "0.0", "0.1", "1.0"],
)
def test_gnu_sparse(sparse_file: Path, options: list[str]) -> None:
    command = ["tar", "-C", str(sparse_file.parent), "-cS", *options, sparse_file.name]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(archive) < 1 << 20
    ((entry, stored),) = read_all(archive, 1000)
    assert (entry.name, entry.size) == (b"file", 8 << 20)
    assert expand(entry, stored) == sparse_file.read_bytes()


def test_bsdtar_sparse(sparse_file: Path) -> None:
    command = ["bsdtar", "-C", str(sparse_file.parent), "--format=pax", "-cf", "-", "--read-sparse", sparse_file.name]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    ((entry, stored),) = read_all(archive)
    assert expand(entry, stored) == sparse_file.read_bytes()


def expand(entry: TarEntry, stored: bytes) -> bytes:
    content, at = bytearray(entry.size), 0
    for offset, length in entry.segments or ((0, entry.size),):
        content[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(content)


# --- malformed ------------------------------------------------------------------------------------------------------

_SPARSE_1_0 = {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"100"}


def _sized(body: bytes, kind: bytes = b"0") -> bytes:
    return header(b"f", kind, size=b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


MALFORMED = {
    "not a tar": b"hello world" * 100,
    "a wrong checksum": header()[:-1] + b"x",
    "a number that is none": header(size=b"12x45678901\0"),
    "a negative size": header(size=b"\xff" * 12),
    "a size beyond 63 bits": header(size=b"\x80\0\0" + b"\xff" * 9),
    "half a header": header()[:300],
    "data cut off": header(size=b"00000001000\0") + bytes(100),
    "one zero block": header() + bytes(512) + header(),
    "an extension at the end": pax_header({"path": b"x"}) + END,
    "a long name at the end": _sized(b"name\0", b"L") + END,
    "a PAX header of 1 GiB": header(kind=b"x", size=b"10000000000\0"),
    "a long name of 8 GiB": header(kind=b"L", size=b"77777777777\0"),
    "a PAX record without length": _sized(b"path=x\n", b"x") + header() + END,
    "a PAX record too long": _sized(b"99 path=x\n", b"x") + header() + END,
    "a PAX record of length 0": _sized(b"0 path=x\n", b"x") + header() + END,
    "a PAX record without newline": _sized(b"9 path=xy", b"x") + header() + END,
    "a PAX size that is none": pax_header({"size": b"-1"}) + header() + END,
    "a PAX uid that is none": pax_header({"uid": b"root"}) + header() + END,
    "a base64 xattr that is none": pax_header({"LIBARCHIVE.xattr.user.x": b"*"}) + header() + END,
    "a sparse map with an odd end": pax_header({"GNU.sparse.map": b"1,2,3", "GNU.sparse.size": b"9"}) + header(),
    "a sparse map that overlaps": pax_header({"GNU.sparse.map": b"0,4,2,4", "GNU.sparse.size": b"9"}) + header(),
    "a sparse map beyond the file": pax_header({"GNU.sparse.map": b"8,4", "GNU.sparse.size": b"9"}) + header(),
    "a sparse map without its data": pax_header({"GNU.sparse.map": b"0,4", "GNU.sparse.size": b"9"}) + header(),
    "a sparse map without size": pax_header({"GNU.sparse.map": b"0,4"}) + header(),
    "a 1.0 map that is none": pax_header(_SPARSE_1_0) + _sized(b"x\n" * 256),
    "a 1.0 map that is too long": pax_header(_SPARSE_1_0) + _sized(b"99999999\n" + b"0\n" * 300),
    "a 1.0 map without an end": pax_header(_SPARSE_1_0) + _sized(b"9" * 1024),
    "an old sparse map cut off": header(kind=b"S", magic=b"ustar  \0", sparse=b"0" * 96 + b"\x01" + b"0" * 12),
    "100 extension headers": pax_header({"uid": b"1"}) * 100 + header() + END,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data: bytes) -> None:
    with pytest.raises(TarError):
        read_all(data)


def test_global_records_are_bounded() -> None:
    data = b"".join(pax_header({f"k{index}": b"x" * 100_000}, b"g") + header() for index in range(20))
    with pytest.raises(TarError, match="global"):
        read_all(data)


def test_unknown_types_are_named() -> None:
    with pytest.raises(UnsupportedError, match="'M' of 'vol'"):
        read_all(header(b"vol", b"M"))


def test_every_cut_is_noticed_or_at_a_boundary() -> None:
    data = bytes(Tar().add("a", data=b"x" * 600).add("n" * 150, data=b"y", mtime=1.5))
    whole = [(entry.name, stored) for entry, stored in read_all(data)]
    for end in range(0, len(data), 37):
        try:
            found = [(entry.name, stored) for entry, stored in read_all(data[:end])]
        except TarError:
            continue
        assert found == whole[: len(found)]


@given(st.data())
def test_damage_never_crashes(data: st.DataObject) -> None:
    tar = bytearray(
        pax_header({"GNU.sparse.map": b"0,4,8,1", "GNU.sparse.size": b"9", "SCHILY.xattr.user.a": b"b"})
        + header(b"f", size=b"00000000005\0")
        + b"12345".ljust(512, b"\0")
        + header(b"s", b"S", magic=b"ustar  \0", size=b"00000000005\0", sparse=b"00000000000\x0000000000005\0")
        + b"12345".ljust(512, b"\0")
        + END
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tar) - 1))
        tar[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            block = at // 512 * 512
            tar[block : block + 512] = checked(tar[block : block + 512])
    try:
        read_all(bytes(tar))
    except FormatError as error:
        assert str(error)


def test_a_real_tree_as_tarfile_reads_it(tmp_path: Path) -> None:
    source = Path(os.__file__).parent / "json"
    for form in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        archive = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "-C", str(source.parent), f"--format={form}", "-cf", str(archive), "json"], check=True)
        with tarfile.open(archive) as reference:
            expected = [
                (member.name, member.mode, member.size, (file := reference.extractfile(member)) and file.read() or b"")
                for member in reference
            ]
        found = [
            (entry.name.decode().rstrip("/"), entry.mode, entry.size, stored)
            for entry, stored in read_all(archive.read_bytes())
        ]
        assert found == expected


def test_stream_is_read_to_its_end() -> None:
    stream = io.BytesIO(header() + END + b"junk" * 500_000)
    list(TarReader(iter(lambda: stream.read(4096), b"")))
    assert stream.read() == b""
