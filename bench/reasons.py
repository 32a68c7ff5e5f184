"""What profiles said about figures that are behind their goals: why, and what comes next.

A row's own note comes before these. Looked up by number and by a part of what the row says that it measures.
"""

from __future__ import annotations

from bench.measure import Row

_REASONS: list[tuple[str, str, str]] = [
    (
        "R5",
        "plain layers",
        "of 2.8 s of processor time half is compression, as long as zstd's own; a fifth digests of layers, pieces, "
        "frames and the blob, two messages at a time throughout: these two alone, on both processors all the time, are "
        "the limit. A fifth is Python: the walk through the tar 0.2 s, the tree and both forms' metadata 0.2 s, the "
        "list of a start 0.05 s, loading itself 0.1 s, of which half goes beside the layers. One processor is idle in "
        "the first 0.1 s and for half of the last 0.2 s, in which the tree is put together. Other settings of zstd at "
        "the same size are no faster (docs/building.md). Next: the walk and the metadata's records in C.",
    ),
    (
        "R5",
        "gzip layers",
        "as with plain layers; and decompression (ISA-L's, one stream a layer, two layers at once) takes 0.6 s of "
        "processor time, with the digest of what went in 0.7 s.",
    ),
    (
        "R10",
        "tar of the tree: plain EROFS / ours, encoded",
        "tar reads one file after the other and waits while the kernel decodes it: all of the tree at the speed of "
        "`zstd -d` on one processor is the floor. Readers in parallel do not wait for each other, as 4 jobs show.",
    ),
    (
        "R11",
        "mounts a second",
        "Of 7 ms of processor time a mount, on two processors, the registry that is measured along takes 2.2 for its "
        "answer, the worker 3.4 and the keeper 1; Nydus gets its bootstrap as a file.",
    ),
    (
        "R12",
        "by its source",
        "the source's manifest, the list of its artifacts beside the manifest of the usual one, the metadata: three "
        "round trips; the rest is commands that start, and Python.",
    ),
    (
        "R3",
        "25 Mbit/s",
        "what is checked is a frame, so a start fetches each frame that it touches whole, trace or not: 6.9 % of the "
        "image, against 7.8 % without a trace. Twice as fast would be 3.2 s, in which the link carries 10 MB: 5 %, the "
        "program's own time not counted. Only another layout gets there: one rebuilt from the trace needs 3.8 %.",
    ),
]


def reason(row: Row) -> str:
    """Why a row is behind, as far as it is known."""
    return next((text for number, part, text in _REASONS if number == row.number and part in row.what), "")
