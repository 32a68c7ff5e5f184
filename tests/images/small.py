"""50,000 small files in one layer, as a language's package tree has them; written by GNU tar."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.images.layout import write_layers

FILES = 50_000
WORDS = ("import", "return", "value", "class", "self", "data", "name", "index", "error", "result", "config", "path")


def _write_tree(root: Path) -> None:
    generator = random.Random(50_000)
    for number in range(FILES):
        package, module = divmod(number, 250)
        directory = root / f"lib/package{package:03}/part{module % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        size = int(generator.paretovariate(1.1) * 200) % 60_000
        # Text that compresses as sources do, not noise and not one repeated line.
        words = generator.choices(WORDS, k=size // 6 + 1)
        text = f"# {package}/{module}\n" + " ".join(words)
        (directory / f"module{module:03}.py").write_text(text[:size] if number % 50 else "")


def build_small(directory: Path) -> None:
    """Make the image in `directory`/oci."""
    root, tar = directory / "tree", directory / "layer.tar"
    _write_tree(root)
    subprocess.run(
        ["tar", "-C", root, "--sort=name", "--owner=0", "--group=0", "--mtime=@1700000000", "-cf", tar, "."], check=True
    )
    write_layers(directory / "oci", [tar], ["zstd"], {"Cmd": ["/bin/true"]})
    subprocess.run(["rm", "-rf", root, tar], check=True)
