"""`erofs-loader trace`: the daemon says what was read, or the kernel which pages; published with this user's logins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.frame_list import encode_frames
from erofs_builder.page_trace import PageRun, encode_page_trace, traced_frames
from erofs_builder.payload import Form
from loader.cli.loader_client import Client
from loader.config import Config
from loader.convert.survey import load_tree
from loader.errors import LoaderError, NotFoundError
from loader.page_recorder import record_pages
from loader.registry.base import ImageTarget
from loader.registry.config import load_registry_config
from loader.registry.find import find_artifact
from loader.registry.open import open_target
from loader.trace import publish_trace
from loader.worker.images import repository


def frame_trace(client: Client, image: str) -> dict[str, Any]:
    """What the daemon saw being read of an image since it was mounted."""
    answer: dict[str, Any] = client.request("POST", "/v1/trace", {"image": image})
    return answer


def page_trace(client: Client, image: str, command: Sequence[str]) -> tuple[dict[str, Any], list[PageRun]]:
    """Run a command and record which pages of an image's mounts it touches; an answer like that for frames."""
    record = client.request("POST", "/v1/images", {"image": image})
    mounts = [each for each in client.request("GET", "/v1/mounts") if each["digest"] == record["digest"]]
    targets = [Path(each["target"]) for each in mounts if each["form"] == Form.DECODED.value]
    if not targets:
        raise NotFoundError(
            f"{image} is not mounted in the decoded form, whose pages can be told apart",
            hint="erofs-loader mount --form decoded IMAGE DIRECTORY",
        )
    pages = record_pages(targets, lambda: _run(command))
    if not pages:
        raise LoaderError(
            f"{command[0]} touched nothing of {image}",
            hint=f"start it from {targets[0]}; pages that mounts share (inode_share) are not seen",
        )
    count = sum(run.last - run.first + 1 for run in pages)
    return {"digest": record["digest"], "source": record["source"], "pages": count, "bytes": count * 4096}, pages


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except OSError as error:
        raise LoaderError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise LoaderError(f"{command[0]} failed ({done.returncode}): what it touched is no start")


def write_pages(file: Path, pages: Sequence[PageRun]) -> None:
    """Write a trace to a file."""
    file.write_bytes(encode_page_trace(pages))


def publish_trace_of(config: Config, answer: dict[str, Any], pages: list[PageRun] | None = None) -> str:
    """Publish the trace of an answer beside its artifact; returns the trace's digest."""
    registries = load_registry_config(config.file)
    if config.insecure:
        registries = replace(registries, insecure=True)
    target, _ = open_target(repository(answer["source"]), registries)
    digest = Digest.parse(answer["digest"])
    try:
        frames = _frames(target, digest, pages) if pages else answer["frames"]
        return str(publish_trace(target, digest, frames, pages=pages).digest)
    finally:
        target.close()


def _frames(source: ImageTarget, digest: Digest, pages: list[PageRun]) -> str:
    """The frames that have these pages."""
    _, artifact = find_artifact(source, str(digest))
    tree = load_tree(source, artifact)
    return encode_frames(traced_frames(tree.root, pages, {blob: number for number, blob in enumerate(tree.blobs)}))
