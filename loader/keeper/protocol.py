"""What keeper and worker say to each other: one message per packet on a SOCK_SEQPACKET pair, descriptors as SCM_RIGHTS.

The keeper owns the kernel's descriptors and the table of unanswered requests; the worker may die at any time and loses
nothing but its own memory. A packet is a kind byte and then a fixed struct (hot: REQUEST, ANSWER) or JSON (the rest).

    keeper ─▶ worker   OBJECT   a cache object, with its writer descriptor; all of them after a start, then READY
                       READY    all objects were sent, the worker may serve
                       REQUEST  the kernel wants [offset, offset + length) of an object (in bytes of its form)
                       OPEN     cachefiles: the kernel opens (volume, cookie): answer OPENED
                       CLOSED   cachefiles: the kernel closed an object
                       RESULT   the outcome of a CALL (descriptor attached where it made an object)
    worker ─▶ keeper   ANSWER   a request is done (its data was written through the writer descriptor before), or errno
                       OPENED   size of the object, or -errno
                       CALL     {"token", "call": name, …}: see CALLS
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

MAX_PACKET = 65536


class Kind(IntEnum):
    """The first byte of a packet."""

    OBJECT = 1
    READY = 2
    REQUEST = 3
    OPEN = 4
    CLOSED = 5
    RESULT = 6
    ANSWER = 16
    OPENED = 17
    CALL = 18


# name: arguments → result. Every result has "errno" (0 on success) and, when not 0, "message".
CALLS = {
    "create": "name, path: fanotify: open the cache file's writer, then mark it → object, descriptor attached",
    "release": "object: fanotify: unmark and close (no mount uses it any more)",
    "complete": "object: fanotify: the file is whole and synced: remove the mark, keep the object",
    "mount": "source, devices, options, target, fsid, domain_id: mount EROFS → {}",
    "umount": "target, lazy → {}",
    "mark": "object: fanotify: mark again (a complete object whose blocks are to be evicted)",
    "status": "→ generation, plane states, objects, requests in flight with their age",
    "stop": "mode keep|umount: leave in order",
}

_REQUEST = struct.Struct("<BQIQQ")
_ANSWER = struct.Struct("<BQi")


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


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(Kind.ANSWER, *answer)


def pack_json(kind: Kind, body: dict[str, Any]) -> bytes:
    packet = bytes((kind,)) + json.dumps(body, separators=(",", ":")).encode()
    if len(packet) > MAX_PACKET:
        raise ValueError(f"{kind.name} packet of {len(packet)} bytes")
    return packet


def unpack(packet: bytes) -> tuple[Kind, Request | Answer | dict[str, Any]]:
    """A packet's kind and body; ValueError on a malformed one."""
    try:
        kind = Kind(packet[0])
        if kind is Kind.REQUEST:
            return kind, Request(*_REQUEST.unpack(packet)[1:])
        if kind is Kind.ANSWER:
            return kind, Answer(*_ANSWER.unpack(packet)[1:])
        body = json.loads(packet[1:])
    except (IndexError, struct.error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"malformed packet: {error}") from None
    if not isinstance(body, dict):
        raise ValueError("malformed packet: not an object")
    return kind, body
