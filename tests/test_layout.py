"""OCI layouts: ours read by skopeo, skopeo's and umoci's read by us, and malformed ones."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, IntegrityError
from loader.artifact import ARTIFACT_TYPE, MANIFEST_TYPE, Artifact
from loader.errors import LoaderError, NotFoundError, UsageError
from loader.registry.base import Descriptor
from loader.registry.layout import Layout
from tests.support.oci import add_image, new_layout, put, tar_of


def test_skopeo_reads_ours_and_we_read_skopeos(tmp_path: Path) -> None:
    ours = new_layout(tmp_path / "ours")
    image = add_image(ours, [tar_of({"a": b"1"})], "tag")
    subprocess.run(
        ["skopeo", "copy", f"oci:{ours.path}:tag", f"oci:{tmp_path}/theirs:other"], check=True, capture_output=True
    )
    theirs = Layout(tmp_path / "theirs")
    assert theirs.resolve("other").digest == image.digest == theirs.resolve("").digest
    assert theirs.manifest(image) == ours.manifest(image)
    ours.close()
    theirs.close()


def test_umoci_layout(tmp_path: Path) -> None:
    subprocess.run(["umoci", "init", "--layout", str(tmp_path / "l")], check=True, capture_output=True)
    subprocess.run(["umoci", "new", "--image", f"{tmp_path}/l:t"], check=True, capture_output=True)
    layout = Layout(tmp_path / "l")
    descriptor = layout.resolve("t")
    assert json.loads(layout.manifest(descriptor))["layers"] == []
    layout.close()


def test_reads(tmp_path: Path) -> None:
    layout = new_layout(tmp_path / "l")
    blob = put(layout, "x/y", b"0123456789")
    assert layout.blob(blob) == b"0123456789"
    assert layout.read_range(blob.digest, 3, 4) == b"3456"
    with layout.open_blob(blob) as stream:
        assert stream.read() == b"0123456789"
    with pytest.raises(LoaderError, match="2 of 4"):
        layout.read_range(blob.digest, 8, 4)
    with pytest.raises(NotFoundError):
        layout.read_range(Digest.of(b"nothing"), 0, 1)
    with pytest.raises(NotFoundError):
        layout.blob(Descriptor("x/y", Digest.of(b"nothing"), 1))
    with pytest.raises(IntegrityError):
        layout.put_blob(blob, iter((b"wrong",)))
    assert [path.name for path in (layout.path / "blobs/sha256").iterdir()] == [blob.digest.hex]
    layout.close()


def test_corrupt_blob(tmp_path: Path) -> None:
    layout = new_layout(tmp_path / "l")
    blob = put(layout, "x/y", b"0123456789")
    (layout.path / "blobs/sha256" / blob.digest.hex).write_bytes(b"012345678X")
    with pytest.raises(IntegrityError):
        layout.blob(blob)
    with pytest.raises(IntegrityError), layout.open_blob(blob) as stream:
        stream.read()
    layout.close()


def test_referrers_and_tags(tmp_path: Path) -> None:
    layout = new_layout(tmp_path / "l")
    image = add_image(layout, [], "image")
    one = layout.put_manifest(MANIFEST_TYPE, Artifact([], {}, subject=image, annotations={"n": "1"}).encode(), None)
    two = layout.put_manifest(MANIFEST_TYPE, Artifact([], {}, subject=image, annotations={"n": "2"}).encode(), "tagged")
    layout.put_manifest(MANIFEST_TYPE, Artifact([], {}, subject=image, annotations={"n": "1"}).encode(), None)
    assert {entry.digest for entry in layout.referrers(image.digest, ARTIFACT_TYPE)} == {one.digest, two.digest}
    assert layout.referrers(image.digest, "another") == []
    assert layout.referrers(one.digest, ARTIFACT_TYPE) == []
    assert layout.resolve("").digest == image.digest  # artifacts do not make a layout ambiguous
    assert layout.resolve("tagged").digest == two.digest
    assert layout.resolve(str(one.digest)).digest == one.digest
    layout.put_manifest(MANIFEST_TYPE, Artifact([], {}, annotations={"n": "3"}).encode(), "tagged")
    assert layout.resolve("tagged").digest != two.digest
    assert len(json.loads((layout.path / "index.json").read_bytes())["manifests"]) == 3
    layout.close()


def test_index_is_the_same_whatever_the_order(tmp_path: Path) -> None:
    texts = []
    for order in ("abc", "cba"):
        layout = new_layout(tmp_path / order)
        for tag in order:
            add_image(layout, [tar_of({tag: b""})], tag)
        texts.append((layout.path / "index.json").read_bytes())
        layout.close()
    assert texts[0] == texts[1]


def test_parallel_writers_lose_nothing(tmp_path: Path) -> None:
    layout = new_layout(tmp_path / "l")
    documents = [Artifact([], {}, annotations={"n": str(number)}).encode() for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda item: Layout(layout.path).put_manifest(MANIFEST_TYPE, item[1], f"t{item[0]}"),
                enumerate(documents),
            )
        )
    assert len(json.loads((layout.path / "index.json").read_bytes())["manifests"]) == 20
    layout.close()


def test_ambiguous_and_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Layout(tmp_path)
    layout = new_layout(tmp_path / "l")
    with pytest.raises(UsageError, match="holds 0 images"):
        layout.resolve("")
    add_image(layout, [tar_of({"a": b""})], "one")
    add_image(layout, [tar_of({"b": b""})], "two")
    with pytest.raises(UsageError) as caught:
        layout.resolve("")
    assert caught.value.hint == "name one of: one, two"
    with pytest.raises(NotFoundError, match="three"):
        layout.resolve("three")
    layout.close()


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"manifests": 1}',
        '{"manifests": [1]}',
        '{"manifests": [{}]}',
        '{"manifests": [{"mediaType": "x", "digest": "md5:1", "size": 1}]}',
    ],
)
def test_malformed_index(tmp_path: Path, index: str) -> None:
    layout = new_layout(tmp_path / "l")
    (layout.path / "index.json").write_text(index)
    with pytest.raises(ArtifactError):
        layout.resolve("tag")
    layout.close()
