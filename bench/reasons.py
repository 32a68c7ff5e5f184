"""What profiles said about figures that are behind their goals: why, and what comes next.

A row's own note comes before these. Looked up by number and by a part of what the row says that it measures.
"""

from __future__ import annotations

from bench.measure import Row

_REASONS: list[tuple[str, str, str]] = [
    (
        "R5",
        "plain layers",
        "half of the processor time is compression, as long as zstd's own; a tenth digests of layers, pieces, "
        "frames and the blob, two messages at a time throughout: these two alone, on both processors all the time, "
        "are the limit. A fifth is Python: of 0.7 s the walk through the tar takes 0.15 s, the tree and both forms' "
        "metadata 0.15 s, the list of a start 0.2 s (most of it the imports of 750 Python sources), loading itself "
        "0.1 s, of which a third goes beside the layers. As much is the kernel's (layers read, blobs written, "
        "memory). Both processors have work all the time but for the first 0.1 s, in which the program is loaded, the "
        "last layer's end with the tree behind it, and a fifth of the metadata. Other settings of zstd at the same "
        "size are no faster (docs/building.md). Next: the imports noted while the layers pass, 0.1 s; the inodes' "
        "records and the directories in C, 0.03 s; and less to load.",
    ),
    (
        "R5",
        "gzip layers",
        "as with plain layers; and decompression (ISA-L's, one stream a layer, two layers at once) takes 0.6 s of "
        "processor time, with the digest of what went in 0.7 s.",
    ),
    (
        "R8",
        "decoded form",
        "four processes share two processors: registry, worker (verify, decode, write), cat and sha256sum, which alone "
        "takes two thirds of this time; with curl, zstd and sha256sum it is as many, but nothing is written. Each "
        "frame is verified, decoded and written by one call of C. Next: the decoded bytes written where the page cache "
        "takes them in larger pieces.",
    ),
    (
        "R9",
        "p99",
        "about twice the p50, as for the fetch alone: a read waits for four changes of process, on two processors that "
        "the registry and the measuring itself use too. Next: C for the worker, as for the p50.",
    ),
    (
        "R10",
        "ours, decoded",
        "complete files have no mark, and a read of one goes the way of a plain image's: what differs is the disk's "
        "spread, up to twofold for the same reads of the plain image. Next: more pairs.",
    ),
    (
        "R10",
        "tar of the tree: plain EROFS / ours, encoded",
        "tar reads one file after the other and waits while the kernel decodes it: all of the tree at the speed of "
        "`zstd -d` on one processor is the floor, behind a disk that is faster than that. Nor is it otherwise with "
        "direct I/O, or with decoding forced off the reader (`directio`, `sync_decompress`): tried, and no faster; an "
        "image of mkfs.erofs takes as long. Readers in parallel do not wait for each other, as 4 jobs show. Next: "
        "nothing of ours, but a kernel that decodes what it reads ahead on another processor; a node whose disk is "
        "faster than its processors has the decoded form, at the plain image's speed.",
    ),
    (
        "R11",
        "mounts a second",
        "Of 7 ms of processor time a mount, on two processors, the registry that is measured along takes 2.2 for its "
        "answer, the worker 3.4 and the keeper 1; Nydus gets its bootstrap as a file.",
    ),
    (
        "R12",
        "mount to first ls",
        "by the source: its manifest, the list of its artifacts beside the manifest of the usual one, the metadata, "
        "three round trips; by the artifact one less. The rest is two commands that start, Python, and metadata of "
        "100,000 files that is hashed and unpacked: processor time (161 and 143 ms on a machine twice as "
        "fast). Next: less to load for the command, and metadata that is unpacked while it comes.",
    ),
    (
        "R3",
        "a layout rebuilt from it, 25 Mbit/s",
        "not this start has become slower, the one without a trace faster: it took 7.1 s until what its modules "
        "import was fetched ahead. 7.5 MB take the link 2.4 s, and the program 0.3. Next: the range of a rebuilt "
        "start asked for along with the metadata.",
    ),
    (
        "R3",
        "25 Mbit/s",
        "what is checked is a frame, so a start fetches each frame that it touches whole, trace or not: 7.0 % of the "
        "image, against 7.6 % without a trace. And without one it waits for little: what its modules import is "
        "fetched ahead, as the image's own sources say (7.1 s until that was so; the link alone needs 4.9). Twice as "
        "fast would be 3.0 s, in which the link carries 9.4 MB: 4.7 %, the program's own time not counted. Only "
        "another layout gets there: one rebuilt from the trace needs 3.8 %. Next: that a conversion rebuilds it by "
        "itself where the image before has a trace.",
    ),
]


def reason(row: Row) -> str:
    """Why a row is behind, as far as it is known."""
    return next((text for number, part, text in _REASONS if number == row.number and part in row.what), "")
