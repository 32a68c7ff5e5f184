"""Directory data: blocks of dirents followed by their names, sorted in byte order, "." and ".." among them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, repeat

from erofs_builder.erofs.layout import BLOCK, DIRENT, NAME_MAX
from erofs_builder.errors import UnsupportedError

_DIRENT_SIZE = DIRENT.size
_FORBIDDEN = frozenset((b"", b".", b".."))


def sorted_names(children: Iterable[bytes]) -> list[bytes]:
    """All names that a directory's data holds, in their order."""
    return sorted((b".", b"..", *children))


def check_names(children: Collection[bytes]) -> None:
    """UnsupportedError for a name that no directory can hold."""
    text = b"".join(children)
    # Nearly always all is well, which takes a third of the time to say of all names at once.
    short = max(map(len, children), default=0) <= NAME_MAX
    if short and _FORBIDDEN.isdisjoint(children) and b"/" not in text and b"\0" not in text:
        return
    for name in children:
        if not name or len(name) > NAME_MAX or name in (b".", b"..") or b"/" in name or b"\0" in name:
            raise UnsupportedError(f"not a file name: {name[:300]!r}")


def data_size(names: Sequence[bytes]) -> int:
    """Bytes of the directory's data (i_size): whole blocks but for the last one."""
    total = _DIRENT_SIZE * len(names) + sum(map(len, names))
    if total <= BLOCK:
        return total
    blocks = split(names)
    last = names[blocks[-1] :]
    return (len(blocks) - 1) * BLOCK + _DIRENT_SIZE * len(last) + sum(map(len, last))


def split(names: Sequence[bytes]) -> list[int]:
    """Where in `names` each block starts."""
    starts, used = [0], 0
    for position, name in enumerate(names):
        size = _DIRENT_SIZE + len(name)
        if used + size > BLOCK:
            starts.append(position)
            used = 0
        used += size
    return starts


def encode(names: Sequence[bytes], nids: Sequence[int], types: Sequence[int]) -> bytes:
    """The directory's data; the three columns go together."""
    if _DIRENT_SIZE * len(names) + sum(map(len, names)) <= BLOCK:
        return _encode_block(names, nids, types)
    starts = split(names)
    pieces = []
    for start, end in zip(starts, (*starts[1:], len(names)), strict=True):
        block = _encode_block(names[start:end], nids[start:end], types[start:end])
        pieces.append(block.ljust(BLOCK, b"\0") if end < len(names) else block)
    return b"".join(pieces)


def _encode_block(names: Sequence[bytes], nids: Sequence[int], types: Sequence[int]) -> bytes:
    offsets = accumulate(map(len, names[:-1]), initial=_DIRENT_SIZE * len(names))
    return b"".join((*map(DIRENT.pack, nids, offsets, types, repeat(0)), *names))
