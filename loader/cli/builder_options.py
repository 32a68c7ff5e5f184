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
from loader.registry.base import Descriptor, ImageSource
from loader.registry.config import RegistryConfig, load_registry_config
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
    return click.option("--platform", metavar="OS/ARCH", help="Of a multi-platform one. Default: this machine's.")(
        function
    )


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


@contextmanager
def opened_artifact(
    text: str, platform: str | None, file: str | None, insecure: bool
) -> Iterator[tuple[ImageSource, Descriptor, Artifact]]:
    """The artifact that a reference names, or that belongs to the image it names."""
    source, name = open_image(text, registry_config(file, insecure))
    try:
        descriptor, artifact = find_artifact(source, name, platform)
        yield source, descriptor, artifact
    finally:
        source.close()
