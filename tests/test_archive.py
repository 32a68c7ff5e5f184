"""Archives as skopeo writes them, compressed ones, and malformed ones."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from fuzz.seeds import FINDS
from loader.artifact import descriptor_from_json
from loader.errors import NotFoundError, UsageError
from loader.registry.archive import DockerArchive, OciArchive, TarFile
from loader.registry.layout import Layout
from tests.support.oci import add_image, new_layout, tar_of
from tests.support.tars import Tar, header

LAYERS = [tar_of({"a": b"one"}), tar_of({"b": b"two" * 5000})]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = new_layout(tmp_path / "layout")
    add_image(layout, LAYERS, "tag")
    return layout


def skopeo(source: str, target: str) -> None:
    subprocess.run(["skopeo", "copy", source, target], check=True, capture_output=True)


def test_oci_archive(tmp_path: Path, layout: Layout) -> None:
    skopeo(f"oci:{layout.path}:tag", f"oci-archive:{tmp_path}/x.tar:tag")
    for name in ("tag", ""):
        archive = OciArchive(tmp_path / "x.tar")
        descriptor = archive.resolve(name)
        assert descriptor.digest == layout.resolve("tag").digest
        assert archive.resolve(str(descriptor.digest)).digest == descriptor.digest
        layer = descriptor_from_json(json.loads(archive.manifest(descriptor))["layers"][1])
        with archive.open_blob(layer) as stream:
            assert gzip.decompress(stream.read()) == LAYERS[1]
        assert archive.read_range(layer.digest, 0, 2) == b"\x1f\x8b"
        with pytest.raises(NotFoundError):
            archive.resolve(str(Digest.of(b"")))
        archive.close()


@pytest.mark.parametrize("packed", [False, True])
def test_docker_archive(tmp_path: Path, layout: Layout, packed: bool) -> None:
    file = tmp_path / "x.tar"
    skopeo(f"oci:{layout.path}:tag", f"docker-archive:{file}:name.example/image:tag")
    if packed:
        file.write_bytes(gzip.compress(file.read_bytes(), 1))
    for name in ("", "name.example/image:tag"):
        archive = DockerArchive(file)
        manifest = json.loads(archive.manifest(archive.resolve(name)))
        layers = [descriptor_from_json(item) for item in manifest["layers"]]
        assert [layer.digest for layer in layers] == [Digest.of(layer) for layer in LAYERS]
        with archive.open_blob(layers[1]) as stream:
            assert stream.read() == LAYERS[1]
        with pytest.raises(NotFoundError):
            archive.resolve("other:tag")
        archive.close()


def docker_save(file: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)


def test_legacy_layer_links_and_compressed_layers(tmp_path: Path) -> None:
    diff_ids = [str(Digest.of(LAYERS[0])), str(Digest.of(LAYERS[1])), str(Digest.of(LAYERS[0]))]
    config = json.dumps({"rootfs": {"diff_ids": diff_ids}}).encode()
    names = ["one/layer.tar", "two/layer.tar", "three/layer.tar"]
    members = {"c.json": config, names[0]: LAYERS[0], names[1]: gzip.compress(LAYERS[1])}
    members["manifest.json"] = json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": names}]).encode()
    docker_save(tmp_path / "x.tar", members, {names[2]: "../one/layer.tar"})
    archive = DockerArchive(tmp_path / "x.tar")
    layers = [descriptor_from_json(item) for item in json.loads(archive.manifest(archive.resolve("")))["layers"]]
    assert layers[0].digest == layers[2].digest == Digest.of(LAYERS[0])
    assert layers[1].digest == Digest.of(members[names[1]]) and layers[1].media_type.endswith("gzip")
    with archive.open_blob(layers[1]) as stream:
        assert gzip.decompress(stream.read()) == LAYERS[1]
    archive.close()


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (None, NotFoundError),
        (b"{", ArtifactError),
        (b"{}", ArtifactError),
        (b"[]", UsageError),
        (b"[{}]", ArtifactError),
        (b'[{"Config": "gone", "Layers": []}]', NotFoundError),
        (b'[{"Config": "c", "Layers": ["gone"]}]', ArtifactError),
        (b'[{"Config": "bad", "Layers": []}]', ArtifactError),
        (b'[{"Config": "c", "Layers": []}, {"Config": "c", "Layers": []}]', UsageError),
    ],
)
def test_malformed_docker_archive(tmp_path: Path, manifest: bytes | None, error: type[Exception]) -> None:
    members = {"c": b'{"rootfs": {"diff_ids": []}}', "bad": b'{"rootfs": 1}'}
    docker_save(tmp_path / "x.tar", members | ({"manifest.json": manifest} if manifest is not None else {}))
    archive = DockerArchive(tmp_path / "x.tar")
    with pytest.raises(error):
        archive.resolve("")
    archive.close()


@pytest.mark.parametrize("data", [b"", b"not a tar at all" * 100, b"\x1f\x8b broken", b"\x28\xb5\x2f\xfd broken"])
def test_not_an_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises((ArtifactError, NotFoundError)):
        OciArchive(tmp_path / "x.tar").resolve("")
    with pytest.raises(NotFoundError):
        OciArchive(tmp_path / "missing.tar")


@pytest.mark.parametrize("find", sorted((FINDS / "docker-archive").iterdir()), ids=lambda path: path.name)
def test_hostile_archives(find: Path) -> None:
    with pytest.raises((ArtifactError, NotFoundError)), closing(DockerArchive(find)) as archive:
        archive.resolve("")


@pytest.mark.parametrize(
    "data",
    [
        header(b"f", size=b"\xff" * 12),
        header(b"f", b"x", size=b"77777777777\0"),
        header(b"f", b"L", size=b"\xff" * 12),
        header(b"f", b"x", size=b"00000000005\0") + b"hello".ljust(512, b"\0"),
        header(b"f")[:300],
        header(b"f") + b"x" * 512,
    ],
    ids=["negative", "huge extension", "negative extension", "no records", "cut off", "noise"],
)
def test_malformed_headers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ArtifactError):
        DockerArchive(tmp_path / "x.tar")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_says(tmp_path: Path, form: int) -> None:
    tar = Tar(form)
    for number, name in enumerate(["a", "b/" + "n" * 200, "ü", "d" * 99 + "/" + "f" * 99]):
        tar.add(name, data=b"x" * (number * 300))
        tar.add(f"l{number}", "symlink", linkname=name)
        tar.add(f"h{number}", "link", linkname=name)
    (tmp_path / "x.tar").write_bytes(bytes(tar))
    found = TarFile(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            assert found.read(member.name) == file.read()
    found.close()
