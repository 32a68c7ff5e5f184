"""`erofs-loader`: the daemon and the commands that talk to it. What only some commands need is imported by them: a
mount should take no longer than it must."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from erofs_builder.errors import IntegrityError
from loader.cli.common import (
    EXIT_CODES,
    Commands,
    end_at_once,
    human_size,
    json_option,
    percent,
    print_json,
    print_table,
    run,
)
from loader.cli.loader_client import Client
from loader.config import Config, load_config
from loader.errors import BusyError, UsageError

if TYPE_CHECKING:
    from erofs_builder.page_trace import PageRun

_FORMS = click.Choice(["auto", "encoded", "decoded"])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="erofs-ondemand", prog_name="erofs-loader")
@click.option("--root", type=click.Path(path_type=Path), help="Cache and records [/var/lib/erofs-loader].")
@click.option("--socket", type=click.Path(path_type=Path), help="Control socket [/run/erofs-loader/control.sock].")
@click.option("--config", type=click.Path(path_type=Path), help="Configuration [/etc/erofs-loader/config.toml].")
@click.pass_context
def cli(context: click.Context, root: Path | None, socket: Path | None, config: Path | None) -> None:
    """Mount container images at once, and fetch only what is read."""
    context.obj = {"root": root, "socket": socket, "config": config}


def main() -> None:
    """The console command's entry. It does not return: the process ends with the command."""
    try:
        run(cli, "erofs-loader")
    except SystemExit as end:
        end_at_once(end.code if isinstance(end.code, int) else 1)


def location_options(function: Any) -> Any:
    """--root, --socket and --config behind the command's name, as well as before it."""
    for name in ("config", "socket", "root"):
        function = click.option(f"--{name}", type=click.Path(path_type=Path), expose_value=False, hidden=True,
                                callback=_remember)(function)  # fmt: skip
    return function


def _remember(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.obj[parameter.name] = value


def settings(context: click.Context, **options: Any) -> Config:
    """The configuration with this command's options."""
    given = context.obj
    return load_config(given["config"], options={"root": given["root"], "socket": given["socket"], **options})


def client(context: click.Context) -> Client:
    return Client(settings(context).socket)


@cli.command()
@location_options
@click.option("--plane", type=click.Choice(["auto", "fanotify", "cachefiles"]), help="How the kernel asks [auto].")
@click.option("--form", type=_FORMS, help="How blobs lie in the cache [auto].")
@click.option("--on-stop", type=click.Choice(["keep", "umount"]), help="What SIGTERM does with the mounts [keep].")
@click.option("--insecure", is_flag=True, help="Accept plain HTTP and unverified TLS from every registry.")
@click.option("--quota", help="Bytes of cached data, e.g. 20G.")
@click.option("--deadline", type=float, help="Seconds that a READ is retried before it fails [120].")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much is logged to stderr [info]."
)
@click.pass_context
def serve(context: click.Context, /, insecure: bool, **options: Any) -> None:
    """Run the daemon in the foreground."""
    from loader.cli.loader_serve import serve as run_daemon

    context.exit(run_daemon(lambda: settings(context, insecure=insecure or None, **options)))


@cli.command()
@location_options
@click.argument("image")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.option("--form", type=_FORMS, help="Form of the metadata [what the daemon serves].")
@click.option(
    "--domain", help="Share page cache with this domain's mounts; auto: the owner's; off: none [as configured]."
)
@json_option
@click.pass_context
def mount(
    context: click.Context, image: str, directory: str, form: str | None, domain: str | None, as_json: bool
) -> None:
    """Mount IMAGE (docker://…, oci:DIR[:TAG]) on DIRECTORY."""
    body = {"image": absolute(image), "target": directory} | ({"form": form} if form else {})
    body |= {"domain": domain} if domain else {}
    daemon = client(context)
    try:
        mounted = daemon.request("POST", "/v1/mounts", body)
    except BusyError as error:
        error.hint = error.hint or _way_to_free(daemon, directory)
        raise
    if as_json:
        print_json(mounted)
    else:
        shared = f", pages shared in {mounted['domain']}" if "domain" in mounted else ""
        click.echo(f"{mounted['image']} on {mounted['target']} ({mounted['form']}, {mounted['plane']}{shared})")


def _way_to_free(daemon: Client, directory: str) -> str | None:
    """What to do about a busy target, if it is a mount of the daemon's."""
    ours = any(mount["target"] == directory for mount in daemon.request("GET", "/v1/mounts"))
    return f"unmount it first: erofs-loader umount {shlex.quote(directory)}" if ours else None


@cli.command()
@location_options
@click.argument("directory", type=click.Path())
@click.option("--lazy", is_flag=True, help="Detach now, let go when the last user is gone.")
@json_option
@click.pass_context
def umount(context: click.Context, directory: str, lazy: bool, as_json: bool) -> None:
    """Unmount DIRECTORY."""
    query = {"target": os.path.realpath(directory)} | ({"lazy": "1"} if lazy else {})
    answer = client(context).request("DELETE", "/v1/mounts", query=query)
    print_json(answer) if as_json else click.echo(f"{answer['unmounted']} unmounted")


