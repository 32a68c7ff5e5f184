"""Errors of the format code. Every one carries the exit code that the commands end with.

FormatError (15, bad or unsupported image)
├── TarError            a layer's tar stream cannot be read
├── FrameTableError     a frame table is malformed
├── ErofsError          EROFS bytes are malformed
├── ArtifactError       an artifact's documents are malformed
└── UnsupportedError    well-formed, but EROFS or this version cannot express it
IntegrityError (12)     bytes are not what their digest or checksum says
"""

from __future__ import annotations


class FormatError(Exception):
    """A malformed or unsupported image."""

    exit_code = 15


class TarError(FormatError):
    """A layer's tar stream is malformed."""


class FrameTableError(FormatError):
    """A frame table is malformed."""


class ErofsError(FormatError):
    """EROFS bytes are malformed."""


class ArtifactError(FormatError):
    """An artifact's manifest, content index or metadata payload is malformed."""


class UnsupportedError(FormatError):
    """The image is well-formed, but holds what EROFS or this version cannot express."""


class IntegrityError(Exception):
    """Bytes are not what their digest or checksum says."""

    exit_code = 12
