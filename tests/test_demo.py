"""The demo runs from end to end, natively and with a virtual machine as the node; over a fast link, to be quick."""

from __future__ import annotations

import json

import pytest

from tests.support import oracles

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]
FAST = ["--rate", "200e6", "--rtt", "0.001"]


def test_demo_fetches_less_than_the_image() -> None:
    figures = json.loads(oracles.run(oracles.PYTHON, "-m", "bench.demo", "--json", *FAST))
    full, lazy = figures["ways"]
    assert full["fetched"] > figures["compressed"]
    assert 0 < lazy["fetched"] < figures["compressed"] / 4


@pytest.mark.vm
def test_demo_in_a_virtual_machine() -> None:
    output = oracles.run(oracles.PYTHON, "-m", "bench.demo_vm", *FAST, timeout=800)
    assert "pull, unpack, start" in output and "mount, start (guest)" in output
