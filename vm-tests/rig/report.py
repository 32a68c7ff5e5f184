"""docs/kernels.md out of a run's JSON: the matrix, what was measured on the way, and the kernels."""

from __future__ import annotations

from typing import Any

from rig.host import fits, place, scenarios, title
from rig.table import Kernel

HEAD = """# Kernels

What was run where, and how it ended. This page is generated: `vm-tests/run --report docs/kernels.md` boots every kernel
of `vm-tests/kernels.toml` under QEMU, runs every scenario in every cell (a plane and a form of a kernel) and writes it;
*host* is the kernel of the machine that ran it, without QEMU. A time is that of the whole scenario, with its own boots;
of scenarios that share a boot the first one has it in its time. The machines are emulated and several ran at once, so
it says nothing about speed. Within them the daemon's processes are forks of one that has imported the program; the
host's own row and systemd_unit start them as they are installed. *Lost* is a machine that ended without an answer; it
is neither passed nor failed. An empty place: the scenario is not for that cell. Of what is played once a kernel, or
once a plane, the other cells say where.

With `--merge` a result stays until its scenario is run again in its cell, so the page may hold results of several runs
and commits: the last table says which. Of a scenario that failed and was run again only the later result is here.
"""

LIMITS = """## What a kernel cannot do

From the kernels' sources and change logs; only what the matrix above holds was run here.

| kernels | limit | what a user gets there |
|---|---|---|
| before 5.19 | no cachefiles on-demand mode, no file-backed EROFS | `probe` exits 13 and names the options |
| 5.19 to 6.7, as released | cachefiles without `restore` and without a second OPEN of a lost object | after the \
keeper's death readers of data not yet cached get EIO until the image is mounted anew (Debian's 6.1.192 has both) |
| Debian 12 and 13 as shipped (6.1, 6.12) | no pre-content events, `CONFIG_CACHEFILES_ONDEMAND` is not set | nothing \
is served: `probe` and `serve` end with 13 (*trixie* above); trixie-backports' kernel has the fanotify plane |
| before 6.10 | no zstd in EROFS | decoded form only |
| cachefiles before 6.12 | a write at an unaligned offset lands at the rounded-down one | whole, aligned \
4 KiB blocks only |
| fanotify before 7.1 | metadata reads raise no event | metadata is fetched whole and verified before the mount |
| 7.1.8, 7.2 and later | cachefiles on-demand mode is gone | the fanotify plane |
"""

HOW = {"source": "built from source", "stock": "Debian's own", "host": "the machine's own, without QEMU"}
Results = list[dict[str, Any]]


def merged(known: Results, result: dict[str, Any], kernels: dict[str, Kernel]) -> Results:
    """The results with this one in its place: by cell in the table's order, then by scenario."""
    order = [(name, *cell) for name, kernel in kernels.items() for cell in kernel.cells]
    kept = {_key(one): one for one in known if _key(one)[:3] in order} | {_key(result): result}
    return [kept[key] for key in sorted(kept, key=lambda key: (order.index(key[:3]), key[3]))]


def _key(result: dict[str, Any]) -> tuple[str, str, str, str]:
    return result["kernel"], result["plane"], result["form"], result["scenario"]


def page(results: Results, kernels: dict[str, Kernel]) -> str:
    """The whole page, Markdown."""
    parts = [
        HEAD,
        _matrix(results, kernels),
        _titles(results),
        _kernels(results, kernels),
        _facts(results),
        _commits(results),
        LIMITS,
    ]
    return "\n".join(parts)


def _matrix(results: Results, kernels: dict[str, Kernel]) -> str:
    cells = list(dict.fromkeys((r["kernel"], r["plane"], r["form"]) for r in results))
    names = sorted({r["scenario"] for r in results})
    found = {_key(result): result for result in results}
    head = "| scenario | " + " | ".join(f"{kernel}<br>{plane}, {form}" for kernel, plane, form in cells) + " |"
    rows = [head, "|---|" + "---|" * len(cells)]
    for name in names:
        places = (_place(found, name, kernels[cell[0]], *cell[1:], kernels) for cell in cells)
        rows.append(f"| {name} | " + " | ".join(places) + " |")
    return "## The matrix\n\n" + "\n".join(rows) + "\n"


def _place(
    found: dict[tuple[str, str, str, str], dict[str, Any]],
    name: str,
    kernel: Kernel,
    plane: str,
    form: str,
    kernels: dict[str, Kernel],
) -> str:
    """What one cell says of a scenario."""
    result = found.get((kernel.name, plane, form, name))
    if result is None:
        scenario = scenarios().get(name)
        if scenario is None or not fits(scenario, kernel, plane, form):
            return ""
        other = place(scenario, kernel, plane, form, kernels)
        return f"on {other[0]}, {other[2]}" if (*other, name) in found else ""
    if result["outcome"] == "passed":
        return f"passed, {result['seconds']:.0f} s"
    return f"**{result['outcome']}**: {result['message'].splitlines()[0][:120]}".replace("|", "\\|")


def _titles(results: Results) -> str:
    used = {result["scenario"] for result in results}
    rows = [f"- **{name}**: {title(scenario)}" for name, scenario in scenarios().items() if name in used]
    return "## Scenarios\n\n" + "\n".join(rows) + "\n"


def _kernels(results: Results, kernels: dict[str, Kernel]) -> str:
    rows = ["| name | package | release | how |", "|---|---|---|---|"]
    for name, kernel in kernels.items():
        releases = sorted({r["release"] for r in results if r["kernel"] == name and r["release"]})
        if releases:
            package = f"{kernel.package} ({kernel.suite})" if kernel.origin != "host" else ""
            rows.append(f"| {name} | {package} | {', '.join(releases)} | {HOW[kernel.origin]} |")
    return "## Kernels of this run\n\n" + "\n".join(rows) + "\n"


def _commits(results: Results) -> str:
    rows = ["| commit | scenarios in cells |", "|---|---|"]
    for commit in sorted({result["commit"] for result in results}):
        own = [result for result in results if result["commit"] == commit]
        cells: dict[str, list[str]] = {}
        for one in own:
            cells.setdefault(f"{one['kernel']} {one['plane']}/{one['form']}", []).append(one["scenario"])
        places = "; ".join(f"{cell}: {', '.join(names)}" for cell, names in cells.items())
        rows.append(f"| {commit} | {places} |")
    return "## Commits\n\n" + "\n".join(rows) + "\n"


def _facts(results: Results) -> str:
    rows = ["| cell | scenario | measured | value |", "|---|---|---|---|"]
    for result in results:
        cell = f"{result['kernel']} {result['plane']}/{result['form']}"
        for name, value in result["facts"].items():
            text = f"{value:,}" if isinstance(value, int) else str(value)
            rows.append(f"| {cell} | {result['scenario']} | {name} | {text} |")
    return "## Measured on the way\n\n" + "\n".join(rows) + "\n"
