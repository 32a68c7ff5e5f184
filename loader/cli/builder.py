"""The `erofs-builder` command."""

from __future__ import annotations

from importlib import import_module

import click

from loader.cli.common import EXIT_CODES, Commands, end_at_once, run, verbose_option

_COMMANDS = ("check", "convert", "dump", "export", "inspect")
_EPILOG = """References: docker://HOST/REPOSITORY:TAG (also without docker://), oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:NAME], rootfs:DIR. Logins are those of docker and podman.

"""


class _Commands(Commands):
    """Loads a command's module when it is called or described: all of them together take longer than a small image."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"loader.cli.builder_{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG + EXIT_CODES)
@click.version_option(package_name="erofs-ondemand", prog_name="erofs-builder")
@verbose_option
def cli() -> None:
    """Turn container images into artifacts that mount at once and are fetched as they are read."""


def main() -> None:
    """The console command's entry. It does not return: the process ends with the command."""
    try:
        run(cli, "erofs-builder")
    except SystemExit as end:
        end_at_once(end.code if isinstance(end.code, int) else 1)
