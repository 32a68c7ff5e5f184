"""Traces: published beside an artifact, found again, and used when the image is mounted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.hints import Hints
from erofs_builder.payload import Form
from loader.artifact import ARTIFACT_TYPE, MANIFEST_TYPE, Artifact
from loader.cache.claims import FlightTable
from loader.cache.layout import Layout as CacheLayout
from loader.registry.layout import Layout
from loader.trace import CREATED_ANNOTATION, TRACE_ANNOTATION, TRACE_TYPE, encode_trace, find_trace, publish_trace
from loader.worker.link_estimate import LinkEstimate
from loader.worker.readahead import ReadAhead
from loader.worker.starts import FOLLOWERS, PAUSE, START, TRACE, Starts
from tests.support.cache_files import open_file, sample
from tests.support.oci import new_layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_layout(tmp_path / "oci")


def _artifact(layout: Layout) -> Digest:
    descriptor = layout.put_manifest(MANIFEST_TYPE, Artifact([], {}).encode(), "t")
    assert descriptor.artifact_type == ARTIFACT_TYPE
    return descriptor.digest


def test_the_newest_usable_trace_is_found(layout: Layout) -> None:
    artifact = _artifact(layout)
    assert find_trace(layout, artifact) == ""
    publish_trace(layout, artifact, "0:1-3", created=1.0)
    publish_trace(layout, artifact, "0:1-3 1:7", created=3.0)
    publish_trace(layout, artifact, "0:4", created=2.0)
    assert find_trace(layout, artifact) == "0:1-3 1:7"
    publish_trace(layout, artifact, "nonsense")
    assert find_trace(layout, artifact) == "0:1-3 1:7"


def test_a_list_without_annotations(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = _artifact(layout)
    publish_trace(layout, artifact, "0:9")
    entries = layout.referrers(artifact, TRACE_TYPE)
    for entry in entries:
        entry.annotations.clear()
    monkeypatch.setattr(layout, "referrers", lambda subject, artifact_type: entries)
    assert find_trace(layout, artifact) == "0:9"
    assert find_trace(layout, Digest.of(b"another")) == ""


def test_the_manifest_is_an_ordinary_oci_one(layout: Layout) -> None:
    artifact = layout.resolve(str(_artifact(layout)))
    document = json.loads(encode_trace(artifact, "0:1", 0.0))
    assert document["subject"]["digest"] == str(artifact.digest)
    assert document["annotations"] == {
        TRACE_ANNOTATION: "0:1",
        CREATED_ANNOTATION: "1970-01-01T00:00:00Z",
    }
    assert [layer["size"] for layer in document["layers"]] == [2]


def _starts(tmp_path: Path) -> tuple[Starts, FlightTable, ReadAhead]:
    layout = CacheLayout(tmp_path / "cache")
    layout.prepare()
    flights, ahead = FlightTable(4, 4, (1 << 20, 1 << 20, 1 << 20)), ReadAhead(LinkEstimate(), 2 << 20)
    return Starts(layout, flights, ahead), flights, ahead


def test_a_mount_fetches_the_list_and_a_trace_replaces_it(tmp_path: Path) -> None:
    starts, flights, _ = _starts(tmp_path)
    file = open_file(tmp_path / "file", sample(40), Form.ENCODED)
    image = Digest.of(b"image")
    starts.fetch(image, [file])
    assert len(flights) == 0
    starts.remember(image, START, "0:1-3")
    assert starts.places(image) == [(0, 1), (0, 2), (0, 3)]
    starts.remember(image, TRACE, "0:12 0:7 0:11 0:100-200 5:1")
    starts.fetch(image, [file, None])
    run = flights.take()
    assert run is not None and [flight.frame for flight in run.flights] == [7]
    run = flights.take()
    assert run is not None and [flight.frame for flight in run.flights] == [11, 12]
    starts.remember(image, TRACE, "what?")
    assert starts.places(image) == [(0, 1), (0, 2), (0, 3)]


def test_a_trace_is_the_order_of_first_reads(tmp_path: Path) -> None:
    starts, _, ahead = _starts(tmp_path)
    first = open_file(tmp_path / "first", sample(40), Form.ENCODED)
    second = open_file(tmp_path / "second", sample(50), Form.ENCODED)
    for file, frames in ((first, range(4, 6)), (second, range(9, 10)), (first, range(3, 5)), (second, range(9, 10))):
        ahead.after(file, frames)
    assert starts.trace([[first], [second]]) == "0:4-5 1:9 0:3"


def test_nothing_is_guessed_from_what_is_listed(tmp_path: Path) -> None:
    _, _, ahead = _starts(tmp_path)
    file = open_file(tmp_path / "file", sample(40), Form.ENCODED)
    ahead.learn(file.blob.raw, len(file.table), Hints({frame: range(20, 24) for frame in range(20, 24)}))
    ahead.expect(file.blob.raw, [20, 21])
    assert ahead.after(file, range(20, 21)) == []
    assert ahead.after(file, range(22, 23)) == [23, 21]


def test_what_follows_may_depend_on_what_was_read_before(tmp_path: Path) -> None:
    files = [open_file(tmp_path / name, sample(40), Form.ENCODED) for name in ("one", "other")]
    image = Digest.of(b"image")
    for read, expected in ((None, [6, 7]), ((0, 30), [6, 7]), ((0, 3), [6]), ((1, 9), [6])):
        starts, _, ahead = _starts(tmp_path)
        starts.remember(image, START, "0:1")
        starts.remember(image, FOLLOWERS, "0:5>0:6 0:5!0:3-4,1:9,1:900,7:1>0:7")
        starts.fetch(image, files)
        starts.fetch(image, files)  # mounted once more: as if once
        if read is not None:
            ahead.after(files[read[0]], range(read[1], read[1] + 1))
        assert ahead.followers(files[0], range(5, 6)) == [(files[0], frame) for frame in expected]


def test_what_follows_is_told_once_and_not_with_a_trace(tmp_path: Path) -> None:
    starts, _, ahead = _starts(tmp_path)
    one = open_file(tmp_path / "one", sample(40), Form.ENCODED)
    other = open_file(tmp_path / "other", sample(50), Form.ENCODED)
    image = Digest.of(b"image")
    starts.remember(image, START, "0:3 0:1")
    starts.remember(image, FOLLOWERS, "0:5>0:6,1:7-8,1:900,7:1 3:1>0:1")
    starts.fetch(image, [one, other])
    assert not starts.complete(image)
    assert ahead.followers(one, range(4, 6)) == [(one, 6), (other, 7), (other, 8)]
    assert ahead.followers(one, range(4, 6)) == ahead.followers(other, range(40)) == []
    starts.remember(image, TRACE, "0:9")
    starts.fetch(image, [one, other])
    assert ahead.followers(one, range(4, 6)) == [] and starts.complete(image)
    starts.remember(image, TRACE, "")
    starts.remember(image, START, "1:0-8")
    assert starts.complete(image)
    assert starts.pause(image) == starts.pause(image, [one, other]) == PAUSE
    for frame in range(9):
        other.ready.set(frame)
    assert starts.pause(image, [one, other]) == 0.0
    starts.remember(image, START, "0:3 0:1")
    assert starts.pause(image) == 0.0


def test_what_was_read_of_a_file_without_a_mark_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, _, ahead = _starts(tmp_path)
    file = open_file(tmp_path / "file", sample(9), Form.ENCODED)
    ahead.after(file, range(4, 6))
    for frame in range(9):
        file.ready.set(frame)
    ahead.after(file, range(1, 2))
    assert starts.trace([[file]]) == "0:4-5 0:1", "whole, and still marked"
    file.completed = True
    assert starts.trace([[file]]) == "0:4-5 0:1 0:0 0:2-3 0:6-8"
    monkeypatch.setattr("loader.worker.starts.SMALL", 4096)
    assert starts.trace([[file]]) == "0:4-5 0:1"
