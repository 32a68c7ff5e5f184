"""What both commands share: the ladder from errors to exit codes, output for people and for programs.

What the codes mean is in docs/exit-codes.md.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import click

from erofs_builder.errors import FormatError, IntegrityError
from loader.errors import LoaderError

_ROOM = "make room where the output goes; of an upload that is TMPDIR first, which may be another disk"
_VERBOSE = "loader.cli.verbose"  # the key of a context's meta
_TERMINATED = 128 + signal.SIGTERM
_CLEANING_UP = 5.0  # seconds
EXIT_CODES = """Exit codes: 0 ok, 1 failed, 2 usage, 10 not found, 11 registry refused, 12 integrity, 13 kernel lacks
support, 14 busy, 15 bad image, 130 interrupted, 143 terminated."""
F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """Commands of one program; its help stands in for a missing one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _broken_pipe_told_apart():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _broken_pipe_told_apart():
            return super().invoke(ctx)


class _BrokenPipe(Exception):
    """A BrokenPipeError on its way through click, which would end the process with 1 for it."""


@contextmanager
def _broken_pipe_told_apart() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _BrokenPipe from error


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with the code of what came of it. Tracebacks are for bugs only."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)  # so that temporary files go
    try:
        result = command.main(args=words, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (BrokenPipeError, _BrokenPipe) as error:
        sys.exit(_after_broken_pipe("--json" in words, error))
    except Exception as error:
        sys.exit(report(error, "--json" in words))


def _after_broken_pipe(as_json: bool, error: Exception) -> int:
    """Whoever read our output has enough, which is no failure; what another pipe or socket does, is one."""
    events = select.poll()
    events.register(sys.stdout.fileno(), 0)
    if not events.poll(0):
        return report(error.__cause__ if isinstance(error.__cause__, OSError) else error, as_json)
    # The interpreter must not complain when it flushes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def end_at_once(code: int) -> NoReturn:
    """End the process, once everything is closed and told, without taking apart what it holds.

    An image's nodes and the modules, freed one by one, take as long as Python takes to start. What atexit has is not
    called: logging flushes line by line, and of other threads at most one is left that hangs.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def report(error: Exception, as_json: bool = False) -> int:
    """Tell an error on stderr, as people or (one JSON object) as programs want it; its exit code."""
    code, message, hint = explain(error)
    if as_json:
        document = {"message_type": "exit_error", "code": code, "message": message}
        print(json.dumps({**document, "hint": hint} if hint else document), file=sys.stderr)
    else:
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
    if code == 1 and not isinstance(error, LoaderError | OSError) and not as_json:
        import traceback  # for bugs only: a command should start at once

        traceback.print_exception(error)
    return code


def warn(message: str) -> None:
    """Tell on stderr what does not end the command, in the form that its errors have."""
    context = click.get_current_context(silent=True)
    as_json = context is not None and context.params.get("as_json")
    print(
        json.dumps({"message_type": "warning", "message": message}) if as_json else f"warning: {message}",
        file=sys.stderr,
    )


def explain(error: Exception) -> tuple[int, str, str | None]:
    """Exit code, message and remedy of an error."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        usage = " ".join([error.ctx.command_path, *error.ctx.command.collect_usage_pieces(error.ctx)])
        return error.exit_code, error.format_message(), f"{usage} (--help says more)"
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), None
    if isinstance(error, LoaderError):
        return error.exit_code, str(error), error.hint
    if isinstance(error, FormatError | IntegrityError):
        return error.exit_code, str(error), getattr(error, "hint", None)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        remedy = _ROOM if error.errno == errno.ENOSPC else None
        return 1, f"{where}{error.strerror or error}", remedy
    return 1, f"this is a bug: {type(error).__name__}: {error}", None


def _terminate(_number: int, _frame: object) -> NoReturn:
    """End in order; try again if that takes long, and then end at once.

    Python passes over what a signal's handler raises where it interrupts a callback, an import's for one; and where it
    interrupts a lock's holder, another thread may wait for that lock for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _terminate_again)
    signal.setitimer(signal.ITIMER_REAL, _CLEANING_UP)
    sys.exit(_TERMINATED)


def _terminate_again(_number: int, _frame: object) -> NoReturn:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(_TERMINATED))
    signal.setitimer(signal.ITIMER_REAL, _CLEANING_UP)
    sys.exit(_TERMINATED)


def json_option(function: F) -> F:
    """`--json`: the result as one JSON document on stdout, errors as one JSON object on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def insecure_option(function: F) -> F:
    """`--insecure`: registries over plain HTTP or with certificates that nobody checks."""
    return click.option(
        "--insecure", is_flag=True, help="Accept registries over plain HTTP and certificates that are not trusted."
    )(function)


def verbose_option(function: F) -> F:
    """`-v` before the command's name: log to stderr, twice for debugging."""
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=_start_log, help="Log more; twice for debugging."
    )(function)


def verbose_here_option(function: F) -> F:
    """The same behind the command's name; what is said in both places adds up."""
    return click.option("-v", "--verbose", count=True, expose_value=False, hidden=True, callback=_start_log)(function)


def _start_log(context: click.Context, _parameter: click.Parameter, count: int) -> None:
    count = context.meta[_VERBOSE] = context.meta.get(_VERBOSE, 0) + count
    import logging

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(count, 2)])
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # its debug lines quote URLs with secrets


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=True))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Columns of even width; those whose numbers are in `right` are aligned to the right."""
    table = [tuple(header), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def human_size(count: float) -> str:
    """A number of bytes for people: 982 B, 14.2 kB, 520 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"
    raise AssertionError


def percent(part: float, whole: float) -> str:
    """A share in percent; a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
