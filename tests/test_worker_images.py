"""A metadata payload is held against its manifest before it is mounted; objects are found by fsid and tag."""

from __future__ import annotations

import errno
import os
import struct
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import zstandard

from erofs_builder.digest import Digest
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import ArtifactError, FormatError, IntegrityError
from erofs_builder.frames import FrameTable
from erofs_builder.hot import crc32c
from erofs_builder.model import Node
from erofs_builder.payload import Form, Payload, decode_payload, device_tag, encode_payload
from loader.artifact import BLOB_TYPE, METADATA_TYPES, PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.cache.files import prepare_blob, store_table
from loader.cache.layout import Layout
from loader.errors import BusyError, UsageError
from loader.registry.base import Descriptor
from loader.worker import mounting
from loader.worker.hints import hints_of
from loader.worker.images import canonical, pinned, repository, wanted, with_digest
from loader.worker.mounting import Mounting, image_fsid
from loader.worker.objects import Objects, StoredMetadata, tags
from loader.worker.payloads import verified_payload
from tests.support.cache_files import table_of
from tests.support.sample_blobs import SampleBlob


def _sample(form: Form) -> tuple[bytes, Artifact, SampleBlob]:
    blob = SampleBlob()
    root = Node(mode=0o040755, children={})
    assert root.children is not None
    large, source, compiled = os.urandom(600_000), b"text" * 300, b"code" * 300
    root.children[b"large"] = Node(mode=0o100644, size=len(large), extents=blob.add_frames(large))
    cache = Node(mode=0o040755, children={})
    root.children[b"__pycache__"] = cache
    assert cache.children is not None
    cache.children[b"m.cpython-311.pyc"] = Node(
        mode=0o100644, size=len(compiled), extents=blob.add_frames(compiled, 8192)
    )
    root.children[b"m.py"] = Node(mode=0o100644, size=len(source), extents=blob.add_frames(source, 8192))
    blob.finish()
    metadata = write_metadata(root, form, [blob.blob])
    table = table_of(blob)
    payload = encode_payload(form, metadata.erofs, [table])
    artifact = Artifact(blobs=[Descriptor(BLOB_TYPE, table.blob_digest, table.blob_size)], metadata={})
    return payload, artifact, blob


def sample_payload(form: Form) -> tuple[bytes, Payload]:
    """A payload, whole and in its parts."""
    data = _sample(form)[0]
    return data, decode_payload(data)


def _descriptor(form: Form, compressed: bytes, size: int | str) -> Descriptor:
    return Descriptor(
        METADATA_TYPES[form], Digest.of(compressed), len(compressed), {PAYLOAD_SIZE_ANNOTATION: str(size)}
    )


@pytest.mark.parametrize("form", list(Form))
def test_a_right_payload_is_taken(form: Form) -> None:
    payload, artifact, blob = _sample(form)
    compressed = zstandard.compress(payload)
    data, unpacked = verified_payload(compressed, _descriptor(form, compressed, len(payload)), artifact, form)
    assert data == payload
    assert [table.blob_digest for table in unpacked.tables] == [table_of(blob).blob_digest]


def test_a_payload_with_another_digest_is_refused() -> None:
    payload, artifact, _ = _sample(Form.ENCODED)
    compressed = zstandard.compress(payload)
    descriptor = replace(_descriptor(Form.ENCODED, compressed, len(payload)), digest=Digest.of(b"other"))
    with pytest.raises(IntegrityError, match="metadata payload"):
        verified_payload(compressed, descriptor, artifact, Form.ENCODED)


@pytest.mark.parametrize("size", ["", "x", "-65536", "65537", "0", str(1 << 40), "٦٥٥٣٦", "196608000"])
def test_a_payload_whose_size_is_wrong_or_huge_is_refused(size: str) -> None:
    payload, artifact, _ = _sample(Form.ENCODED)
    compressed = zstandard.compress(payload)
    with pytest.raises(ArtifactError):
        verified_payload(compressed, _descriptor(Form.ENCODED, compressed, size), artifact, Form.ENCODED)


