"""What a start of an ELF program needs: its interpreter, its libraries, and what the loader touches of the file.

Source: the System V ABI's chapters on ELF and dynamic linking. 64-bit little-endian files only; of another or of a
malformed one nothing is known, which costs speed and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

Read = Callable[[int, int], bytes]  # offset, length → at most so many bytes of the file

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_IDENTITY = b"\x7fELF\x02\x01\x01"
_LOAD, _DYNAMIC_SEGMENT, _INTERPRETER, _UNWINDING = 1, 2, 3, 0x6474E550
_NEEDED, _STRING_TABLE, _RPATH, _RUNPATH = 1, 5, 15, 29
_WRITABLE = 2
_MAX_SEGMENTS, _MAX_DYNAMIC, _MAX_NAME = 64, 1 << 16, 4096


@dataclass(slots=True)
class Program:
    """An ELF program or library. `touched`: (offset, length) of what is read before its first instruction runs;
    `unwinding`: (begin, end) of what only exceptions read."""

    interpreter: bytes = b""
    needed: list[bytes] = field(default_factory=list)
    search: list[bytes] = field(default_factory=list)  # directories of RPATH or RUNPATH, with $ORIGIN
    touched: list[tuple[int, int]] = field(default_factory=list)
    unwinding: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    flags: int
    offset: int
    address: int
    size: int


def read_program(read: Read) -> Program | None:
    """What a file's headers say; None if it is no ELF file that is understood here."""
    try:
        return _read_program(read)
    except struct.error:  # cut off
        return None


def _read_program(read: Read) -> Program | None:
    header = _HEADER.unpack(read(0, _HEADER.size))
    if not header[0].startswith(_IDENTITY):
        return None
    table, entry_size, count = header[5], header[9], header[10]
    if entry_size != _SEGMENT.size or count > _MAX_SEGMENTS:
        return None
    segments = []
    for kind, flags, offset, address, _, size, _, _ in _SEGMENT.iter_unpack(read(table, entry_size * count)):
        segments.append(_Segment(kind, flags, offset, address, size))
    program = Program()
    loads = [segment for segment in segments if segment.kind == _LOAD]
    # The headers, symbols and relocations lie in the first; relocation writes all over the writable ones.
    program.touched = [
        (each.offset, each.size) for number, each in enumerate(loads) if not number or each.flags & _WRITABLE
    ]
    for segment in segments:
        if segment.kind == _INTERPRETER:
            program.interpreter = read(segment.offset, min(segment.size, _MAX_NAME)).rstrip(b"\0")
        elif segment.kind == _DYNAMIC_SEGMENT:
            _read_dynamic(program, read(segment.offset, min(segment.size, _MAX_DYNAMIC)), loads, read)
        elif segment.kind == _UNWINDING:
            program.unwinding = _unwinding(segment.offset, loads)
    return program


def _unwinding(index: int, loads: list[_Segment]) -> tuple[int, int]:
    """The index (.eh_frame_hdr) and what it leads to (.eh_frame, .gcc_except_table): linkers put them last into their
    segment."""
    for each in loads:
        if each.offset <= index < each.offset + each.size and not each.flags & _WRITABLE:
            return index, each.offset + each.size
    return 0, 0


def _read_dynamic(program: Program, data: bytes, loads: list[_Segment], read: Read) -> None:
    entries = list(_DYNAMIC.iter_unpack(data[: len(data) // _DYNAMIC.size * _DYNAMIC.size]))
    address = next((value for tag, value in entries if tag == _STRING_TABLE), None)
    if address is None:
        return
    holder = next((each for each in loads if each.address <= address < each.address + each.size), None)
    if holder is None:
        return
    strings = address - holder.address + holder.offset

    def name(at: int) -> bytes:
        return read(strings + at, _MAX_NAME).partition(b"\0")[0] if 0 <= at < 1 << 32 else b""

    for tag, value in entries:
        if tag == 0:
            break
        if tag == _NEEDED:
            program.needed.append(name(value))
        elif tag in (_RPATH, _RUNPATH):
            program.search += [part for part in name(value).split(b":") if part]
