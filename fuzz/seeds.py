"""Seeds: a few well-formed inputs for each target, made by the code that writes them, or by tarfile, gzip and zstd."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import zstandard

from erofs_builder.contents import Contents, encode_contents
from erofs_builder.digest import Digest
from erofs_builder.frame_list import encode_frames
from erofs_builder.frames import FrameTable
from erofs_builder.hints import Hints
from erofs_builder.hints_codec import encode_hints
from erofs_builder.page_trace import PageRun, encode_page_trace
from erofs_builder.payload import ALIGNMENT, Form, device_tag, encode_payload
from fanotify import wire
from loader.artifact import BLOB_TYPE, CONTENTS_TYPE, METADATA_TYPES, PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.keeper.protocol import Answer, Kind, Request, pack_answer, pack_json, pack_request
from loader.registry.base import Descriptor
from loader.registry.documents import encode_index
from loader.trace import encode_trace

FINDS = Path(__file__).parent.parent / "tests/assets/fuzz"
_DIGEST = Digest.of(b"content")


def _table(frames: int = 2) -> FrameTable:
    return FrameTable(_DIGEST, [1] * frames, [3] * frames, bytes(32 * frames))


def _contents() -> bytes:
    found = Contents()
    found.append(bytes(32), 0, 4096, 100)
    found.append(bytes(range(32)), 1, 0, 8192)
    return encode_contents([(_DIGEST, found), (Digest(bytes(32)), Contents())])


def _payload() -> bytes:
    both = [_table(), _table(1)]
    hints = encode_hints([Hints({0: range(2), 1: range(2)}, {1: (0,)}, {0: ((0, 1),), 1: ((0, 1),)}), Hints()], both)
    whole = encode_payload(Form.ENCODED, bytes(ALIGNMENT), both, hints)
    return both[0].encode() + both[1].encode() + hints + whole[-48:-4]


def _manifest() -> Artifact:
    described = Descriptor(BLOB_TYPE, _DIGEST, 8192)
    size = {PAYLOAD_SIZE_ANNOTATION: str(ALIGNMENT)}
    metadata = {form: Descriptor(METADATA_TYPES[form], _DIGEST, 100, size) for form in Form}
    return Artifact([described], metadata, Descriptor(CONTENTS_TYPE, _DIGEST, 5), described, {"a": "b"})


def _embedding() -> Artifact:
    """A manifest that brings its metadata along."""
    data = zstandard.compress(encode_payload(Form.ENCODED, bytes(ALIGNMENT), []))
    size = {PAYLOAD_SIZE_ANNOTATION: str(2 * ALIGNMENT)}
    described = Descriptor(METADATA_TYPES[Form.ENCODED], Digest.of(data), len(data), size, data=data)
    return Artifact([], {Form.ENCODED: described})


def _index() -> bytes:
    platforms = ({"os": "linux", "architecture": "amd64"}, {"os": "linux", "architecture": "arm64", "variant": "v8"})
    tag = {"org.opencontainers.image.ref.name": "tag"}
    return encode_index([Descriptor("m", Digest.of(bytes([n])), n, tag, "t", p) for n, p in enumerate(platforms)])


def tar(format_: int, members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of tarfile's, without the padding to 10 KiB."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
        length = archive.offset
    return buffer.getvalue()[:length] + bytes(1024)


def _member(
    name: str, type_: bytes = tarfile.REGTYPE, body: bytes = b"", **more: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, len(body)
    for key, value in more.items():
        setattr(info, key, value)
    return info, body


def _tars() -> list[bytes]:
    sparse_0 = {"GNU.sparse.map": "0,3,4096,2", "GNU.sparse.size": "9000", "GNU.sparse.name": "s"}
    sparse_1 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000"}
    attributes = {"SCHILY.xattr.user.a": "b", "mtime": "-1.5", "LIBARCHIVE.xattr.user.c": "Yg=="}
    plain = [
        _member("d", tarfile.DIRTYPE, mode=0o755),
        _member("d/f", body=b"hello"),
        _member("d/l", tarfile.SYMTYPE, linkname="../d"),
        _member("d/h", tarfile.LNKTYPE, linkname="d/f"),
        _member("d/.wh.gone"),
        _member("c", tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    long = [_member("n" * 200, body=b"x"), _member("l", tarfile.SYMTYPE, linkname="t" * 200)]
    pax = [_member("p", body=b"abc", pax_headers=attributes), _member("s", body=b"abcde", pax_headers=sparse_0)]
    map_1 = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
    return [
        tar(tarfile.USTAR_FORMAT, plain),
        tar(tarfile.GNU_FORMAT, long),
        tar(tarfile.PAX_FORMAT, pax),
        tar(tarfile.PAX_FORMAT, [_member("s", body=map_1, pax_headers=sparse_1)]),
    ]


def _docker_archive() -> bytes:
    config = json.dumps({"rootfs": {"diff_ids": [str(_DIGEST)]}}).encode()
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["a:b"], "Layers": ["l.tar"]}]).encode()
    index = encode_index([Descriptor("m", Digest.of(config), len(config))])
    members = [("c.json", config), ("l.tar", b"content"), ("manifest.json", manifest), ("index.json", index)]
    members.append((f"blobs/sha256/{Digest.of(config).hex}", config))
    return tar(tarfile.GNU_FORMAT, [_member(name, body=body) for name, body in members])


def _control() -> list[bytes]:
    body = json.dumps({"image": "registry.example/a:b", "target": "/mnt", "form": "encoded"}).encode()
    post = b"POST /v1/mounts HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    prefetch = b'{"image": "a", "paths": ["/x"]}'
    return [
        b"GET /v1/status HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n\r\n",
        b"DELETE /v1/mounts?target=/mnt&lazy=1 HTTP/1.1\r\n\r\n",
        post + body,
        b"POST /v1/prefetch HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(prefetch) + prefetch,
    ]


def _packets() -> list[bytes]:
    mount = {"token": 2, "call": "mount", "target": "/t", "objects": [], "devices": ["a"], "options": []}
    create = {"token": 1, "call": "create", "name": "n", "path": "/p", "form": "encoded", "size": 4096}
    idle = {"token": 4, "call": "idle", "object": 1, "ranges": [[0, 4096], [4096, 8192]]}
    return [
        pack_request(Request(1, 2, 3, 4)),
        pack_json(Kind.CALL, idle),
        pack_answer(Answer(1, 0)),
        pack_json(Kind.OPENED, {"id": 2, "size": 4096}),
        *(pack_json(Kind.CALL, {"token": 3, "call": name}) for name in ("status", "stop", "cull", "umount")),
        pack_json(Kind.CALL, create),
        pack_json(Kind.CALL, mount),
    ]


def _answers() -> list[bytes]:
    ranged = b"\x01\x01\x00\x0dbytes 3-6/100\x01tent"
    manifest = _manifest().encode()
    manifest = manifest[: len(manifest) // 4 * 4]
    login = b'\x02\x01\x01\x3bBearer realm="https://auth.example/token",service="s",scope="x"\0'
    token = b'\x00\x00\x04{"token": "abc"}'
    return [
        b"\x01" + ranged,
        b"\x01" + login + token + ranged,
        b"\xff\x00\x00\x01content!" * 4,
        b"\x02\x00\x00\x02content",
    ]


def _kernel() -> list[bytes]:
    plain = wire.METADATA.pack(24, 3, 0, 24, 1 << 20, 5, 1)
    ranged = wire.METADATA.pack(56, 3, 0, 24, 1 << 20, 5, 1) + wire.INFO_RANGE.pack(6, 0, 32, 0, 4096, 8192)
    return [plain, ranged + bytes(8), ranged[:56] + plain]


def seeds() -> dict[str, list[bytes]]:
    """All seeds by target."""
    tars = _tars()
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    skippable = struct.pack("<II", 0x184D2A50, 4) + bytes(4)
    opening = struct.pack("=IIIIIIII", 1, 0, 48, 7, 8, 8, 5, 0) + b"erofs,a\0" + b"c" * 8
    return {
        "artifact": [_manifest().encode(), _embedding().encode(), b"[" * 3000, Artifact([], {}).encode()],
        "cachefiles": [opening, struct.pack("=IIIIQQ", 1, 2, 32, 7, 0, 4096), struct.pack("=IIII", 1, 1, 16, 7)],
        "compressed-payload": [
            zstd.compress(encode_payload(Form.ENCODED, bytes(ALIGNMENT), [])),
            zstd.compress(bytes(1 << 24)),
        ],
        "contents": [_contents(), encode_contents([])],
        "control": _control(),
        "decompress": [
            gzip.compress(tars[0], mtime=0),
            gzip.compress(b"a", mtime=0) * 2 + bytes(9),
            zstd.compress(tars[0]) + skippable + zstd.compress(b"b"),
            zstd.compress(bytes(1 << 24)),
            b"plain",
        ],
        "docker-archive": [_docker_archive(), *tars],
        "cookie": [f"{_DIGEST.hex}-encoded.2".encode(), device_tag(Form.DECODED, _DIGEST).encode(), b"a\0../../b"],
        "erofs": [b"\0" + struct.pack("<HB", 1060, 3) + bytes(4), b"\xff" + struct.pack("<HB", 4096, 1) + b"ab"],
        "fanotify": _kernel(),
        "frame-table": [_table().encode(), _table(0).encode()],
        "headers": [
            b'Bearer realm="https://a/t",service="s\\"x", Basic realm=b',
            b"120",
            b"Wed, 21 Oct 2026 07:28:00 GMT",
        ],
        "imports": [
            b"import os, a.b as c\nfrom ..x import (y, # z\n  w,\n)\ntry:\n    from . import v\nexcept E:\n\timport u",
            b"if TYPE_CHECKING:\n    import a\nelse:\n    import b, \\\n c; d\ndef f():\n    import e\n",
        ],
        "index": [_index()],
        "keeper": _packets() + [b"\0\n".join(_packets())],
        "layer": tars,
        "notify": [b"FDSTORE=1\nFDNAME=a", b"FDSTOREREMOVE=1\nFDNAME=a\nREADY=1"],
        "packet": _packets(),
        "hints": [b"\x01" + bytes(6), b"\x01\x01\x03\x02\x01\x03\x01\x05\x02\x01\x04\x02\x05\x03" + bytes(3)],
        "payload": [_payload()],
        "reference": [
            b"docker://a.example:5000/b/c:tag@" + str(_DIGEST).encode(),
            b"oci:dir:tag",
            b"docker-archive:f:n",
        ],
        "plane": _kernel() + [_kernel()[1] * 3],
        "plane-cachefiles": [opening, opening + struct.pack("=IIIIQQ", 1, 2, 32, 7, 0, 4096) * 2],
        "range-answer": [
            b"\x09HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nContent-Range: bytes 0-4/9\r\n\r\nabcde",
            b"\x90HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabcdef",
        ],
        "registry": _answers(),
        "tar": tars,
        "tar-headers": tars,
        "trace": [
            b"f" + encode_frames([(0, 1), (0, 2), (3, 0)]).encode(),
            b"w0:5>1:6-7,0:2 1:0!0:3-4,1:9>0:0",
            b"p" + encode_page_trace([PageRun(b"usr/bin/a", 0, 3)]),
            b"r" + encode_trace(Descriptor("m", _DIGEST, 4), encode_frames([(0, 1)]), 0.0),
        ],
    }


def write(directory: Path) -> int:
    """Write them, and earlier finds, below a directory, one directory a target; the number of files."""
    count = 0
    for find in FINDS.glob("*/*"):
        (directory / find.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(find, directory / find.parent.name / find.name)
        count += 1
    for target, inputs in seeds().items():
        (directory / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (directory / target / f"seed-{number}").write_bytes(data)
            count += 1
    return count
