"""What an image's start reads: the list of its frames, or a blob rebuilt for it, made while the blobs are at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from erofs_builder.command import Command
from erofs_builder.digest import Digest
from erofs_builder.erofs.flat import decode_frame
from erofs_builder.followers import encode_followers, find_followers
from erofs_builder.frame_list import encode_frames
from erofs_builder.model import Blob, Node
from erofs_builder.startup import start_frames
from loader.artifact import FOLLOWERS_ANNOTATION, START_ANNOTATION
from loader.registry.base import ImageSource


def frame_reader(files: Mapping[Digest, Path], base: ImageSource | None = None) -> Callable[[Blob, int], bytes]:
    """Reads frames of blobs, from `files` or else from the base's source. KeyError: it is in neither."""

    def read_frame(blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame, digest = blob.table[number], blob.digest
        if digest in files:
            with files[digest].open("rb") as file:
                file.seek(frame.encoded_offset)
                data = file.read(frame.encoded_size)
        elif base is not None and blob.from_base:
            data = base.read_range(digest, frame.encoded_offset, frame.encoded_size)
            Digest(frame.digest).verify(data, f"frame {number} of {digest}")
        else:
            raise KeyError(digest)
        return decode_frame(data, frame, str(digest))

    return read_frame


def start_list(
    root: Node, blobs: Sequence[Blob], command: Command, read_frame: Callable[[Blob, int], bytes]
) -> dict[str, str]:
    """The artifact's annotations: the list of the start, and what follows the first read of plug-ins."""
    numbers = {blob: number for number, blob in enumerate(blobs)}
    places = [(numbers[blob], frame) for blob, frame in start_frames(root, command, read_frame) if blob in numbers]
    followers = find_followers(root, command, read_frame, numbers, places) if places else {}
    return {START_ANNOTATION: encode_frames(places), FOLLOWERS_ANNOTATION: encode_followers(followers)}
