"""`erofs-builder convert`: a source image or directory in, a published artifact out."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from erofs_builder.command import Command
from erofs_builder.digest import Digest
from erofs_builder.hot import keep_memory
from erofs_builder.layer import Layer, Options
from erofs_builder.model import Blob, Node
from erofs_builder.payload import PAYLOAD_LEVEL
from erofs_builder.pieces import Base
from loader.artifact import ARTIFACT_TYPE, INDEX_TYPE, descriptor_to_json
from loader.convert.layers import blob_path, convert_layer
from loader.convert.progress import NoProgress, Progress, Task
from loader.convert.side_by_side import side_by_side
from loader.convert.source import ALL_PLATFORMS, SourceImage, SourceIndex, SourceLayer, load_source
from loader.convert.tag import check_tag
from loader.errors import NotFoundError, UsageError
from loader.registry.base import Descriptor, ImageTarget
from loader.registry.config import RegistryConfig
from loader.registry.documents import encode_index
from loader.registry.layout import Layout
from loader.registry.open import check_target, open_image, open_reference, open_target
from loader.registry.patience import patiently
from loader.registry.reference import RootfsReference, parse_reference

if TYPE_CHECKING:
    from erofs_builder.page_trace import PageRun
    from erofs_builder.startup_layout import Relaid
    from loader.convert.assemble import Assembled
    from loader.convert.base import BaseArtifact
    from loader.convert.publish import Published

# What is done with layers once they are converted is loaded while that goes on: nothing else is done before it.
_AFTERWARDS = ("loader.convert.assemble", "loader.convert.publish", "loader.convert.start")
_AT_ONCE = 4  # layers
_SWITCH = 0.0005  # seconds


@dataclass(frozen=True, slots=True)
class Request:
    """What to convert, and how."""

    source: str
    target: str
    platform: str | None = None
    base: str | None = None
    options: Options = field(default_factory=Options)
    metadata_level: int = PAYLOAD_LEVEL  # zstd
    trace: str | None = None  # a file, or an image whose trace is taken


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """A source layer and what became of it."""

    source: Descriptor | None
    layer: Layer
    file: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class Converted:
    """One image's artifact."""

    platform: str
    subject: Descriptor | None
    layers: tuple[ConvertedLayer, ...]
    assembled: Assembled
    published: Published


@dataclass(frozen=True, slots=True)
class Result:
    """All of a conversion; `index` is the artifact index of a multi-platform one."""

    target: str
    tag: str | None
    images: tuple[Converted, ...]
    index: Descriptor | None
    seconds: float


def lean_memory() -> None:
    """Settings for a process that does nothing but convert: keep freed chunks, look for no cycles of garbage, and have
    threads wait less for each other."""
    keep_memory()
    gc.disable()  # millions of nodes, which die by their counts alone
    sys.setswitchinterval(_SWITCH)  # a thread that has compressed a batch is to get the next one soon


def convert(request: Request, config: RegistryConfig, progress: Progress | None = None) -> Result:
    """Convert and publish; the source is never changed."""
    started = time.monotonic()
    progress = progress or NoProgress()
    reference = parse_reference(request.source)
    check_target(request.target)
    if isinstance(reference, RootfsReference):
        _check_rootfs(reference.path, request.platform)
    with ExitStack() as stack:
        found = None
        if not isinstance(reference, RootfsReference):
            source, name = open_reference(reference, config)
            stack.callback(source.close)
            found = load_source(source, name, request.platform)
        base = _open_base(request, config, stack)
        platform = None if request.platform == ALL_PLATFORMS else request.platform
        trace = _load_trace(request.trace, config, platform) if request.trace else ()
        target, tag = open_target(request.target, config)  # last: a mistyped source leaves no empty layout
        stack.callback(target.close)
        if tag:
            check_tag(target, str(check_target(request.target)), tag, _digests(found))
        directory = Path(stack.enter_context(_work_directory(target)))
        work = _Conversion(request, base, trace, target, directory, progress)
        index = None
        if isinstance(reference, RootfsReference):
            images: tuple[Converted, ...] = (work.convert_rootfs(reference.path, tag),)
        else:
            assert found is not None
            several = found.index is not None
            images = tuple(work.convert_image(image, None if several else tag) for image in found.images)
            index = _publish_index(images, found.images, found.index, target, tag) if found.index else None
        return Result(request.target, tag, images, index, time.monotonic() - started)


def _check_rootfs(root: Path, platform: str | None) -> None:
    if platform:
        raise UsageError("a directory has no platforms", "leave --platform out")
    if not root.is_dir():
        raise NotFoundError(f"rootfs:{root}: no such directory")


def _digests(found: SourceIndex | None) -> set[Digest]:
    """Of all that a source's tag may name."""
    return {found.named.digest, *(image.descriptor.digest for image in found.images)} if found else set()


def _open_base(request: Request, config: RegistryConfig, stack: ExitStack) -> BaseArtifact | None:
    if not request.base:
        return None
    from loader.convert.base import load_base

    source, name = open_image(request.base, config)
    stack.callback(source.close)
    return load_base(source, name, None if request.platform == ALL_PLATFORMS else request.platform)


def _load_trace(name: str, config: RegistryConfig, platform: str | None) -> Sequence[PageRun]:
    from loader.trace import load_page_trace

    return load_page_trace(name, config, platform)


def _work_directory(target: ImageTarget) -> tempfile.TemporaryDirectory[str]:
    """Where blobs are written: for a layout beside its blobs, so that they need only be renamed."""
    inside = str(target.path) if isinstance(target, Layout) else None
    return tempfile.TemporaryDirectory(prefix=".convert-", dir=inside)