def test_a_bomb_is_not_unpacked() -> None:
    _, artifact, _ = _sample(Form.ENCODED)
    compressed = zstandard.compress(bytes(256 << 20))
    with pytest.raises(ArtifactError, match="not the 65536 bytes"):
        verified_payload(compressed, _descriptor(Form.ENCODED, compressed, 65536), artifact, Form.ENCODED)


def test_rubbish_is_refused() -> None:
    _, artifact, _ = _sample(Form.ENCODED)
    for rubbish in (b"", b"not zstd", zstandard.compress(bytes(65536))):
        with pytest.raises(FormatError):
            verified_payload(rubbish, _descriptor(Form.ENCODED, rubbish, 65536), artifact, Form.ENCODED)


def test_a_payload_of_the_other_form_is_refused() -> None:
    payload, artifact, _ = _sample(Form.DECODED)
    compressed = zstandard.compress(payload)
    with pytest.raises(ArtifactError, match="form"):
        verified_payload(compressed, _descriptor(Form.ENCODED, compressed, len(payload)), artifact, Form.ENCODED)


def test_blobs_must_be_in_the_manifest_in_their_size() -> None:
    payload, artifact, _ = _sample(Form.ENCODED)
    compressed = zstandard.compress(payload)
    descriptor = _descriptor(Form.ENCODED, compressed, len(payload))
    for blobs in ([], [replace(artifact.blobs[0], size=artifact.blobs[0].size + 4096)]):
        with pytest.raises(ArtifactError, match="does not list blob"):
            verified_payload(compressed, descriptor, replace(artifact, blobs=blobs), Form.ENCODED)


def test_tables_must_be_those_of_the_device_slots() -> None:
    payload, _, _ = _sample(Form.ENCODED)
    other, artifact, blob = _sample(Form.ENCODED)
    mixed = encode_payload(Form.ENCODED, decode_payload(payload).erofs, [table_of(blob)])
    compressed = zstandard.compress(mixed)
    with pytest.raises(IntegrityError, match="device slots"):
        verified_payload(compressed, _descriptor(Form.ENCODED, compressed, len(mixed)), artifact, Form.ENCODED)
    assert other


def test_hints_name_large_files_and_the_sources_of_byte_code() -> None:
    payload, _, blob = _sample(Form.ENCODED)
    (hints,) = hints_of(decode_payload(payload))
    assert blob.blob.table is not None
    assert hints.groups[0] == hints.groups[2] == range(3)
    assert hints.companions == {3: (4,)}


def test_names() -> None:
    digest = Digest.of(b"")
    assert canonical("localhost:5000/a") == "docker://localhost:5000/a:latest"
    assert canonical("oci:some/dir:tag") == f"oci:{Path.cwd()}/some/dir:tag"
    assert repository("docker://localhost:5000/a:latest") == repository(f"docker://localhost:5000/a@{digest}")
    assert with_digest("docker://localhost:5000/a:latest", digest) == f"docker://localhost:5000/a@{digest}"
    assert pinned(f"localhost:5000/a@{digest}")
    assert not pinned("localhost:5000/a:1")
    assert wanted("localhost:5000/a:1") == "1"
    with pytest.raises(UsageError):
        wanted("rootfs:/x")


def test_a_descriptor_of_a_file_that_was_replaced_is_not_served(tmp_path: Path) -> None:
    """The frame table that lies there now is not the one by which that file was filled."""
    layout = Layout(tmp_path)
    layout.prepare()
    table = table_of(_sample(Form.ENCODED)[2])
    objects = Objects(layout, lambda name: None, lambda tag: None)
    key = f"encoded/{table.blob_digest.hex}"
    body = {"object": 7, "plane": "fanotify", "name": key, "complete": False}
    data = prepare_blob(layout, Form.ENCODED, table)
    replaced = os.open(data, os.O_RDWR)
    data.rename(tmp_path / "elsewhere")
    prepare_blob(layout, Form.ENCODED, table)
    objects.add_from_keeper(body, replaced)
    assert objects.get(7) is None
    assert objects.unserved == {key}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(replaced)
    objects.add_from_keeper(body, os.open(data, os.O_RDWR))
    assert objects.get(7) is not None
    assert not objects.unserved


