"""An image that many ask for at once is looked up and fetched once; adding one does not touch what others know."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.claims import LEAST_AHEAD, FlightTable
from loader.cache.layout import Layout
from loader.cache.state import State
from loader.convert.convert import Request, convert
from loader.errors import NotFoundError
from loader.registry.base import ImageSource
from loader.registry.config import RegistryConfig
from loader.registry.open import open_image
from loader.trace import TRACE_TYPE
from loader.worker.counters import Counters
from loader.worker.images import Images
from loader.worker.link_estimate import LinkEstimate
from loader.worker.readahead import ReadAhead
from loader.worker.sources import Sources
from loader.worker.starts import Starts

CLIENTS = 8


class _Slow:
    """A source whose first lookup waits until everybody has asked."""

    def __init__(self, source: ImageSource, gate: threading.Event) -> None:
        self._source, self._gate = source, gate
        self.lookups = 0
        self.listed: list[str] = []  # types of which the referrers were listed

    def resolve(self, reference: str) -> Any:
        self.lookups += 1
        assert self._gate.wait(30)
        return self._source.resolve(reference)

    def referrers(self, subject: Digest, artifact_type: str) -> Any:
        self.listed.append(artifact_type)
        return self._source.referrers(subject, artifact_type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def opened() -> list[_Slow]:
    return []


@pytest.fixture
def images(tmp_path: Path, gate: threading.Event, opened: list[_Slow]) -> Iterator[Images]:
    layout = Layout(tmp_path / "node")
    layout.prepare()
    state = State(layout.database)

    def open_source(text: str) -> ImageSource:
        opened.append(_Slow(open_image(text, RegistryConfig())[0], gate))
        source: Any = opened[-1]
        return source  # type: ignore[no-any-return]

    flights = FlightTable(1, 1, (1, 1, 1), lambda: 0)
    starts = Starts(layout, flights, ReadAhead(LinkEstimate(), 0))
    sources = Sources(open_source)
    yield Images(layout, state, sources, Counters(), starts)
    sources.close()
    state.close()


def _image(directory: Path, name: str, content: bytes = b"") -> str:
    tree = directory / name
    tree.mkdir()
    (tree / "file").write_bytes(content or f"content of {name}".encode() * 500)
    reference = f"oci:{directory}/layout:{name}"
    convert(Request(f"rootfs:{tree}", reference), RegistryConfig())
    return reference


def _ask(images: Images, reference: str, gate: threading.Event) -> list[Any]:
    """Add an image from many threads; nothing is looked up before all have asked."""
    fetch_once, asking = images._fetch_once, itertools.count(1)

    def counted(*arguments: Any) -> Any:
        if next(asking) == CLIENTS:
            threading.Timer(0.1, gate.set).start()
        return fetch_once(*arguments)

    def add(_: int) -> Any:
        try:
            return images.add(reference, Form.ENCODED)
        except NotFoundError as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(CLIENTS) as pool:
        patch.setattr(images, "_fetch_once", counted)
        return list(pool.map(add, range(CLIENTS)))


def test_one_lookup_for_all(tmp_path: Path, images: Images, gate: threading.Event, opened: list[_Slow]) -> None:
    records = _ask(images, _image(tmp_path, "one"), gate)
    assert all(record == records[0] for record in records)
    assert sum(source.lookups for source in opened) == 1
    assert images.payloads.sound(records[0].digest, Form.ENCODED).tables


def test_a_trace_is_asked_for_where_there_is_much_to_choose_from(
    tmp_path: Path, images: Images, gate: threading.Event, opened: list[_Slow]
) -> None:
    gate.set()
    images.add(_image(tmp_path, "small"), Form.ENCODED)
    assert opened[0].listed == []
    images.add(_image(tmp_path, "large", os.urandom(LEAST_AHEAD)), Form.ENCODED)
    assert opened[0].listed == [TRACE_TYPE]


def test_a_failure_is_everybodys_and_not_for_ever(tmp_path: Path, images: Images, gate: threading.Event) -> None:
    reference = f"oci:{tmp_path}/layout:late"
    _image(tmp_path, "other")
    assert {type(answer) for answer in _ask(images, reference, gate)} == {NotFoundError}
    _image(tmp_path, "late")
    assert images.add(reference, Form.ENCODED).name == reference


def test_tags_and_sources_of_every_image_are_known(tmp_path: Path, images: Images, gate: threading.Event) -> None:
    gate.set()
    records = [images.add(_image(tmp_path, name), Form.ENCODED) for name in ("a", "b")]
    reloaded = dict(images._tags)
    assert len(reloaded) == 4  # a blob each, in two forms
    images.reload()
    assert images._tags == reloaded
    assert [images._sources.count(record.blobs[0][0]) for record in records] == [1, 1]
