"""Write a tree as one flat EROFS file: the metadata, then the blobs at their unified addresses, no device table.

Any kernel that knows the form mounts it alone, and `fsck.erofs --extract` reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import BinaryIO

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import IntegrityError
from erofs_builder.frames import Frame
from erofs_builder.model import Blob, Node
from erofs_builder.payload import Form

_SKIPPABLE = struct.Struct("<II")  # magic, length of what follows
_SKIPPABLE_MAGIC = 0x184D2A50
OpenBlob = Callable[[Blob], BinaryIO]


def write_flat(root: Node, form: Form, blobs: Sequence[Blob], open_blob: OpenBlob, out: BinaryIO) -> int:
    """Write to `out`; the number of bytes written.

    `open_blob` gives a blob's bytes as the registry holds them. One frame is in memory at a time, and each is verified
    before it is written: IntegrityError names the blob and frame that is not what its table says.
    """
    metadata = write_metadata(root, form, blobs, device_table=False)
    out.write(metadata.erofs)
    size = len(metadata.erofs)
    for blob in metadata.blobs:
        with open_blob(blob) as stream:
            for frame in blob.table or ():
                data = read_frame(stream, frame, str(blob.digest))
                if form is Form.DECODED:
                    data = decode_frame(data, frame, str(blob.digest))
                out.write(data)
                size += len(data)
    return size


def read_frame(stream: BinaryIO, frame: Frame, name: str) -> bytes:
    """The frame's encoded bytes from a stream that stands at its start, verified."""
    data = stream.read(frame.encoded_size)
    what = f"blob {name}, frame {frame.number} at {frame.encoded_offset}"
    if len(data) != frame.encoded_size:
        raise IntegrityError(f"{what}: {len(data)} of {frame.encoded_size} bytes")
    Digest(frame.digest).verify(data, what)
    return data


def decode_frame(data: bytes, frame: Frame, name: str) -> bytes:
    """The content of a verified frame; never more than its table says."""
    what = f"blob {name}, frame {frame.number} at {frame.encoded_offset}"
    try:
        header = zstandard.get_frame_parameters(data)
        if header.content_size != frame.decoded_size or not header.has_checksum:
            raise IntegrityError(f"{what}: does not decode to {frame.decoded_size} bytes, or has no checksum")
        # The skippable frame behind the first one is padding; a decompressor object stops where the first one ends.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20).decompressobj()
        content = decompressor.decompress(data)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: {error}") from None
    padding = decompressor.unused_data
    if padding and padding != _SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(padding) - 8) + bytes(len(padding) - 8):
        raise IntegrityError(f"{what}: what lies behind it is no padding")
    if len(content) != frame.decoded_size:
        raise IntegrityError(f"{what}: decodes to {len(content)} bytes instead of {frame.decoded_size}")
    return content
