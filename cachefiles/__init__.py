"""The kernel interface of cachefiles on-demand mode: messages, ioctls, device. No policy."""

from cachefiles.device import (
    DEVICE,
    AlignedWriter,
    bind,
    copen,
    cull,
    in_use,
    open_device,
    read_complete,
    read_message,
    restore,
)
from cachefiles.wire import Close, Message, Open, Read, parse_message

__all__ = [
    "DEVICE",
    "AlignedWriter",
    "Close",
    "Message",
    "Open",
    "Read",
    "bind",
    "copen",
    "cull",
    "in_use",
    "open_device",
    "parse_message",
    "read_complete",
    "read_message",
    "restore",
]
