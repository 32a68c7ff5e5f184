"""A layout rebuilt from a trace: the same files, and what the trace touches in the first frames of one blob."""

from __future__ import annotations

import io
import random
import stat
from pathlib import Path

import pytest
import zstandard

from bench.node import Node as LoaderNode
from erofs_builder.erofs.reader import Reader
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import ArtifactError
from erofs_builder.frames import BLOCK
from erofs_builder.layer import Layer, build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.page_trace import PageRun, decode_page_trace, encode_page_trace, gathered, traced_frames
from erofs_builder.payload import Form
from erofs_builder.startup_layout import Relaid, _runs, _steps, rebuild
from erofs_builder.tree import flatten, walk
from loader.artifact import START_ANNOTATION, Artifact
from loader.convert.check import check_artifact
from loader.convert.convert import Request, convert
from loader.convert.progress import NoProgress
from loader.convert.survey import load_tree
from loader.errors import NotFoundError
from loader.registry.config import RegistryConfig
from loader.registry.layout import Layout
from loader.trace import find_pages, load_page_trace, publish_trace
from tests.support import erofs_utils, oracles
from tests.support.oci import add_image, new_layout, tar_of

UNDEFINED = [".", "0", "1"]  # directories that no archive defines


def test_page_traces() -> None:
    runs = [PageRun("a b/\u00e9\n%".encode() + b"\xff", 3, 9), PageRun(b"etc/passwd", 0, 0)]
    data = encode_page_trace(runs)
    assert data.splitlines()[1:] == [b"3-9 /a%20b/%C3%A9%0A%25%FF", b"0 /etc/passwd"]
    assert decode_page_trace(data) == runs
    assert decode_page_trace(encode_page_trace([])) == []