@cli.command()
@location_options
@click.argument("image")
@click.option("--form", type=_FORMS, help="Form of the metadata [what the daemon serves].")
@click.option("--pin/--unpin", "pinned", default=None, help="Keep the image's data whatever the quota says.")
@json_option
@click.pass_context
def add(context: click.Context, image: str, form: str | None, pinned: bool | None, as_json: bool) -> None:
    """Have IMAGE's metadata here. With cachefiles, prints fsid and domain_id for mount -t erofs."""
    body: dict[str, Any] = {"image": absolute(image)} | ({"form": form} if form else {})
    added = client(context).request("POST", "/v1/images", body | ({} if pinned is None else {"pinned": pinned}))
    if as_json:
        print_json(added)
        return
    click.echo(f"{added['name']} {added['digest']} ({added['form']})")
    if "fsid" in added:
        options = ",".join(
            [f"fsid={added['fsid']}", f"domain_id={added['domain_id']}", *filter(None, [added.get("options")])]
        )
        click.echo(f"fsid={added['fsid']}\ndomain_id={added['domain_id']}\nmount -t erofs none DIR -o {options}")


@cli.command()
@location_options
@click.argument("image")
@json_option
@click.pass_context
def remove(context: click.Context, image: str, as_json: bool) -> None:
    """Forget IMAGE (its name, or its digest or the start of it); `gc` then frees its data."""
    answer = client(context).request("DELETE", "/v1/images", query={"image": absolute(image)})
    print_json(answer) if as_json else click.echo(f"{answer['name']} {answer['removed']} removed")


@cli.command(name="list")
@location_options
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """Images and where they are mounted."""
    images = client(context).request("GET", "/v1/images")
    if as_json:
        print_json(images)
        return
    rows = [
        (
            image["digest"][7:19],
            human_size(image["size"]),
            ",".join(image["forms"]),
            image["name"] + (" (pinned)" if image["pinned"] else ""),
            " ".join(image["mounts"]) or "-",
        )
        for image in images
    ]
    print_table(("DIGEST", "SIZE", "FORMS", "IMAGE", "MOUNTED ON"), rows, right=(1,))


@cli.command()
@location_options
@json_option
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Whether the daemon is well: processes, who waits, the registries' last errors."""
    answer = client(context).request("GET", "/v1/status")
    if as_json:
        print_json(answer)
        return
    worker, keeper = answer["worker"], answer["keeper"]
    click.echo(f"plane {answer['plane']}, form {answer['form']}, root {answer['root']}")
    click.echo(f"page cache shared between images: {answer['page_domain']}")
    click.echo(f"keeper pid {keeper.get('pid')}, worker pid {worker['pid']}, up {worker['uptime']:.0f} s")
    click.echo(f"images {answer['images']}, mounts {answer['mounts']}, requests waiting {len(keeper['requests'])}")
    for flight in answer["waiting"]:
        click.echo(f"  waits {flight['age']:.1f} s: frame {flight['frame']} of {flight['file']}")
    for source, error in answer["source_errors"].items():
        click.echo(f"last error of {source}: {error}")
    for failure in answer["failed_reads"]:
        place = f"{failure['file']}, bytes {failure['offset']}+{failure['length']}"
        click.echo(f"read failed {time.time() - failure['at']:.0f} s ago: {place}: {failure['reason']}")
    for entry in answer["fenced"]:
        click.echo(f"fenced: {entry}")


@cli.command()
@location_options
@json_option
@click.pass_context
def stats(context: click.Context, as_json: bool) -> None:
    """What was read, fetched and written since the worker started, and what the cache holds."""
    answer = client(context).request("GET", "/v1/stats")
    if as_json:
        print_json(answer)
        return
    rows = list(answer["counters"].items())
    rows += [(f"cache_{name}", "-" if value is None else value) for name, value in answer["cache"].items()]
    rows.append(("frames_ready", f"{answer['frames_ready']} of {answer['frames']}"))
    print_table(("COUNTER", "VALUE"), rows, right=(1,))


@cli.command()
@location_options
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--all", "everything", is_flag=True, help="Also the data of images that are not mounted.")
@json_option
@click.pass_context
def gc(context: click.Context, dry_run: bool, everything: bool, as_json: bool) -> None:
    """Free cached data that no image needs."""
    answer = client(context).request("POST", "/v1/gc", {"dry_run": dry_run, "everything": everything})
    if as_json:
        print_json(answer)
    else:
        verb = "would free" if dry_run else "freed"
        click.echo(f"{verb} {human_size(answer['freed_bytes'])} in {answer['blobs']} blobs")


