"""`erofs-loader trace`: the daemon says what was read; its publication needs this user's own logins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from erofs_builder.digest import Digest
from loader.config import Config
from loader.registry.config import load_registry_config
from loader.registry.open import open_target
from loader.trace import publish_trace
from loader.worker.images import repository


def publish_trace_of(config: Config, answer: dict[str, Any]) -> str:
    """Publish the trace of a `/v1/trace` answer beside its artifact; returns the trace's digest."""
    registries = load_registry_config(config.file)
    if config.insecure:
        registries = replace(registries, insecure=True)
    target, _ = open_target(repository(answer["source"]), registries)
    try:
        return str(publish_trace(target, Digest.parse(answer["digest"]), answer["frames"]).digest)
    finally:
        target.close()