class _Conversion:
    """Layers that were converted already are kept: images of one index share them."""

    def __init__(
        self,
        request: Request,
        base: BaseArtifact | None,
        trace: Sequence[PageRun],
        target: ImageTarget,
        directory: Path,
        progress: Progress,
    ) -> None:
        self.base = base
        self._trace = trace
        self._request = request
        self._target = target
        self._directory = directory
        self._progress = progress
        self._done: dict[Digest, ConvertedLayer] = {}

    def convert_image(self, image: SourceImage, tag: str | None) -> Converted:
        """One platform's image."""
        layers = self._layers(image)
        return self._finish(image.platform_text, image.subject, layers, tag, image.command)

    def convert_rootfs(self, root: Path, tag: str | None) -> Converted:
        """A directory as an image of one layer."""
        from erofs_builder.rootfs import build_rootfs

        started = time.monotonic()
        file = blob_path(self._directory, 0)
        with file.open("wb") as out, self._progress.task("reading the directory", None) as task:
            layer = build_rootfs(root, out, base=self._pieces, options=self._request.options, on_progress=task.advance)
        return self._finish("", None, (ConvertedLayer(None, layer, file, time.monotonic() - started),), tag)

    @property
    def _pieces(self) -> Base | None:
        return self.base.pieces if self.base else None

    def _layers(self, image: SourceImage) -> tuple[ConvertedLayer, ...]:
        """The image's layers, several at once; they share the threads that compress."""
        found = {layer.descriptor.digest: layer for layer in image.layers}
        # The largest first: what is left for the end is small.
        new = sorted((layer for digest, layer in found.items() if digest not in self._done), key=_size, reverse=True)
        files = {
            layer.descriptor.digest: blob_path(self._directory, len(self._done) + at) for at, layer in enumerate(new)
        }
        threads = self._request.options.threads
        with (
            self._progress.task(f"{len(new)} layers", sum(map(_size, new))) as task,
            ThreadPoolExecutor(threads, thread_name_prefix="frames") as pool,
        ):
            options = replace(self._request.options, pool=pool)

            def convert(layer: SourceLayer, task: Task) -> ConvertedLayer:
                started = time.monotonic()
                file = files[layer.descriptor.digest]
                with file.open("wb") as out:
                    built = convert_layer(image.source, layer, out, options, self._pieces, task)
                return ConvertedLayer(layer.descriptor, built, file, time.monotonic() - started)

            loading = Thread(target=_load, args=_AFTERWARDS, name="loading")
            loading.start()
            for done in side_by_side(convert, new, task, min(threads, _AT_ONCE)):
                assert done.source is not None
                self._done[done.source.digest] = done
            loading.join()
        return tuple(self._done[layer.descriptor.digest] for layer in image.layers)

    def _finish(
        self,
        platform: str,
        subject: Descriptor | None,
        layers: tuple[ConvertedLayer, ...],
        tag: str | None,
        command: Command | None = None,
    ) -> Converted:
        from loader.convert.assemble import assemble
        from loader.convert.publish import publish
        from loader.convert.start import frame_reader, start_list

        base = self.base.blobs if self.base else ()
        files = {item.layer.blob.digest: item.file for item in layers if item.layer.blob}
        base_source = self.base.source if self.base else None
        read_frame = frame_reader(files, base_source)
        start = partial(start_list, command=command, read_frame=read_frame) if command else None
        with self._progress.task("metadata", None):
            assembled = assemble(
                [item.layer for item in layers],
                subject,
                base,
                self._request.metadata_level,
                start,
                partial(self._rebuild, files, read_frame) if self._trace else None,
                consume=self._request.platform != ALL_PLATFORMS,
            )
        published = publish(assembled, files, base_source, self._target, tag, self._progress)
        return Converted(platform, subject, layers, assembled, published)

    def _rebuild(
        self, files: dict[Digest, Path], read_frame: Callable[[Blob, int], bytes], root: Node
    ) -> Relaid | None:
        """Write the blob of the traced start, and note it among the files."""
        from erofs_builder.startup_layout import rebuild

        file = self._directory / f"start-{len(files)}"
        with file.open("wb") as out, self._progress.task("start-up blob", None):
            relaid = rebuild(root, self._trace, read_frame, out, self._request.options.threads)
        if relaid:
            files[relaid.blob.digest] = file
        return relaid


def _load(*modules: str) -> None:
    for module in modules:
        import_module(module)


def _size(layer: SourceLayer) -> int:
    return layer.descriptor.size


def _publish_index(
    converted: tuple[Converted, ...],
    sources: tuple[SourceImage, ...],
    subject: Descriptor,
    target: ImageTarget,
    tag: str | None,
) -> Descriptor:
    """The artifact index: one artifact per platform, with the source index as its subject."""
    from loader.convert.publish import as_newest

    entries = [
        replace(item.published.descriptor, artifact_type=ARTIFACT_TYPE, platform=source.platform, annotations={})
        for item, source in zip(converted, sources, strict=True)
    ]
    bare = Descriptor(subject.media_type, subject.digest, subject.size)

    def encode(annotations: dict[str, str]) -> bytes:
        extra = {"annotations": annotations} if annotations else {}
        return encode_index(entries, artifactType=ARTIFACT_TYPE, subject=descriptor_to_json(bare), **extra)

    data = as_newest(target, bare, encode)
    return patiently(lambda: target.put_manifest(INDEX_TYPE, data, tag))