def test_nothing_is_mounted_before_the_keeper_has_said_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "PATIENCE", 0.01)
    known = threading.Event()
    half = cast("Mounting", SimpleNamespace(_all_known=known))
    with pytest.raises(BusyError):
        Mounting._await_objects(half)
    Mounting.begin(half)
    Mounting._await_objects(half)


def test_a_cachefiles_object_that_another_table_has_filled_is_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    table = table_of(_sample(Form.DECODED)[2])
    other = bytearray(table.encode())
    other[68 + 4 * len(table)] ^= 1  # a digest of a frame
    false = FrameTable.decode(bytes(other[:-4]) + struct.pack("<I", crc32c(bytes(other[:-4]))))
    objects = Objects(layout, lambda name: None, tags({table.blob_digest}).get)
    tag = device_tag(Form.DECODED, table.blob_digest)

    def open_object(number: int, volume: str) -> int:
        return objects.add_cachefiles(number, volume, tag, os.open(tmp_path / f"{number}", os.O_RDWR | os.O_CREAT))

    store_table(layout, Form.DECODED, false)
    assert open_object(1, "erofs,a") == table.decoded_size
    objects.close(1)
    store_table(layout, Form.DECODED, table, over=False)
    assert open_object(2, "erofs,a") == table.decoded_size  # the one that is there stays
    objects.close(2)
    store_table(layout, Form.DECODED, table)
    assert open_object(3, "erofs,a") == -errno.EIO
    assert "another image's frame table" in caplog.text
    assert open_object(4, "erofs,b") == table.decoded_size
    assert [file.table.identity for file in objects.files_of(Form.DECODED, table.blob_digest)] == [table.identity]


def test_cachefiles_objects_are_found_by_fsid_and_tag(tmp_path: Path) -> None:
    payload, _, blob = _sample(Form.DECODED)
    layout = Layout(tmp_path)
    layout.prepare()
    table = table_of(blob)
    store_table(layout, Form.DECODED, table)
    (tmp_path / "payload").write_bytes(payload)
    image = Digest.of(b"image")
    fsid = image_fsid(image, Form.DECODED)
    known = tags({table.blob_digest})
    stored = StoredMetadata(tmp_path / "payload", (tmp_path / "payload").read_bytes)
    objects = Objects(layout, lambda name: stored if name == fsid else None, known.get)
    metadata_fd = os.open(tmp_path / "m", os.O_RDWR | os.O_CREAT)
    assert objects.add_cachefiles(1, "erofs,domain", fsid, metadata_fd) == len(payload)
    item = objects.get(1)
    assert item is not None
    assert item.metadata is not None
    item.metadata.fill()
    assert (tmp_path / "m").read_bytes() == payload
    tag = device_tag(Form.DECODED, table.blob_digest)
    blob_fd = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    assert objects.add_cachefiles(2, "erofs,domain", tag, blob_fd) == table.decoded_size
    (file,) = objects.files_of(Form.DECODED, table.blob_digest)
    file.write(table[0], bytes(blob.decoded[: table[0].decoded_size]))
    assert file.has(0)
    # The kernel opens it again: what it may have thrown away meanwhile is not believed to be there.
    again_fd = os.open(tmp_path / "b", os.O_RDWR)
    assert objects.add_cachefiles(3, "erofs,domain", tag, again_fd) == table.decoded_size
    (again,) = objects.files_of(Form.DECODED, table.blob_digest)
    assert again is not file
    assert again.ready[0]
    assert not again.has(0)
    lost = os.open(tmp_path / "b", os.O_RDWR)
    assert objects.add_cachefiles(4, "erofs,domain", "unknown", lost) == -errno.ENOENT
    for closed in (blob_fd, lost):
        with pytest.raises(OSError):
            os.fstat(closed)
    assert objects.close(3) is again
    assert objects.get(3) is None
