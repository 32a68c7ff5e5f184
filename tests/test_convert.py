"""Conversion: what is published, found, shared and left out."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, FormatError, IntegrityError, TarError, UnsupportedError
from erofs_builder.layer import Options
from erofs_builder.payload import Form
from erofs_builder.tree import walk
from loader.artifact import ARTIFACT_TYPE, BLOB_TYPE, GENERATION_ANNOTATION, INDEX_TYPE, MANIFEST_TYPE
from loader.convert.check import check_artifact
from loader.convert.convert import Request, Result, convert
from loader.convert.progress import NoProgress
from loader.convert.survey import load_tree
from loader.errors import LoaderError, NotFoundError, UsageError
from loader.registry.base import Descriptor
from loader.registry.client import Registry
from loader.registry.config import HostConfig, RegistryConfig
from loader.registry.documents import encode_index, fallback_tag
from loader.registry.find import find_artifact, generation_of, newest_first
from loader.registry.layout import Layout
from loader.registry.open import open_image
from tests.support.oci import MANIFEST, add_image, add_index, new_layout, put, tar_of
from tests.support.registry import docker_registry

BIG = random.Random(1).randbytes(1_000_000)
TAR = tar_of({"etc/": b"", "etc/name": b"one\n", "big": BIG})
UPPER = tar_of({"etc/name": b"two\n", "copy": BIG})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_layout(tmp_path / "source")


def run(
    source: str, target: str, platform: str | None = None, base: str | None = None, options: Options | None = None
) -> Result:
    return convert(Request(source, target, platform, base, options or Options()), RegistryConfig())


def tree_of(reference: str, form: Form | None = None, platform: str | None = None) -> dict[str, int]:
    """Path → size of what a reference mounts as; everything is checked on the way."""
    source, name = open_image(reference, RegistryConfig())
    try:
        _, artifact = find_artifact(source, name, platform)
        assert check_artifact(source, artifact, NoProgress()).damage == []
        return {path.decode(): node.size for path, node in walk(load_tree(source, artifact, form).root)}
    finally:
        source.close()


EXPECTED = {"": 0, "big": len(BIG), "copy": len(BIG), "etc": 0, "etc/name": 4}


@pytest.mark.parametrize("packing", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("form", list(Form))
def test_in_one_layout_both_names_find_it(layout: Layout, packing: str, form: Form) -> None:
    image = add_image(layout, [TAR, UPPER], "image", packing)
    result = run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact")
    for reference in (":image", ":artifact", f"@{image.digest}"):
        assert tree_of(f"oci:{layout.path}{reference}", form) == EXPECTED
    assert result.images[0].assembled.artifact.subject == image
    assert not list(layout.path.glob(".convert-*"))


def test_same_layers_same_blobs_however_they_are_packed(tmp_path: Path, layout: Layout) -> None:
    blobs, payloads = set(), set()
    for packing in ("gzip", "zstd", "plain"):
        add_image(layout, [TAR, UPPER], packing, packing)
        artifact = run(f"oci:{layout.path}:{packing}", f"oci:{tmp_path}/{packing}").images[0].assembled.artifact
        blobs.add(tuple(blob.digest for blob in artifact.blobs))
        payloads.add(tuple(item.digest for item in artifact.metadata.values()))
    assert len(blobs) == len(payloads) == 1


def test_twice_is_the_same_and_uploads_nothing(host: str, layout: Layout) -> None:
    add_image(layout, [TAR, UPPER], "image")
    first = run(f"oci:{layout.path}:image", f"{host}/twice:t").images[0].published
    second = run(f"oci:{layout.path}:image", f"{host}/twice:t").images[0].published
    assert first.descriptor == second.descriptor
    assert set(first.uploaded.values()) == {"uploaded"} and set(second.uploaded.values()) == {"there"}


def test_registry_to_registry(host: str, layout: Layout) -> None:
    add_image(layout, [TAR, UPPER], "image")
    command = ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout.path}:image", f"docker://{host}/app:1"]
    subprocess.run(command, check=True, capture_output=True)
    run(f"docker://{host}/app:1", f"{host}/app:1-erofs")
    assert tree_of(f"{host}/app:1") == tree_of(f"{host}/app:1-erofs") == EXPECTED
    run(f"docker://{host}/app:1", f"{host}/elsewhere/app:x")
    assert tree_of(f"{host}/elsewhere/app:x") == EXPECTED


def test_content_of_a_lower_layer_is_stored_once(layout: Layout) -> None:
    add_image(layout, [TAR, tar_of({"copy": BIG})], "image")
    converted = run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact").images[0]
    assert len(converted.layers) == 2 and len(converted.assembled.artifact.blobs) == 1


def test_base_leaves_out_what_it_holds(host: str, tmp_path: Path, layout: Layout) -> None:
    add_image(layout, [TAR], "v1")
    add_image(layout, [tar_of({"big": BIG, "new": b"n" * 9000})], "v2")
    run(f"oci:{layout.path}:v1", f"{host}/based:v1")
    second = run(f"oci:{layout.path}:v2", f"{host}/other:v2", base=f"{host}/based:v1")
    old, new = second.images[0].assembled.artifact.blobs
    assert second.images[0].published.uploaded[old.digest] == "linked"
    assert new.size < 8192 < old.size
    assert tree_of(f"{host}/other:v2") == {"": 0, "big": len(BIG), "new": 9000}
    local = run(f"oci:{layout.path}:v2", f"oci:{tmp_path}/local:v2", base=f"{host}/based:v1")
    assert local.images[0].published.uploaded[old.digest] == "copied"
    assert local.images[0].published.descriptor == second.images[0].published.descriptor
    third = run(f"oci:{layout.path}:v2", f"oci:{tmp_path}/local:v3", base=f"{host}/other:v2")
    assert [blob.digest for blob in third.images[0].assembled.artifact.blobs] == [old.digest, new.digest]


def test_platforms(host: str, layout: Layout) -> None:
    images = [
        (add_image(layout, [TAR, tar_of({name: b"x"})], None, platform=platform), platform)
        for name, platform in (("amd", "linux/amd64"), ("arm", "linux/arm64"))
    ]
    index = add_index(layout, images, "multi")
    source = f"oci:{layout.path}:multi"
    one = run(source, f"oci:{layout.path}:arm", platform="linux/arm64")
    assert one.index is None and "arm" in tree_of(f"oci:{layout.path}:arm")
    with pytest.raises(NotFoundError) as caught:
        run(source, f"oci:{layout.path}:x", platform="linux/s390x")
    assert caught.value.hint == "there are: linux/amd64, linux/arm64"
    indexes: set[Digest] = set()
    for target in (f"oci:{layout.path}:both", f"{host}/both:t"):
        result = run(source, target, platform="all")
        assert result.index is not None
        indexes.add(result.index.digest)
        assert len(result.images) == 2
        shared = [image.assembled.artifact.blobs[0].digest for image in result.images]
        assert shared[0] == shared[1]
        for platform, name in (("linux/amd64", "amd"), ("linux/arm64", "arm")):
            assert name in tree_of(target, platform=platform)
    assert "arm" in tree_of(f"oci:{layout.path}@{index.digest}", platform="linux/arm64")
    assert {entry.digest for entry in layout.referrers(index.digest, ARTIFACT_TYPE)} == indexes


def test_archives_and_directories(tmp_path: Path, layout: Layout) -> None:
    add_image(layout, [TAR, UPPER], "image")
    for kind, subject in (("oci-archive", True), ("docker-archive", False)):
        file = f"{kind}:{tmp_path}/{kind}.tar"
        subprocess.run(["skopeo", "copy", f"oci:{layout.path}:image", f"{file}:n:t"], check=True, capture_output=True)
        result = run(file, f"oci:{tmp_path}/out:{kind}")
        assert (result.images[0].subject is not None) is subject
        assert tree_of(f"oci:{tmp_path}/out:{kind}") == EXPECTED
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name").write_text("one\n")
    (root / "big").write_bytes(BIG)
    run(f"rootfs:{root}", f"oci:{tmp_path}/out:rootfs")
    assert tree_of(f"oci:{tmp_path}/out:rootfs") == {"": 0, "big": len(BIG), "etc": 0, "etc/name": 4}
    with pytest.raises(NotFoundError):
        run(f"rootfs:{tmp_path}/nothing", f"oci:{tmp_path}/out:x")


def test_what_umoci_inserts(tmp_path: Path) -> None:
    """Its layers end without padding and without an end marker; container runtimes take them."""
    (tmp_path / "file").write_text("hello")
    for command in (
        "init --layout l",
        "new --image l:t",
        "insert --image l:t file /etc/file",
        "insert --image l:t file /b",
    ):
        subprocess.run(["umoci", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    run(f"oci:{tmp_path}/l:t", f"oci:{tmp_path}/l:erofs")
    assert tree_of(f"oci:{tmp_path}/l:t") == {"": 0, "etc": 0, "etc/file": 5, "b": 5}


def test_empty_images(tmp_path: Path, layout: Layout) -> None:
    add_image(layout, [], "none")
    add_image(layout, [tar_of({"empty": b""})], "nodata")
    assert not run(f"oci:{layout.path}:none", f"oci:{tmp_path}/out:none").images[0].assembled.artifact.blobs
    run(f"oci:{layout.path}:nodata", f"oci:{tmp_path}/out:nodata")
    assert tree_of(f"oci:{tmp_path}/out:none") == {"": 0}
    assert tree_of(f"oci:{tmp_path}/out:nodata") == {"": 0, "empty": 0}


def test_the_same_layer_twice(tmp_path: Path, layout: Layout) -> None:
    add_image(layout, [TAR, UPPER, TAR], "image")
    run(f"oci:{layout.path}:image", f"oci:{tmp_path}/out:t")
    assert tree_of(f"oci:{tmp_path}/out:t") == EXPECTED


def test_a_tar_that_is_compressed_twice(tmp_path: Path, layout: Layout) -> None:
    """Its diff_id is the digest of what one decompression gives."""
    packed = gzip.compress(TAR)
    add_image(layout, [packed], "twice", "gzip")
    run(f"oci:{layout.path}:twice", f"oci:{tmp_path}/out:twice")
    add_image(layout, [packed], "once", "plain")  # called plain, and is not
    run(f"oci:{layout.path}:once", f"oci:{tmp_path}/out:once")
    assert tree_of(f"oci:{tmp_path}/out:twice") == tree_of(f"oci:{tmp_path}/out:once") == tree_of(one(layout, tmp_path))


def one(layout: Layout, directory: Path) -> str:
    """The artifact of an image of one layer."""
    add_image(layout, [TAR], "single")
    run(f"oci:{layout.path}:single", f"oci:{directory}/out:single")
    return f"oci:{directory}/out:single"


def test_wrong_bytes(tmp_path: Path, layout: Layout) -> None:
    add_image(layout, [TAR], "diff", diff_ids=[str(Digest.of(UPPER))])
    with pytest.raises(IntegrityError, match="config says"):
        run(f"oci:{layout.path}:diff", f"oci:{tmp_path}/out:t")
    add_image(layout, [UPPER], "plain", "plain")
    path = layout.path / "blobs/sha256" / Digest.of(UPPER).hex
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        run(f"oci:{layout.path}:plain", f"oci:{tmp_path}/out:t")
    assert Layout(tmp_path / "out")._entries() == []


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"artifactType": ARTIFACT_TYPE}, UsageError),
        ({}, ArtifactError),
        ({"config": {}, "layers": []}, ArtifactError),
        ({"config": None, "layers": []}, ArtifactError),
        ({"layers": 5}, ArtifactError),
        ({"config": {"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": 1}, "layers": []}, UnsupportedError),
    ],
)
def test_manifests_that_are_no_images(layout: Layout, document: dict[str, object], error: type[Exception]) -> None:
    layout.put_manifest(MANIFEST, json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, **document}).encode(), "bad")
    with pytest.raises(error):
        run(f"oci:{layout.path}:bad", f"oci:{layout.path}:x")


@pytest.mark.parametrize("rootfs", [None, 1, {}, {"diff_ids": ["x"]}, {"diff_ids": [1]}, {"diff_ids": 7}])
def test_bad_configs(layout: Layout, rootfs: object) -> None:
    config = put(layout, "application/vnd.oci.image.config.v1+json", json.dumps({"rootfs": rootfs}).encode())
    manifest = {
        "config": {"mediaType": config.media_type, "digest": str(config.digest), "size": config.size},
        "layers": [{"mediaType": "t", "digest": str(config.digest), "size": config.size}],
    }
    layout.put_manifest(MANIFEST, json.dumps({"mediaType": MANIFEST, **manifest}).encode(), "bad")
    with pytest.raises(FormatError):
        run(f"oci:{layout.path}:bad", f"oci:{layout.path}:x")


def test_a_cut_off_layer_names_the_layer(layout: Layout) -> None:
    image = add_image(layout, [TAR[: len(TAR) // 2]], "cut")
    layer = json.loads(layout.manifest(image))["layers"][0]["digest"]
    with pytest.raises(TarError, match=layer):
        run(f"oci:{layout.path}:cut", f"oci:{layout.path}:x")


def test_a_mistyped_source_leaves_no_target(tmp_path: Path, layout: Layout) -> None:
    for source, error in ((f"oci:{layout.path}:none", NotFoundError), (f"oci:{tmp_path}/none", NotFoundError)):
        with pytest.raises(error):
            run(source, f"oci:{tmp_path}/target:t")
    with pytest.raises(UsageError):
        run(f"oci:{layout.path}:none", f"oci-archive:{tmp_path}/x.tar")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("path", "platform"), [("nope", None), (".", "linux/amd64")])
def test_a_directory_that_is_none_leaves_no_target(tmp_path: Path, path: str, platform: str | None) -> None:
    with pytest.raises(LoaderError):
        run(f"rootfs:{tmp_path / path}", f"oci:{tmp_path}/target:t", platform=platform)
    assert not (tmp_path / "target").exists()


@pytest.fixture(params=["layout", "registry"])
def place(request: pytest.FixtureRequest, tmp_path: Path, layout: Layout, host: str) -> str:
    """A layout or a repository with image 1, image 2 and multi, an index with image 1 in it, as REFERENCE:TAG."""
    image = add_image(layout, [TAR], "1")
    add_image(layout, [UPPER], "2")
    add_index(layout, [(image, "linux/amd64")], "multi")
    if request.param == "layout":
        return f"oci:{layout.path}"
    name = f"docker://{host}/{tmp_path.name.replace('_', '-').lower()}"
    for tag in ("1", "2", "multi"):
        command = ["skopeo", "copy", "--all", "--dest-tls-verify=false", f"oci:{layout.path}:{tag}", f"{name}:{tag}"]
        subprocess.run(command, check=True, capture_output=True)
    return name


def named_by(reference: str) -> Digest:
    source, name = open_image(reference, RegistryConfig())
    try:
        return source.resolve(name).digest
    finally:
        source.close()


@pytest.mark.parametrize(
    ("source", "tag", "which"),
    [("1", "1", "the source"), ("multi", "multi", "the source"), ("multi", "1", "the source"), ("1", "2", "another")],
)
def test_no_image_loses_its_tag(place: str, source: str, tag: str, which: str) -> None:
    before = named_by(f"{place}:{tag}")
    with pytest.raises(UsageError) as caught:
        run(f"{place}:{source}", f"{place}:{tag}", platform="linux/amd64")
    assert str(caught.value) == f"{place}:{tag} is {which} image; its tag would name the artifact instead"
    assert caught.value.hint == f"take another tag, by custom {place}:{tag}-erofs"
    assert named_by(f"{place}:{tag}") == before
    with pytest.raises(NotFoundError, match="no erofs-ondemand artifact"):
        tree_of(f"{place}:{source}")


def test_an_artifact_loses_its_tag_to_a_later_one(place: str) -> None:
    run(f"{place}:1", f"{place}:erofs")
    assert "copy" not in tree_of(f"{place}:erofs")
    run(f"{place}:2", f"{place}:erofs")
    assert "copy" in tree_of(f"{place}:erofs")
    run(f"{place}:multi", f"{place}:erofs", platform="all")
    run(f"{place}:2", f"{place}:erofs")
    assert "copy" in tree_of(f"{place}:erofs")


def test_a_mirror_is_not_asked_for_the_tag(host: str, tmp_path: Path, layout: Layout) -> None:
    """It may tell of a tag as it was a while ago."""
    add_image(layout, [TAR], "1")
    with docker_registry(tmp_path / "mirror") as mirror:
        for place in (mirror, host):
            command = [
                "skopeo",
                "copy",
                "--dest-tls-verify=false",
                f"oci:{layout.path}:1",
                f"docker://{place}/mirrored:1",
            ]
            subprocess.run(command, check=True, capture_output=True)
        run(f"oci:{layout.path}:1", f"{mirror}/mirrored:2")
        config = RegistryConfig(hosts={host: HostConfig(mirrors=(f"http://{mirror}",))})
        registry = Registry(host, "mirrored", config)
        assert registry.tagged("1") is not None and registry.tagged("2") is None
        registry.close()


def damaged(layout: Layout, digest: Digest, place: int) -> None:
    path = layout.path / "blobs/sha256" / digest.hex
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_check_names_the_file_behind_a_bad_frame(layout: Layout) -> None:
    add_image(layout, [TAR], "image")
    result = run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact")
    artifact = result.images[0].assembled.artifact
    tree = load_tree(layout, artifact)
    node = dict(walk(tree.root))[b"big"]
    frame = tree.payload.tables[0][node.extents[0].frame]
    damaged(layout, artifact.blobs[0].digest, frame.encoded_offset + 50)
    (found,) = check_artifact(layout, artifact, NoProgress()).damage
    assert (found.frame, found.files, found.paths) == (frame.number, 1, ("/big",))


def test_check_refuses_damaged_documents(layout: Layout) -> None:
    add_image(layout, [TAR], "image")
    artifact = run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact").images[0].assembled.artifact
    damaged(layout, artifact.metadata[Form.DECODED].digest, 99)
    with pytest.raises(IntegrityError):
        check_artifact(layout, artifact, NoProgress())


def test_what_was_never_converted(host: str, layout: Layout) -> None:
    add_image(layout, [TAR], "image")
    with pytest.raises(NotFoundError, match="no erofs-ondemand artifact") as caught:
        find_artifact(layout, "image")
    assert "erofs-builder convert" in str(caught.value.hint)
    registry = Registry(host, "never/there", RegistryConfig())
    with pytest.raises(LoaderError):
        find_artifact(registry, "t")
    registry.close()


def test_the_newest_artifact_of_an_image_is_found(host: str, layout: Layout) -> None:
    """Whatever the order in which they are listed; and what is the newest already is published once."""
    add_image(layout, [TAR, UPPER], "image")
    for target in (f"oci:{layout.path}", f"docker://{host}/newest"):
        seen: list[Digest] = []
        for level in (3, 9, 9, 3, 1):
            converted = run(f"oci:{layout.path}:image", f"{target}:artifact", options=Options(level=level)).images[0]
            assert converted.subject is not None
            source, _ = open_image(f"{target}:artifact", RegistryConfig())
            known = source.referrers(converted.subject.digest, ARTIFACT_TYPE)
            assert newest_first(known)[0].digest == newest_first(known[::-1])[0].digest
            assert newest_first(known)[0].digest == converted.published.descriptor.digest
            seen.append(converted.published.descriptor.digest)
            source.close()
        assert seen[1] == seen[2]
        assert len(set(seen)) == 4
    assert find_artifact(layout, "image")[0].digest == seen[-1]


def test_generations_that_are_none() -> None:
    descriptors = [
        Descriptor(MANIFEST_TYPE, Digest.of(text.encode()), 1, {GENERATION_ANNOTATION: text})
        for text in ("-1", "1" * 40, "²", "x", "")
    ]
    assert {generation_of(descriptor) for descriptor in descriptors} == {0}


def test_referrers_that_lie_or_are_gone_are_passed_over(layout: Layout) -> None:
    image, other = add_image(layout, [TAR], "image"), add_image(layout, [UPPER], "other")
    run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact")
    good = layout.resolve("artifact")
    run(f"oci:{layout.path}:other", f"oci:{layout.path}:wrong")
    gone = replace(good, digest=Digest.of(b"gone"))
    listed = [replace(item, artifact_type=ARTIFACT_TYPE) for item in (good, layout.resolve("wrong"), gone)]
    layout.put_manifest(INDEX_TYPE, encode_index(listed), fallback_tag(image.digest))
    assert layout.referrers(image.digest, ARTIFACT_TYPE)[-1].digest == gone.digest
    assert find_artifact(layout, "image")[0].digest == good.digest
    assert find_artifact(layout, "other")[1].subject == other


def test_blobs_are_ordinary_zstd(layout: Layout, tmp_path: Path) -> None:
    add_image(layout, [TAR], "image")
    artifact = run(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact").images[0].assembled.artifact
    assert artifact.blobs[0].media_type == BLOB_TYPE
    path = layout.path / "blobs/sha256" / artifact.blobs[0].digest.hex
    plain = subprocess.run(["zstd", "-dc", str(path)], check=True, capture_output=True).stdout
    assert BIG in plain
