"""The results as a picture: one line a figure, its distance from the goal, and where the peers are. Plain SVG.

The scale is logarithmic and always runs so that right is better, whether more or less of the figure is good.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from html import escape

from bench.measure import Row, with_unit
from bench.results import Results

WIDTH, LEFT, RIGHT, TOP, STEP, BOTTOM = 1220, 500, 260, 92, 38, 34
LEAST, MOST = 1 / 8, 8
TICKS = ((1 / 8, "⅛×"), (1 / 4, "¼×"), (1 / 2, "½×"), (1, "goal"), (2, "2×"), (4, "4×"), (8, "8×"))
INK, QUIET, RULE, PEER = "#1f2328", "#59636e", "#d8dee4", "#8b949e"
MET, BEHIND = "#1a66b3", "#c4540a"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def draw(results: Results) -> str:
    """The SVG document."""
    rows = [known.row for known in results.rows if known.row.goal and not known.row.failure]
    height = TOP + STEP * len(rows) + BOTTOM
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' "
        f"{FONT} font-size='13'>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        _label(16, 26, "Each figure against its goal", INK, size=17, weight=600),
        *_legend(),
        *_scale(TOP - 12, height - BOTTOM + 4),
    ]
    for number, row in enumerate(rows):
        parts += _line(row, TOP + STEP * number + STEP / 2)
    parts.append(_label(16, height - 12, f"{results.machine}; right of the goal is better", QUIET, size=11))
    return "\n".join([*parts, "</svg>"]) + "\n"


def standing(row: Row, value: float) -> float:
    """How many times better than the goal a value is."""
    if value <= 0:
        return LEAST if row.larger else MOST
    return value / row.goal if row.larger else row.goal / value


def _position(standing: float) -> float:
    bounded = min(max(standing, LEAST), MOST)
    share = math.log(bounded / LEAST) / math.log(MOST / LEAST)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _legend() -> Iterator[str]:
    y = 50
    yield _dot(22, y - 4, MET) + _label(34, y, "ours, goal met", QUIET)
    yield _dot(152, y - 4, BEHIND) + _label(164, y, "ours, behind the goal", QUIET)
    yield _diamond(326, y - 4) + _label(338, y, "a peer, in the same run", QUIET)


def _scale(top: float, bottom: float) -> Iterator[str]:
    for value, text in TICKS:
        x = _position(value)
        stroke = f"stroke='{INK}' stroke-width='1.5'" if value == 1 else f"stroke='{RULE}'"
        yield f"<line x1='{x:.1f}' y1='{top}' x2='{x:.1f}' y2='{bottom}' {stroke}/>"
        yield _label(x, top - 6, text, INK if value == 1 else QUIET, anchor="middle", size=11)


def _line(row: Row, y: float) -> Iterator[str]:
    color = MET if row.met else BEHIND
    ours = _position(standing(row, row.value))
    what = textwrap.shorten(row.what, 62, placeholder=" …")
    yield _label(16, y + 4, row.number, INK, weight=600)
    yield _label(68, y + 4, what, INK)
    yield f"<line x1='{_position(1):.1f}' y1='{y}' x2='{ours:.1f}' y2='{y}' stroke='{color}' stroke-width='3'/>"
    yield from _peers(row, y)
    yield f"<g><title>{escape(f'{row.number} {row.what}: {row.figure}')}</title>{_dot(ours, y, color)}</g>"
    sign = "≥" if row.larger else "≤"
    yield _label(WIDTH - RIGHT + 16, y + 4, row.figure, color, weight=600)
    text = f"goal {sign} {row.goal:g}{row.unit}" + ("" if row.met else ", behind")
    yield _label(WIDTH - RIGHT + 96, y + 4, text, QUIET)


def _peers(row: Row, y: float) -> Iterator[str]:
    """The peers' marks. Those that nearly touch have one name tag; else the tags go above and below in turn."""
    tags: list[tuple[float, str]] = []
    for name, value in sorted(row.peers.items(), key=lambda peer: standing(row, peer[1])):
        x = _position(standing(row, value))
        yield f"<g><title>{escape(f'{name}: {with_unit(value, row.unit)}')}</title>{_diamond(x, y)}</g>"
        if tags and x - tags[-1][0] < 25:
            tags[-1] = (x, f"{tags[-1][1]}, {name}")
        else:
            tags.append((x, name))
    for number, (x, text) in enumerate(tags):
        yield _label(x, y + 15 if number % 2 else y - 8, text, QUIET, anchor="middle", size=10)


def _dot(x: float, y: float, color: str) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5.5' fill='{color}' stroke='#ffffff' stroke-width='1.5'/>"


def _diamond(x: float, y: float) -> str:
    return f"<path d='M{x:.1f} {y - 5:.1f} l5 5 l-5 5 l-5 -5 z' fill='#ffffff' stroke='{PEER}' stroke-width='1.5'/>"


def _label(
    x: float, y: float, text: str, color: str, *, anchor: str = "start", size: int = 13, weight: int = 400
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' fill='{color}' text-anchor='{anchor}' font-size='{size}' "
        f"font-weight='{weight}'>{escape(text)}</text>"
    )
