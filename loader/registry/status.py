"""What a registry's HTTP status means to us."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping

from loader.errors import LoaderError, NotFoundError, RegistryError, TransientRegistryError
from loader.registry.transport import HttpResponse

_MESSAGE_LIMIT = 200
_MAX_RETRY_AFTER = 3600.0


def error_of(response: HttpResponse, what: str, hint: str | None = None) -> LoaderError:
    """The error for an answer that is not what was hoped for; reads its body and closes it."""
    status = response.status
    try:
        detail = _detail(response.read(16384))
    except TransientRegistryError:
        detail = ""
    finally:
        response.close()
    text = f"{what}: {detail or 'HTTP status'} ({status})"
    if status == 404:
        return NotFoundError(text, hint)
    if status in (408, 425, 429) or (status >= 500 and status != 501):
        return TransientRegistryError(text, hint, retry_after(response.headers))
    return RegistryError(text, hint)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), at most an hour."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _MAX_RETRY_AFTER)
    try:
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER)


def _detail(body: bytes) -> str:
    """The registry's own words: code and message of the first entry of `errors`, made printable and short."""
    try:
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(character if character.isprintable() else "?" for character in text)[:_MESSAGE_LIMIT]
