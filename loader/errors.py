"""Errors of the policy and network code, with the exit codes of the commands (docs/exit-codes.md).

LoaderError (1)
├── UsageError (2)              a reference or option that cannot be understood
├── NotFoundError (10)          no such image, artifact, blob or mount
├── RegistryError (11)          the registry refused, or cannot be reached
│   └── TransientRegistryError  may go through later: timeouts, resets, 429, 5xx, expired tokens
├── KernelSupportError (13)     this kernel cannot do it; the message names what is missing
└── BusyError (14)              the object, mount point or device is in use

FormatError (15) and IntegrityError (12) come from erofs_builder.errors. A message says what failed, on which object
and range, and `hint` says what to do about it.
"""

from __future__ import annotations


class LoaderError(Exception):
    """A failure that a person can read; `hint` is the remedy, if there is one."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LoaderError):
    """A reference, option or configuration value that cannot be understood."""

    exit_code = 2


class NotFoundError(LoaderError):
    """No such image, artifact, blob or mount."""

    exit_code = 10


class RegistryError(LoaderError):
    """The registry refused for good."""

    exit_code = 11


class TransientRegistryError(RegistryError):
    """The registry could not answer now, but may later. `retry_after` is its own wish, in seconds."""

    def __init__(self, message: str, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class UnreachableError(TransientRegistryError):
    """No connection could be made."""


class KernelSupportError(LoaderError):
    """This kernel cannot do what was asked."""

    exit_code = 13


class BusyError(LoaderError):
    """The object, mount point or device is in use."""

    exit_code = 14
