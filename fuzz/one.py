"""One target under atheris: `python -m fuzz.one TARGET [libFuzzer options] [corpus]`. fuzz.run starts these."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["loader", "erofs_builder", "cachefiles", "fanotify", "fuzz"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer's options say that it is enough."""
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup([*sys.argv, f"-max_len={target.longest}"], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