@pytest.mark.parametrize(
    "data",
    [b"", b"erofs-ondemand trace 2\n", b"erofs-ondemand trace 1\n3-2 /a\n", b"erofs-ondemand trace 1\n1 a\n",
     b"erofs-ondemand trace 1\n-1 /a\n", b"erofs-ondemand trace 1\n1-999999999999999 /a\n", b"\xff", b"{}\n",
     b"erofs-ondemand trace 1\n1 /a b\n", b"erofs-ondemand trace 1\n1 /" + b"a" * 20_000],
)  # fmt: skip
def test_malformed_page_traces(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode_page_trace(data)


def test_pages_are_gathered_in_the_order_of_first_use() -> None:
    touched = [PageRun(b"a", 4, 6), PageRun(b"b", 0, 0), PageRun(b"a", 5, 8), PageRun(b"a", 9, 9), PageRun(b"b", 0, 0)]
    assert gathered(touched) == [PageRun(b"a", 4, 6), PageRun(b"b", 0, 0), PageRun(b"a", 7, 9)]


@pytest.mark.parametrize("seed", range(40))
def test_cuts_have_no_single_pages(seed: int) -> None:
    source = random.Random(seed)
    end = source.randrange(2, 200)
    touched = {page: page for page in source.sample(range(end), source.randrange(1, end + 1))}
    runs = _runs(0, end, touched)
    covered = {page for low, high in runs for page in range(low, high)}
    assert covered >= touched.keys() and covered <= set(range(end))
    edges = [0, *(edge for run in runs for edge in run), end]
    assert all(high - low != 1 for low, high in zip(edges, edges[1:], strict=False))
    assert sum(high - low > 1 for low, high in runs) == len(runs)
    steps = list(_steps(0, end))
    assert steps[0][0] == 0 and steps[-1][1] == end and all(high - low > 1 for low, high in steps)


class _Image:
    """Layers of random files, with their blobs' bytes."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.layers: list[Layer] = []
        self.blobs: dict[Blob, bytes] = {}
        for number in range(2):
            files = {f"{number}/{each}": self._content() for each in range(12)}
            files[f"{number}/copy"] = self.source.choice(list((self.files | files).values()))
            self._add(files)
        self.root = flatten(self.layers)

    def _content(self) -> bytes:
        size = self.source.choice([0, 1, 5000, 40_000, 150_000, 700_000, 1_500_000])
        size += self.source.choice([0, 0, self.source.randrange(BLOCK)])
        data = bytearray(self.source.randbytes(size // 7 + 1) * 7)[:size]
        for _ in range(size // 100_000):
            at = self.source.randrange(size) & -BLOCK
            data[at : at + 2 * BLOCK] = self.source.randbytes(min(2 * BLOCK, size - at))
        if size > 600_000 and self.source.random() < 0.5:
            data[:500_000] = bytes(500_000)
        return bytes(data)

    def _add(self, files: dict[str, bytes]) -> None:
        out = io.BytesIO()
        layer = build_layer(io.BytesIO(tar_of(files)), out)
        self.files |= files
        self.layers.append(layer)
        if layer.blob:
            self.blobs[layer.blob] = out.getvalue()

    def trace(self) -> list[PageRun]:
        runs = [PageRun(b"0/nothing", 0, 5), PageRun(b"0", 0, 5), PageRun(b"0/1", 100_000, 200_000)]
        for name in self.source.sample(list(self.files), 14):
            pages = -(-len(self.files[name]) // BLOCK)
            for _ in range(self.source.randrange(1, 12)):
                first = self.source.randrange(pages + 1)
                runs.append(PageRun(name.encode(), first, first + self.source.choice([0, 0, 1, 3, 9])))
        return gathered(runs)

    def read_frame(self, blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame = blob.table[number]
        encoded = self.blobs[blob][frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        return zstandard.ZstdDecompressor().decompress(encoded)

    def content(self, node: Node) -> bytes:
        parts = []
        for extent in node.extents:
            if extent.blob is None:
                parts.append(bytes(extent.length))
            else:
                data = self.read_frame(extent.blob, extent.frame)
                parts.append(data[extent.frame_offset : extent.frame_offset + extent.length])
        return b"".join(parts)

    def rebuild(self, runs: list[PageRun]) -> tuple[Relaid, bytes]:
        out = io.BytesIO()
        relaid = rebuild(self.root, runs, self.read_frame, out)
        assert relaid is not None
        self.blobs[relaid.blob] = out.getvalue()
        return relaid, out.getvalue()


@pytest.mark.parametrize("seed", range(6))
def test_files_stay_and_the_start_is_in_front(seed: int) -> None:
    image = _Image(seed)
    runs = image.trace()
    relaid, data = image.rebuild(runs)
    for path, node in walk(image.root):
        if stat.S_ISREG(node.mode):
            assert image.content(node) == image.files[path.decode()], path
    numbers = {blob: number for number, blob in enumerate(image.blobs)}
    touched = traced_frames(image.root, runs, numbers)
    ours = numbers[relaid.blob]
    assert {frame for blob, frame in touched if blob == ours} == set(range(relaid.start_frames))
    again, same = _Image(seed).rebuild(runs)
    assert same == data and again.start_frames == relaid.start_frames
    for form in Form:
        metadata = write_metadata(image.root, form, list(image.blobs))
        tables = tuple(blob.table for blob in metadata.blobs if blob.table is not None)
        reader = Reader(metadata.erofs, tables, form)
        image.blobs |= {blob: image.blobs[known] for blob, known in zip(reader.blobs, metadata.blobs, strict=True)}
        for path, node in walk(reader.read_tree()):
            if stat.S_ISREG(node.mode):
                assert image.content(node) == image.files[path.decode()], path


def test_a_trace_of_nothing_that_is_there() -> None:
    image = _Image(0)
    before = dict(walk(image.root))
    assert rebuild(image.root, [PageRun(b"nothing", 0, 3)], image.read_frame, io.BytesIO()) is None
    assert dict(walk(image.root)) == before


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_layout(tmp_path / "oci")


def _convert(layout: Layout, tag: str, trace: str | None = None) -> Artifact:
    result = convert(Request(f"oci:{layout.path}:image", f"oci:{layout.path}:{tag}", trace=trace), RegistryConfig())
    artifact = result.images[0].assembled.artifact
    assert check_artifact(layout, artifact, NoProgress()).damage == []
    return artifact


def test_convert_with_a_published_trace(layout: Layout, tmp_path: Path) -> None:
    big = random.Random(2).randbytes(600_000)
    add_image(layout, [tar_of({"big": big, "small": b"x" * 9000}), tar_of({"other": big[::-1]})], "image")
    reference = f"oci:{layout.path}:image"
    plain = _convert(layout, "plain")
    digest = layout.resolve("plain").digest
    with pytest.raises(NotFoundError):
        load_page_trace(reference, RegistryConfig())
    runs = [PageRun(b"big", 40, 45), PageRun(b"small", 0, 2), PageRun(b"other", 3, 3)]
    publish_trace(layout, digest, "0:1", 1.0)
    publish_trace(layout, digest, "0:1", 2.0, runs)
    publish_trace(layout, digest, "0:1", 3.0)
    assert find_pages(layout, digest) == runs
    rebuilt = _convert(layout, "rebuilt", reference)
    assert [blob.digest for blob in rebuilt.blobs[:2]] == [blob.digest for blob in plain.blobs]
    assert len(rebuilt.blobs) == 3 and rebuilt.annotations[START_ANNOTATION] == "2:0-2"
    tree = load_tree(layout, rebuilt)
    assert load_tree(layout, plain).root.children is not None and tree.root.children is not None
    with pytest.raises(NotFoundError, match="/trace: no such file"):
        load_page_trace(f"{tmp_path}/trace", RegistryConfig())
    (tmp_path / "trace").write_bytes(encode_page_trace(runs))
    assert _convert(layout, "again", str(tmp_path / "trace")).encode() == rebuilt.encode()


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_rebuilt_image_equals_umoci_unpack(layout: Layout, tmp_path: Path) -> None:
    image = _Image(9)
    add_image(layout, [tar_of(image.files)], "image")
    oracles.run("umoci", "unpack", "--image", f"{layout.path}:image", tmp_path / "bundle")
    (tmp_path / "trace").write_bytes(encode_page_trace(image.trace()))
    assert len(_convert(layout, "rebuilt", str(tmp_path / "trace")).blobs) == 2
    for form in Form:
        flat = tmp_path / form.value
        oracles.run(oracles.BUILDER, "export", f"oci:{layout.path}:rebuilt", flat, "--form", form.value)
        erofs_utils.run("fsck.erofs", "--extract", flat)
        with LoaderNode(tmp_path / f"node-{form.value}", "--plane", "fanotify", "--form", form.value) as node:
            node.mount(f"oci:{layout.path}:rebuilt", tmp_path / "mnt")
            try:
                oracles.assert_same(tmp_path / "bundle/rootfs", tmp_path / "mnt", *oracles.ignoring_mtimes(UNDEFINED))
            finally:
                node.umount(tmp_path / "mnt")
