"""`kernels.toml` as objects, and where built kernels are cached."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TABLE = HERE / "kernels.toml"


@dataclass(frozen=True)
class Kernel:
    """One row of the table; see the comment at its top."""

    name: str
    origin: str
    package: str
    suite: str
    config: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    root: str

    def cell_of(self, plane: str) -> tuple[str, str] | None:
        """Its first cell of that plane."""
        return next((cell for cell in self.cells if cell[0] == plane), None)

    def fragment(self) -> str:
        """The config fragments in order."""
        return "".join((HERE / "config" / name).read_text() for name in self.config)


@dataclass(frozen=True)
class Image:
    """A kernel that can boot: its file, its version as Debian counts, the modules to load in the guest."""

    kernel: Kernel
    version: str
    vmlinuz: Path
    modules: tuple[Path, ...]


def load(path: Path = TABLE) -> dict[str, Kernel]:
    """The table, in its order."""
    return {name: _kernel(name, row) for name, row in tomllib.loads(path.read_text()).items()}


def _kernel(name: str, row: dict[str, object]) -> Kernel:
    cells = [str(cell).split("/") for cell in _strings(row["cells"])]
    return Kernel(
        name=name,
        origin=str(row["from"]),
        package=str(row["package"]),
        suite=str(row["suite"]),
        config=tuple(_strings(row["config"])),
        cells=tuple((plane, form) for plane, form in cells),
        root=str(row["root"]),
    )


def _strings(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {value!r}")
    return [str(item) for item in value]


def cache_root() -> Path:
    """Where kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "erofs-ondemand" / "kernels"
