"""What keeper and worker say to each other: one message per packet on a SOCK_SEQPACKET pair, descriptors as SCM_RIGHTS.

The keeper owns the kernel's descriptors and the table of unanswered requests; the worker may die at any time and loses
nothing but its own memory. A packet is a kind byte and then a fixed struct (hot: REQUEST, ANSWER) or JSON (the rest).

    keeper ─▶ worker
      OBJECT   {"object", "plane", "size", …}, with its writer descriptor; fanotify adds "name", "path", "form",
               "complete" and mostly the descriptor of a bitmap, see presence.py (the worker puts its number into the
               body as PRESENCE); cachefiles adds "volume" and "cookie". All of them after a start, then READY
      HELD     {"mounts", "fenced"}: some of the mounts that the keeper holds or has fenced, after the objects; several
               packets where there are many
      READY    {"generation", "plane"}: all objects and mounts were sent, the worker may serve. A mount has
               target, plane, source, fsid and domain_id; one that was fenced, and is gone, a reason too
      PRESENT  the kernel wanted this range, and the keeper has answered already: all of it is there. As a REQUEST, with
               the number of READs as its number, that gets no ANSWER; for the guesses and the records of the worker
      REPEATS  the same for all READs since the last REPEATS that the worker need not be told of one by one, for it knew
               those blocks to be read (presence.py): their number, and their bytes as its length
      REQUEST  the kernel wants [offset, offset + length) of an object (in bytes of its form; length is clipped to the
               file and never 0)
      OPEN     {"id", "object", "volume", "cookie"}, with the writer descriptor: cachefiles: the kernel opens an object:
               answer OPENED. volume and cookie are text (latin-1), volume without its NUL
      CLOSED   {"object"}: cachefiles: the kernel closed an object; close its descriptor
      PING     {}: answer PONG at once; a worker that is silent for KeeperConfig.silence seconds after it is killed
      RESULT   {"token", "errno", "message", …}: the outcome of a CALL (with the descriptors of an OBJECT where it
               made one)
    worker ─▶ keeper
      ANSWER   a request is done (its data was written through the writer descriptor before), or errno
      OPENED   {"id", "size"}: size of the object in bytes, or -errno
      PONG     {}
      CALL     {"token", "call": name, …}: see CALLS; "token" is any number of the worker's own

How a worker starts. The keeper runs `python -m loader.worker` (KeeperConfig.worker) with these in its environment, next
to whatever KeeperConfig.worker_env holds (the keeper does not look into that):

    EROFS_LOADER_KEEPER_FD     the worker's end of the SOCK_SEQPACKET pair
    EROFS_LOADER_CONTROL_FD    the listening Unix stream socket of the control API (bound, mode 0600, shared by workers)
    EROFS_LOADER_ROOT, EROFS_LOADER_SOCKET    the cache root and the control socket's path

A worker is started ahead of need: it imports everything, then waits for its first packet, and touches neither cache nor
database nor the control socket before that packet is there. End of file on the keeper's socket means: exit at once.
The same request may come again to the next worker, and an ANSWER to a request that has ended is ignored. SIGTERM asks a
worker to leave in order (it stops accepting, answers what it can within a few seconds, exits 0); a worker that exits on
its own is replaced. The worker must never truncate a marked file, open one by path, or read a served mount: each would
wait for itself.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

MAX_PACKET = 262144
PRESENCE = "presence"
MOST_RANGES = 512  # of one `idle`
KEEPER_FD_ENV = "EROFS_LOADER_KEEPER_FD"
NURSERY_FD_ENV = "EROFS_LOADER_NURSERY_FD"
CONTROL_FD_ENV = "EROFS_LOADER_CONTROL_FD"
ROOT_ENV = "EROFS_LOADER_ROOT"
SOCKET_ENV = "EROFS_LOADER_SOCKET"


class Kind(IntEnum):
    """The first byte of a packet."""

    OBJECT = 1
    READY = 2
    REQUEST = 3
    OPEN = 4
    CLOSED = 5
    RESULT = 6
    PING = 7
    HELD = 8
    PRESENT = 9
    REPEATS = 10
    ANSWER = 16
    OPENED = 17
    CALL = 18
    PONG = 19


# name: arguments → result. Every result has "errno" (0 on success) and, when not 0, "message".
CALLS = {
    "create": "name, path, form encoded|decoded, size: fanotify: open the cache file's writer (the file exists and has"
    " its full length), then mark it → object, descriptor attached. `size`: bytes that frames cover. The same path"
    " again gives the same object",
    "release": "object: fanotify: unmark and close (no mount uses it any more)",
    "complete": "object: fanotify: the file is whole and synced: remove the mark, keep the object",
    "mount": "source, devices, options, target, fsid, domain_id, objects: mount EROFS (fsid: cachefiles; domain_id:"
    " cachefiles' domain, or with the option inode_share that of the page cache; source and devices, paths in slot"
    " order: fanotify; objects: numbers that this mount reads; pause: seconds without the kernel's readahead) → {}",
    "umount": "target, lazy → {}",
    "mark": "object: fanotify: mark again (a complete object whose blocks are to be evicted)",
    "guards": "name: fanotify: whether the file of an object that was released is still marked, for a mount that went"
    " lazily may read it: then nobody can read it by path → guards",
    "idle": "object, ranges [[start, end], …] (at most MOST_RANGES): fanotify: which of them nobody waits for and no"
    " thread can be reading → idle: their numbers. It stays so while the worker answers no request for them",
    "cull": "directory, name: cachefiles: cull a cache file (EBUSY while in use)",
    "look": "directory, name: cachefiles: open a cache file → descriptor, for reading",
    "status": "→ generation, plane, objects, mounts, fenced, requests in flight with their age, counters",
    "stop": "mode keep|umount: leave in order",
}

_REQUEST = struct.Struct("<BQIQQ")
_ANSWER = struct.Struct("<BQi")
_REQUEST_KIND, _PRESENT_KIND, _ANSWER_KIND = int(Kind.REQUEST), int(Kind.PRESENT), int(Kind.ANSWER)


class Request(NamedTuple):
    """A READ of the kernel: `id` is the keeper's own number, never the kernel's."""

    id: int
    object: int
    offset: int
    length: int


class Answer(NamedTuple):
    """The end of a request: errno 0, or the error that the reader gets."""

    id: int
    errno: int


def pack_request(request: Request) -> bytes:
    return _REQUEST.pack(Kind.REQUEST, *request)


def pack_present(count: int, object_id: int, offset: int, length: int) -> bytes:
    return _REQUEST.pack(Kind.PRESENT, count, object_id, offset, length)


def pack_repeats(count: int, length: int) -> bytes:
    return _REQUEST.pack(Kind.REPEATS, count, 0, 0, length)


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(Kind.ANSWER, *answer)


def pack_json(kind: Kind, body: dict[str, Any]) -> bytes:
    packet = bytes((kind,)) + json.dumps(body, separators=(",", ":")).encode()
    if len(packet) > MAX_PACKET:
        raise ValueError(f"{kind.name} packet of {len(packet)} bytes")
    return packet


def unpack_request(packet: bytes) -> tuple[Kind, Request] | None:
    """What most packets are (REQUEST, PRESENT), quickly; None for any other, and for a malformed one."""
    if len(packet) != _REQUEST.size:
        return None
    kind, *body = _REQUEST.unpack(packet)
    if kind == _REQUEST_KIND:
        return Kind.REQUEST, Request._make(body)
    return (Kind.PRESENT, Request._make(body)) if kind == _PRESENT_KIND else None


def unpack_answer(packet: bytes) -> Answer | None:
    """The same in the other direction."""
    if len(packet) != _ANSWER.size or packet[0] != _ANSWER_KIND:
        return None
    return Answer._make(_ANSWER.unpack(packet)[1:])


def unpack(packet: bytes) -> tuple[Kind, Request | Answer | dict[str, Any]]:
    """A packet's kind and body; ValueError on a malformed one."""
    try:
        kind = Kind(packet[0])
        if kind in (Kind.REQUEST, Kind.PRESENT, Kind.REPEATS):
            return kind, Request(*_REQUEST.unpack(packet)[1:])
        if kind is Kind.ANSWER:
            return kind, Answer(*_ANSWER.unpack(packet)[1:])
        body = json.loads(packet[1:])
    except (IndexError, struct.error, ValueError, RecursionError) as error:
        raise ValueError(f"malformed packet: {error}") from None
    if not isinstance(body, dict):
        raise ValueError("malformed packet: not an object")
    return kind, body
