"""The hand-written structs of the ABI packages against the compiler's view of the kernel's headers."""

from __future__ import annotations

import cachefiles._kabi as cachefiles_kabi
import cachefiles.wire as cachefiles_wire
import fanotify._kabi as fanotify_kabi
import fanotify.wire as fanotify_wire


def test_fanotify_structs() -> None:
    ffi, wire = fanotify_kabi.ffi, fanotify_wire
    assert ffi.sizeof("struct fanotify_event_metadata") == wire.METADATA.size
    fields = ("event_len", "vers", "reserved", "metadata_len", "mask", "fd", "pid")
    assert [ffi.offsetof("struct fanotify_event_metadata", name) for name in fields] == [0, 4, 5, 6, 8, 16, 20]
    assert ffi.sizeof("struct fanotify_event_info_header") == wire.INFO_HEADER.size
    assert ffi.sizeof("struct eod_event_info_range") == wire.INFO_RANGE.size
    assert [ffi.offsetof("struct eod_event_info_range", name) for name in ("offset", "count")] == [8, 16]
    assert ffi.sizeof("struct fanotify_response") == wire.RESPONSE.size
    assert ffi.offsetof("struct fanotify_response", "response") == 4


def test_fanotify_constants() -> None:
    lib, wire = fanotify_kabi.lib, fanotify_wire
    assert lib.FANOTIFY_METADATA_VERSION == wire.METADATA_VERSION
    assert lib.FAN_EVENT_INFO_TYPE_RANGE == wire.INFO_TYPE_RANGE
    assert (lib.FAN_ALLOW, lib.FAN_DENY, lib.FAN_ERRNO_SHIFT) == (wire.ALLOW, wire.DENY, wire.ERRNO_SHIFT)
    assert lib.FAN_PRE_ACCESS == 0x00100000
    assert lib.FAN_CLASS_PRE_CONTENT == 0x8


def test_cachefiles_structs() -> None:
    ffi, wire = cachefiles_kabi.ffi, cachefiles_wire
    assert ffi.sizeof("struct cachefiles_msg") == wire.HEADER.size
    assert [ffi.offsetof("struct cachefiles_msg", name) for name in ("msg_id", "opcode", "len", "object_id")] == [
        0,
        4,
        8,
        12,
    ]
    assert ffi.sizeof("struct cachefiles_open") == wire.OPEN.size
    fields = ("volume_key_size", "cookie_key_size", "fd", "flags")
    assert [ffi.offsetof("struct cachefiles_open", name) for name in fields] == [0, 4, 8, 12]
    assert ffi.sizeof("struct cachefiles_read") == wire.READ.size
    assert ffi.offsetof("struct cachefiles_read", "len") == 8


def test_cachefiles_constants() -> None:
    lib, wire = cachefiles_kabi.lib, cachefiles_wire
    assert lib.CACHEFILES_MSG_MAX_SIZE == wire.MSG_MAX_SIZE
    assert (lib.CACHEFILES_OP_OPEN, lib.CACHEFILES_OP_CLOSE, lib.CACHEFILES_OP_READ) == (
        wire.OP_OPEN,
        wire.OP_CLOSE,
        wire.OP_READ,
    )
    assert lib.CACHEFILES_IOC_READ_COMPLETE == 0x40049801
