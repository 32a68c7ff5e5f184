"""The list of frames that an image's start reads, made while its blobs are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.frame_list import encode_frames
from erofs_builder.model import Blob, Node
from erofs_builder.startup import Command, start_frames


def command_of(config: Mapping[str, Any]) -> Command:
    """The command of an image's config; without one, or with a malformed one, an empty command."""
    section = config.get("config")
    section = section if isinstance(section, dict) else {}
    directory = section.get("WorkingDir")
    return Command(
        (*_strings(section.get("Entrypoint")), *_strings(section.get("Cmd"))),
        _strings(section.get("Env")),
        directory if isinstance(directory, str) and directory.startswith("/") else "/",
    )


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def start_list(root: Node, blobs: Sequence[Blob], command: Command, files: Mapping[Digest, Path]) -> str:
    """The list for the artifact (erofs_builder/frame_list.py). Programs in blobs that `files` lacks are unknown."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)

    def read_frame(blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame = blob.table[number]
        with files[blob.digest].open("rb") as file:
            file.seek(frame.encoded_offset)
            return decompressor.decompress(file.read(frame.encoded_size))

    numbers = {blob: number for number, blob in enumerate(blobs)}
    places = start_frames(root, command, read_frame)
    return encode_frames((numbers[blob], frame) for blob, frame in places if blob in numbers)
