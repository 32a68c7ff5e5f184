"""The `erofs-builder` command."""

from __future__ import annotations

import click

from loader.cli.builder_check import check
from loader.cli.builder_convert import convert
from loader.cli.builder_dump import dump
from loader.cli.builder_export import export
from loader.cli.builder_inspect import inspect
from loader.cli.common import run, verbose_option

_EPILOG = """References: docker://HOST/REPOSITORY:TAG (also without docker://), oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:NAME], rootfs:DIR. Logins are those of docker and podman.

Exit codes: 0 ok, 1 failed, 2 usage, 10 not found, 11 registry refused, 12 integrity, 15 bad image."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(package_name="erofs-ondemand", prog_name="erofs-builder")
@verbose_option
def cli() -> None:
    """Turn container images into artifacts that mount at once and are fetched as they are read."""


for _command in (convert, inspect, check, dump, export):
    cli.add_command(_command)


def main() -> None:
    """The console command's entry."""
    run(cli, "erofs-builder")
