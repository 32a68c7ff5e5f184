"""Options that the builder's commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from erofs_builder.payload import Form
from loader.artifact import Artifact
from loader.cli.common import warn
from loader.convert.platform import platform_of
from loader.convert.source import ALL_PLATFORMS
from loader.errors import NotFoundError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.config import RegistryConfig, load_registry_config
from loader.registry.documents import check_platform, suits
from loader.registry.find import find_artifact
from loader.registry.open import open_image

F = TypeVar("F", bound=Callable[..., Any])


def config_option(function: F) -> F:
    """`--config FILE`: registries' mirrors, CAs and time limits."""
    return click.option(
        "--config", metavar="FILE", help="Registry settings. Default: /etc/erofs-loader/config.toml, if there."
    )(function)


def platform_option(function: F) -> F:
    """`--platform OS/ARCH`, of a multi-platform artifact."""
    return click.option(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        callback=checked_platform,
        help="Of a multi-platform one; of another it must be this. Default: this machine's.",
    )(function)


def checked_platform(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """An option's callback: UsageError for what is not written as a platform."""
    if value is not None:
        check_platform(value)
    return value


def checked_platforms(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The same, and `all` is fine."""
    return value if value == ALL_PLATFORMS else checked_platform(context, parameter, value)


def form_option(function: F) -> F:
    """`--form encoded|decoded`."""
    return click.option(
        "--form",
        type=click.Choice([form.value for form in Form]),
        default=Form.ENCODED.value,
        show_default=True,
        help="encoded: the kernel decodes (6.10 and later); decoded: any kernel with EROFS chunks (5.16 and later).",
    )(function)


def registry_config(file: str | None, insecure: bool) -> RegistryConfig:
    """The registries' settings, with `--insecure` applied."""
    config = load_registry_config(Path(file) if file else None)
    return replace(config, insecure=True) if insecure else config


def _require_platform(text: str, found: str, wanted: str) -> None:
    """find_artifact selects where there are several; one alone is taken, whatever it is for."""
    if not found:
        warn_of_platform(text, wanted)
    elif not suits(found, wanted):
        raise NotFoundError(f"{text}: the artifact is for {found}, not for {wanted}")


def warn_of_platform(text: str, wanted: str) -> None:
    """Say that `--platform` could not be held against anything."""
    warn(f"{text}: nothing says which platform it is for; it is taken for {wanted}")


@contextmanager
def opened_artifact(
    text: str, platform: str | None, file: str | None, insecure: bool
) -> Iterator[tuple[ImageSource, Descriptor, Artifact]]:
    """The artifact that a reference names, or that belongs to the image it names."""
    source, name = open_image(text, registry_config(file, insecure))
    try:
        descriptor, artifact = find_artifact(source, name, platform)
        if platform:
            _require_platform(text, platform_of(source, descriptor, artifact), platform)
        yield source, descriptor, artifact
    finally:
        source.close()
