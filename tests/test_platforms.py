"""Which platform suits which."""

from __future__ import annotations

import pytest

from loader.registry.documents import suits


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("linux/amd64", "linux/amd64", True),
        ("linux/arm64/v8", "linux/arm64", True),
        ("linux/arm64", "linux/arm64/v8", True),
        ("linux/arm/v7", "linux/arm", True),
        ("linux/arm/v7", "linux/arm/v6", False),
        ("linux/arm64", "linux/arm", False),
        ("linux/amd64", "linux/arm64", False),
        ("windows/amd64", "linux/amd64", False),
    ],
)
def test_suits(found: str, wanted: str, expected: bool) -> None:
    assert suits(found, wanted) is expected
