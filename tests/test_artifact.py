"""The artifact's manifest: golden bytes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zstandard

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.payload import Form
from loader.artifact import ARTIFACT_TYPE, BLOB_TYPE, CONTENTS_TYPE, EMBEDDED_MAX, METADATA_TYPES, Artifact
from loader.convert.load import decompress, load_payload
from loader.errors import NotFoundError
from loader.registry.base import Descriptor
from loader.registry.layout import Layout
from tests.support.oci import new_layout, put


def descriptor(media_type: str, number: int) -> Descriptor:
    return Descriptor(media_type, Digest(bytes([number]) * 32), number)


FULL = Artifact(
    blobs=[descriptor(BLOB_TYPE, 1), descriptor(BLOB_TYPE, 2)],
    metadata={form: descriptor(METADATA_TYPES[form], number) for number, form in enumerate(Form, 4)},
    contents=descriptor(CONTENTS_TYPE, 3),
    subject=descriptor("application/vnd.oci.image.manifest.v1+json", 9),
    annotations={"b": "2", "a": "1"},
)


GOLDEN = "sha256:8ae4eec8dd82f431722ffbde329f52fa6ca38631c2c611b51342df6b6c74c440"


def test_round_trip() -> None:
    assert Artifact.decode(FULL.encode()) == FULL
    assert Artifact.decode(Artifact([], {}).encode()) == Artifact([], {})


def test_bytes_do_not_change_silently() -> None:
    # Published artifacts are found by this digest: another encoder would publish every image anew.
    assert str(Digest.of(FULL.encode())) == GOLDEN


def _embedding(data: bytes, text: Any = None) -> Artifact:
    """An artifact as read whose payload's descriptor brings `data` along, or `text` in its place."""
    stored = Descriptor(METADATA_TYPES[Form.ENCODED], Digest.of(data), len(data), data=data)
    document = json.loads(Artifact([], {Form.ENCODED: stored}).encode())
    if text is not None:
        document["layers"][0]["data"] = text
    return Artifact.decode(json.dumps(document).encode())


def test_a_small_payload_comes_along() -> None:
    assert _embedding(b"payload").metadata[Form.ENCODED].data == b"payload"
    assert _embedding(bytes(EMBEDDED_MAX)).metadata[Form.ENCODED].data == bytes(EMBEDDED_MAX)
    assert _embedding(bytes(EMBEDDED_MAX + 1)).metadata[Form.ENCODED].data is None


@pytest.mark.parametrize("text", ["", "cGF5bG9hZA", "cGF5bG9hZB0=", "cGF5bG9hZGU=", "?", "é", 5, ["cGF5bG9hZA=="]])
def test_what_is_not_the_payload_is_not_taken_for_it(text: Any) -> None:
    artifact = _embedding(b"payload", text)
    assert artifact.metadata[Form.ENCODED].data is None
    assert artifact.metadata[Form.ENCODED].digest == Digest.of(b"payload")


def test_unknown_layers_are_passed_over() -> None:
    document = json.loads(FULL.encode())
    document["layers"].insert(0, {"mediaType": "new/type", "digest": f"sha256:{'0' * 64}", "size": 1})
    assert Artifact.decode(json.dumps(document).encode()) == FULL


def changed(**more: Any) -> bytes:
    return json.dumps({**json.loads(FULL.encode()), **more}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        changed(artifactType="x"),
        changed(artifactType=ARTIFACT_TYPE + ".not"),
        changed(layers=None),
        changed(layers=[1]),
        changed(layers=[{}]),
        changed(layers=[{"mediaType": "x", "digest": "md5:0", "size": 1}]),
        changed(layers=[{"mediaType": "x", "digest": 5, "size": 1}]),
        changed(layers=[{"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": -1}]),
        changed(layers=[{"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": True}]),
        changed(layers=[{"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": 1.5}]),
        changed(subject={"x": 1}),
        changed(annotations=5),
    ],
)
def test_refuses(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Artifact.decode(data)


@pytest.mark.parametrize("size", ["", "x", "-1", "99999999999999", "65535", "65537"])
def test_payload_size_is_held_against_the_stream(tmp_path: Any, size: str) -> None:
    layout: Layout = new_layout(tmp_path / "l")
    stored = put(layout, METADATA_TYPES[Form.ENCODED], zstandard.compress(bytes(65536)))
    annotated = Descriptor(stored.media_type, stored.digest, stored.size, {"org.erofs-ondemand.payload-size": size})
    with pytest.raises(ArtifactError):
        load_payload(layout, Artifact([], {Form.ENCODED: annotated}), Form.ENCODED)
    with pytest.raises(NotFoundError):
        load_payload(layout, Artifact([], {}), Form.DECODED)
    layout.close()


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x28\xb5\x2f\xfd"])
def test_broken_streams(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        decompress(data, 10, "x")
