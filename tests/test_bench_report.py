"""What the bench prints, saves and draws, from rows that were not measured."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import run
from bench.measure import Row, Sample, failed, ratios, shown, with_unit
from bench.picture import LEFT, RIGHT, WIDTH, draw, standing
from bench.report import notes, report
from bench.results import Results, load

MET = Row("R2", "pull / lazy <start>", "8 s", "Nydus 2 5.1×", 9.5, 9, larger=True, unit="×", peers={"Nydus 2": 5.1},
          commands=["nydusd fuse"], limit="the link alone needs 5 s", samples={"ours": [1.0, 2.0]})  # fmt: skip
BEHIND = Row("R13", "bytes | written", "1 MB", "-", 0.72, 0.36, larger=False, unit="×", note="frames are whole")
NO_GOAL = Row("R10", "random reads", "1 s", "-", 0.4, 0, larger=True, unit="×")


@pytest.fixture
def results() -> Results:
    results = Results("a machine", limits={"disk, read": 900.0})
    results.put({"R13", "R10"}, [BEHIND, NO_GOAL], 3, 1.0)
    results.put({"R2"}, [MET], 3, 2.0)
    results.put({"growth"}, [Row("growth", "memory", "1 MB", "-", 1.0, 1000, larger=False, unit=" MB")], 1, 1.0)
    results.put({"R9"}, [failed("R9", RuntimeError("no registry\nat all"))], 3, 0.0)
    return results


def test_results_survive_their_file(tmp_path: Path, results: Results) -> None:
    results.save(tmp_path / "bench.json")
    assert load(tmp_path / "bench.json") == results
    assert [known.row.number for known in results.rows] == ["R2", "R9", "R10", "R13", "growth"]
    assert load(tmp_path / "none.json").rows == []


def test_measuring_again_replaces_a_number(results: Results) -> None:
    results.put({"R13"}, [BEHIND, BEHIND], 5, 1.0)
    assert [known.runs for known in results.rows if known.row.number == "R13"] == [5, 5]
    assert len(results.rows) == 6


def test_the_page_tells_what_is_behind_and_why(results: Results) -> None:
    page = report(results, Path("docs/performance.svg"))
    assert "| R2 pull / lazy <start> | 8 s | Nydus 2 5.1× | 9.50× | ≥ 9× | yes |" in page
    assert "| R13 bytes \\| written | 1 MB | - | 0.72× | ≤ 0.36× | behind |" in page
    assert "- **R13 bytes | written**: frames are whole" in page
    assert "- **R9 not measured**: RuntimeError: no registry\n" in page
    assert "![Each figure against its goal, with those of the peers](performance.svg)" in page
    assert "nydusd fuse" in page and "the link alone needs 5 s" in page and "disk, read 900" in page
    assert "R2 $ nydusd fuse" in notes(results)


def test_the_picture_is_well_formed_and_within_its_bounds(results: Results) -> None:
    document = ElementTree.fromstring(draw(results))
    circles = [float(dot.get("cx", "")) for dot in document.iter("{http://www.w3.org/2000/svg}circle")][2:]
    assert len(circles) == 3  # neither the failed one nor the one without a goal
    assert all(LEFT <= x <= WIDTH - RIGHT for x in circles)
    assert circles[0] > circles[1]  # R2 is better than its goal, R13 is not


def test_standing_is_better_to_the_right() -> None:
    assert standing(MET, 18) == 2
    assert standing(BEHIND, 0.72) == 0.5
    assert standing(BEHIND, 0) > 1 > standing(MET, 0)


def test_values_have_few_digits() -> None:
    assert [with_unit(value, "×") for value in (0.345, 12.34, 1234.5)] == ["0.34×", "12.3×", "1234×"]
    assert ratios(Sample([4, 9]), Sample([2, 3])).values == [2, 3]


def test_commands_are_shown_without_places() -> None:
    command: list[str | Path] = [Path("/opt/peers/bin/nydusd"), "fuse", "--config", Path("/tmp/x/a/config.json"), "a b"]
    assert shown(command, Path("/tmp/x"), Path("/tmp/x/a")) == "nydusd fuse --config $W/config.json 'a b'"


def test_what_takes_too_long_ends() -> None:
    with pytest.raises(TimeoutError, match="1 s"), run._at_most(1):
        time.sleep(30)