@cli.command()
@location_options
@json_option
@click.pass_context
def scrub(context: click.Context, as_json: bool) -> None:
    """Check all cached data; what is damaged on disk is fetched again. Ends with 12 if anything was."""
    reports = client(context).stream("/v1/scrub", {})
    report: dict[str, Any] = dict.fromkeys(("total", "checked", "frames", "payloads", "damaged"), 0) | {"skipped": []}
    report = next(reports, report)
    from loader.cli.bars import progress_bars

    with progress_bars(quiet=as_json).task("scrub", report["total"]) as bar:
        seen = 0
        for report in itertools.chain([report], reports):  # noqa: B020 - the last one is wanted
            bar.advance(report["checked"] - seen)
            seen = report["checked"]
    if as_json:
        print_json(report)
    else:
        for entry in report["skipped"]:
            click.echo(f"not checked: {entry}")
        what = f"{report['frames']} frames and {report['payloads']} metadata files, {human_size(report['checked'])}"
        click.echo(f"{what}; {report['damaged']} were damaged")
    context.exit(IntegrityError.exit_code if report["damaged"] else 0)


@cli.command()
@location_options
@click.argument("image")
@click.argument("paths", nargs=-1)
@click.option("--form", type=_FORMS, help="Which form [that which is mounted or here].")
@json_option
@click.pass_context
def prefetch(context: click.Context, image: str, paths: tuple[str, ...], form: str | None, as_json: bool) -> None:
    """Fetch IMAGE, which was added or mounted before, or PATHS in it, before they are read."""
    body = {"image": absolute(image), "paths": list(paths)} | ({"form": form} if form else {})
    report: dict[str, Any] = {"fetched": 0, "total": 0}
    reports = client(context).stream("/v1/prefetch", body)
    report = next(reports, report)
    from loader.cli.bars import progress_bars

    with progress_bars(quiet=as_json).task("prefetch", report["total"]) as bar:
        seen = 0
        for report in itertools.chain([report], reports):  # noqa: B020 - the last one is wanted
            bar.advance(report["fetched"] - seen)
            seen = report["fetched"]
    if as_json:
        print_json(report)
    else:
        share = percent(report["fetched"], report["total"]) if report["total"] else "all here already"
        click.echo(f"fetched {human_size(report['fetched'])} ({share})")


@cli.command()
@location_options
@click.argument("image")
@click.argument("command", nargs=-1)
@click.option("--publish/--no-publish", default=True, help="Store the trace beside the image, for other nodes.")
@click.option("--output", type=click.Path(path_type=Path), help="With a COMMAND: write its trace to this file.")
@click.option("--insecure", is_flag=True, help="Accept plain HTTP and unverified TLS from the registry.")
@json_option
@click.pass_context
def trace(
    context: click.Context, /, image: str, command: tuple[str, ...], publish: bool, output: Path | None,
    insecure: bool, as_json: bool,
) -> None:  # fmt: skip
    """Keep what was read of IMAGE since it was mounted as what its next start will read.

    With `-- COMMAND ...`: run it, and record each page that it touches of IMAGE's mounts of the decoded form; from such
    a trace `erofs-builder convert --trace` rebuilds the layout.
    """
    from loader.cli import loader_trace

    if output and not command:
        raise UsageError(
            "--output takes the trace of a command", hint="erofs-loader trace IMAGE --output FILE -- COMMAND"
        )
    pages: list[PageRun] | None = None
    if command:
        answer, pages = loader_trace.page_trace(client(context), absolute(image), command)
    else:
        answer = loader_trace.frame_trace(client(context), absolute(image))
    if output and pages is not None:
        loader_trace.write_pages(output, pages)
    if publish:
        answer["published"] = loader_trace.publish_trace_of(settings(context, insecure=insecure or None), answer, pages)
    if as_json:
        print_json(answer)
        return
    count = f"{answer['pages']} pages" if command else f"{answer['count']} frames"
    click.echo(f"{count}, {human_size(answer['bytes'])}")
    if publish:
        click.echo(f"published as {answer['published']}, which refers to {answer['digest']}")


@cli.command()
@location_options
@click.option("--keep/--umount", "keep", default=None, help="What becomes of the mounts [as configured].")
@json_option
@click.pass_context
def stop(context: click.Context, keep: bool | None, as_json: bool) -> None:
    """End the daemon in order."""
    body = {} if keep is None else {"mode": "keep" if keep else "umount"}
    answer = client(context).request("POST", "/v1/stop", body)
    print_json(answer) if as_json else click.echo("stopping")


@cli.command()
@location_options
@json_option
@click.pass_context
def probe(context: click.Context, as_json: bool) -> None:
    """What this kernel can do, tried; and what to do about the rest."""
    from loader.cli.loader_serve import probe as probe_kernel

    context.exit(probe_kernel(settings(context), as_json))


def absolute(image: str) -> str:
    """A layout's directory as seen from here, since the daemon stands somewhere else."""
    for scheme in ("oci:", "oci-archive:"):
        if image.startswith(scheme):
            path, colon, tag = image[len(scheme) :].partition(":")
            return scheme + os.path.abspath(path) + colon + tag  # noqa: PTH100 - no symlink is followed
    return image
