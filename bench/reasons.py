"""What profiles said about figures that are behind their goals: why, and what comes next.

A row's own note comes before these. Looked up by number and by a part of what the row says that it measures.
"""

from __future__ import annotations

from bench.measure import Row

_REASONS: list[tuple[str, str, str]] = []


def reason(row: Row) -> str:
    """Why a row is behind, as far as it is known."""
    return next((text for number, part, text in _REASONS if number == row.number and part in row.what), "")
