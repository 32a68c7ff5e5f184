"""Well-built hostile input: right checksums and lengths around impossible values, through the fuzzers' targets."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cachefiles import wire as cachefiles_wire
from erofs_builder.hot import crc32c
from fanotify import wire as fanotify_wire
from fuzz.layers import sealed_tar
from fuzz.targets import TARGETS
from loader.artifact import ARTIFACT_TYPE, BLOB_TYPE, CONTENTS_TYPE, METADATA_TYPES, PAYLOAD_SIZE_ANNOTATION
from loader.keeper.protocol import CALLS, Kind
from loader.worker.control import _ROUTES

hostile = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.sampled_from([0, 1, 2, 3, 15, 255, 256, 2047, 2048, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
U64 = st.one_of(NUMBERS, st.sampled_from([1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]))
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "linux",
        "../..",
        "/etc/passwd",
        "\0",
        "\ud800",
        "²",
        "٣",
        "sha256:" + "0" * 64,
        "1" * 5000,
        "{}",
        "65536",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    U64,
    st.sampled_from([-1, -(1 << 70), 10**400, 1e308, float("inf"), float("nan")]),
    TEXTS,
    st.text(max_size=8),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def dump(document: object) -> bytes:
    return json.dumps(document).encode()


# --- documents -----------------------------------------------------------------------------------------------------

TYPES = st.sampled_from([BLOB_TYPE, CONTENTS_TYPE, *METADATA_TYPES.values()])
ANNOTATIONS = VALUES | st.dictionaries(
    st.sampled_from([PAYLOAD_SIZE_ANNOTATION, "org.opencontainers.image.ref.name"]), VALUES
)
DESCRIPTORS = VALUES | st.fixed_dictionaries(
    {"mediaType": TYPES | VALUES, "digest": st.just("sha256:" + "0" * 64) | VALUES, "size": U64 | VALUES},
    optional={
        "annotations": ANNOTATIONS,
        "artifactType": VALUES,
        "platform": VALUES
        | st.fixed_dictionaries({"os": VALUES, "architecture": VALUES}, optional={"variant": VALUES}),
    },
)


@hostile
@given(VALUES | st.lists(DESCRIPTORS, max_size=4), DESCRIPTORS, ANNOTATIONS)
def test_artifact(layers: Any, subject: Any, annotations: Any) -> None:
    document = {"artifactType": ARTIFACT_TYPE, "layers": layers, "subject": subject, "annotations": annotations}
    TARGETS["artifact"](dump(document))


@hostile
@given(VALUES | st.lists(DESCRIPTORS, max_size=4))
def test_index(manifests: Any) -> None:
    TARGETS["index"](dump({"manifests": manifests}))


@hostile
@given(
    st.sampled_from(sorted(CALLS)),
    st.dictionaries(st.sampled_from(["token", "object", "path", "form", "size", "mode"]), VALUES),
)
def test_calls_of_a_worker(call: str, arguments: dict[str, Any]) -> None:
    TARGETS["keeper"](bytes((Kind.CALL,)) + dump({"call": call, **arguments}))


@hostile
@given(
    st.dictionaries(
        st.sampled_from(["target", "objects", "devices", "options", "lazy", "source", "fsid", "token"]), VALUES
    )
)
def test_mounts_of_a_worker(arguments: dict[str, Any]) -> None:
    for call in ("mount", "umount"):
        TARGETS["keeper"](bytes((Kind.CALL,)) + dump({"call": call, **arguments}))


@hostile
@given(st.sampled_from(sorted(_ROUTES)), st.data(), st.sampled_from([None, "0", "-1", "²", "9" * 5000, "7"]))
def test_control(route: tuple[str, str], data: st.DataObject, length: str | None) -> None:
    names = st.sampled_from([*_ROUTES[route][1], "image", "other"])
    body = dump(data.draw(st.dictionaries(names, VALUES, max_size=4) | VALUES))
    head = f"{route[0]} {route[1]} HTTP/1.1\r\nContent-Length: {length or len(body)}\r\n\r\n".encode(
        "latin-1", "ignore"
    )
    TARGETS["control"](head + body)


# --- tables --------------------------------------------------------------------------------------------------------


@hostile
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5), U64, U64, NUMBERS | st.none())
def test_frame_table(frames: list[tuple[int, int]], blob_size: int, decoded_size: int, count: int | None) -> None:
    number = len(frames) if count is None else count & 0xFFFFFFFF
    head = struct.pack("<8sHHIQQ32s", b"EROFSFT\1", 1, 32, number, blob_size, decoded_size, bytes(32))
    columns = b"".join(struct.pack("<H", pair[which] & 0xFFFF) for which in (0, 1) for pair in frames)
    TARGETS["frame-table"](head + columns + bytes(32 * len(frames)) + bytes(4))


@hostile
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4), NUMBERS | st.none(), NUMBERS | st.none())
def test_contents(pieces: list[tuple[int, int, int]], blobs: int | None, count: int | None) -> None:
    head = struct.pack("<8sHHI", b"EROFSCI\1", 1, 0, 1 if blobs is None else blobs & 0xFFFFFFFF)
    head += struct.pack("<32sI", bytes(32), len(pieces) if count is None else count & 0xFFFFFFFF)
    columns = [struct.pack("<I", piece[which] & 0xFFFFFFFF) for which in (0, 1) for piece in pieces]
    columns += [struct.pack("<H", piece[2] & 0xFFFF) for piece in pieces]
    TARGETS["contents"](head + b"".join(columns) + bytes(32 * len(pieces)) + bytes(4))


@hostile
@given(NUMBERS, U64, U64, U64, st.binary(max_size=200))
def test_payload(tables: int, erofs_size: int, tables_size: int, hints_size: int, body: bytes) -> None:
    sizes = (erofs_size, tables_size, hints_size)
    head = struct.pack("<8sHBBIQQQ4s", b"EROFSMD\1", 1, 1, 0, tables & 0xFFFFFFFF, *sizes, bytes(4))
    data = bytes(65536) + body + bytes(-(len(body) + 48) % 65536) + head
    TARGETS["payload"](data + struct.pack("<I", crc32c(head)))


OFFSETS = st.integers(1024, 1400) | st.integers(1152, 16384)
PATCHES = st.lists(st.tuples(OFFSETS, NUMBERS | st.integers(0, 1 << 32), st.sampled_from([1, 2, 4])), max_size=6)


@hostile
@given(st.booleans(), PATCHES)
def test_erofs(encoded: bool, patches: list[tuple[int, int, int]]) -> None:
    data = b"\xff" if encoded else b"\0"
    for offset, value, size in patches:
        data += struct.pack("<HB", offset, size - 1) + (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    TARGETS["erofs"](data)


# --- layers --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [b"", b"a", b"a/b", b"../x", b"/abs", b"a/../../b", b".wh.a", b"a/.wh..wh..opq", b"n" * 100, b"."]
)
FIELDS = st.sampled_from(
    [b"0000000\0", b"0000010\0", b"\xff" * 8, b"\x80" + bytes(6) + b"\x09", b"77777777", b"  12 \0 \0"]
)
SIZES = st.sampled_from([b"00000000000\0", b"00000000005\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0"])
KEYS = st.sampled_from(
    [
        "path",
        "linkpath",
        "size",
        "uid",
        "mtime",
        "GNU.sparse.map",
        "GNU.sparse.size",
        "GNU.sparse.major",
        "GNU.sparse.realsize",
        "GNU.sparse.offset",
        "GNU.sparse.numbytes",
        "SCHILY.xattr.user.a",
        "LIBARCHIVE.xattr.b",
    ]
)
PAX_VALUES = st.sampled_from(
    ["", "0", "1", "5", "-1", "9223372036854775807", "1e9", "0,5", "0,3,1,2", "a/b", "../" * 9, "="]
)
PAX = st.lists(st.tuples(KEYS, PAX_VALUES), max_size=5)
MEMBERS = st.tuples(NAMES, NAMES, st.sampled_from(b"\x0001234567xgLKSD"), SIZES, FIELDS, PAX)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 2 if len(rest) < 98 else len(rest) + 3
    return str(length).encode() + rest


def block(name: bytes, link: bytes, kind: int, size: bytes, field: bytes) -> bytes:
    head = bytearray(512)
    head[:100] = name.ljust(100, b"\0")
    for at in (100, 108, 116, 329, 337):
        head[at : at + 8] = field
    head[124:136], head[136:148] = size, b"00000000000\0"
    head[156] = kind
    head[157:257] = link.ljust(100, b"\0")
    head[257:265] = b"ustar\x0000"
    return bytes(head)


@hostile
@given(st.lists(MEMBERS, max_size=5))
@example([(b"a", b"", ord("0"), b"00000000000\0", b"0000000\0", [("size", "9223372036854775807")])])
def test_layer(members: list[tuple[bytes, bytes, int, bytes, bytes, list[tuple[str, str]]]]) -> None:
    data = b""
    for name, link, kind, size, field, pax in members:
        records = b"".join(record(*pair) for pair in pax)
        if records:
            data += block(b"pax", b"", ord("x"), b"%011o\0" % len(records), b"0000000\0")
            data += records + bytes(-len(records) % 512)
        data += block(name, link, kind, size, field) + (b"hello".ljust(512, b"\0") if size[10:11] == b"5" else b"")
    for target in ("tar", "layer", "docker-archive"):
        TARGETS[target](sealed_tar(data + bytes(1024)))


# --- sockets and kernel --------------------------------------------------------------------------------------------

STATUSES = st.integers(0, 11)
HEADER_VALUES = st.sampled_from(
    [
        b"bytes 3-6/100",
        b"bytes 3-6/*",
        b"bytes 9-1/0",
        b'Bearer realm="https://a.example/t",service="s"',
        b'Bearer realm="http://["',
        b"Basic realm=x",
        b"https://b.example/elsewhere",
        b"http://[",
        b"//\xb2",
        b"file:///etc/passwd",
        b"</v2/a/b/referrers/x>; rel=next",
        b"\xb2",
        b"-1",
        b"Wed, 99 Xyz 99999",
    ]
)
BODIES = st.sampled_from(
    [b"", b"tent", b"content!", b'{"token": "abc"}', b'{"token": 1}', b'{"errors": [[]]}', b"[" * 800]
)
ANSWERS = st.tuples(STATUSES, st.lists(st.tuples(st.integers(0, 6), HEADER_VALUES), max_size=3), BODIES)


@hostile
@given(st.integers(0, 255), st.lists(ANSWERS, max_size=8))
def test_registry(calls: int, answers: list[tuple[int, list[tuple[int, bytes]], bytes]]) -> None:
    data = bytes([calls])
    for status, headers, body in answers:
        data += bytes([status, len(headers)])
        data += b"".join(bytes([name, len(value)]) + value for name, value in headers)
        body += b" " * (-len(body) % 4)
        data += bytes([len(body) // 4]) + body
    TARGETS["registry"](data)


@hostile
@given(NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=40))
def test_fanotify(length: int, metadata_length: int, info_length: int, rest: bytes) -> None:
    info = fanotify_wire.INFO_HEADER.pack(6, 0, info_length & 0xFFFF)
    head = fanotify_wire.METADATA.pack(length & 0xFFFFFFFF, 3, 0, metadata_length & 0xFFFF, 1, -1, 0)
    TARGETS["fanotify"](head + info + rest)
    sound = fanotify_wire.METADATA.pack(28 + len(rest), 3, 0, 24, 1, -1, 0)
    TARGETS["fanotify"](sound + info + rest)


@hostile
@given(st.integers(0, 4), NUMBERS, NUMBERS, st.binary(max_size=40))
def test_cachefiles(opcode: int, volume: int, cookie: int, keys: bytes) -> None:
    body = cachefiles_wire.OPEN.pack(volume & 0xFFFFFFFF, cookie & 0xFFFFFFFF, 5, 0) + keys
    TARGETS["cachefiles"](cachefiles_wire.HEADER.pack(1, opcode, 16 + len(body), 7) + body)
