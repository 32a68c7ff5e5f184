"""Authentication to one registry: anonymous, basic, and bearer tokens (the distribution token specification)."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlencode

from loader.errors import RegistryError, TransientRegistryError
from loader.registry.credentials import Credentials, Keychain
from loader.registry.status import error_of
from loader.registry.transport import HttpRequest, Transport, public_url, split_url

_TOKEN_LIMIT = 1 << 20
_HEADER_LIMIT = 16384
_DEFAULT_EXPIRY = 60.0  # seconds, when the server names none
# The look-behind keeps a hostile header of one long word from being tried from each of its letters on.
_PARAMETER = re.compile(r'(?<![A-Za-z0-9_-])([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"(?:^|,)\s*(Bearer|Basic)(?=\s|,|$)", re.IGNORECASE)
Scopes = tuple[str, ...]


class Challenge(NamedTuple):
    """What a WWW-Authenticate header asks for; `scheme` in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """The Bearer and Basic challenges of a header, in its order; others are left out."""
    header = header[:_HEADER_LIMIT]
    found = list(_SCHEME.finditer(header))
    challenges = []
    for number, match in enumerate(found):
        end = found[number + 1].start() if number + 1 < len(found) else len(header)
        pairs = _PARAMETER.findall(header[match.end() : end])
        parameters = {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain for name, quoted, plain in pairs}
        challenges.append(Challenge(match[1].lower(), parameters))
    return challenges


def repository_scope(repository: str, actions: str) -> str:
    """A scope of the token specification, e.g. repository:library/debian:pull."""
    return f"repository:{repository}:{actions}"


@dataclass(slots=True)
class _Token:
    header: str
    expires: float  # time.monotonic()


class Authenticator:
    """Keeps the Authorization header of one registry per scope. Thread-safe; one token request at a time."""

    def __init__(self, transport: Transport, host: str, repository: str, keychain: Keychain, plain_ok: bool) -> None:
        self._transport = transport
        self._host = host
        self._repository = repository
        self._keychain = keychain
        self._plain_ok = plain_ok
        self._challenge: Challenge | None = None
        self._tokens: dict[Scopes, _Token] = {}
        self._lock = threading.Lock()

    def header(self, scopes: Scopes) -> str | None:
        """The header to send with a request; None before the registry has asked for one."""
        if self._challenge is None:
            return None
        token = self._tokens.get(scopes)
        if token is None or token.expires < time.monotonic():
            with self._lock:
                token = self._tokens.get(scopes)
                if token is None or token.expires < time.monotonic():
                    token = self._tokens[scopes] = self._obtain(self._challenge, scopes)
        return token.header

    def challenged(self, header: str, scopes: Scopes, used: str | None) -> None:
        """The registry answered 401 with this WWW-Authenticate header although `used` was sent.

        The next `header` call gives a fresh one; RegistryError if the registry cannot be satisfied.
        """
        challenges = {challenge.scheme: challenge for challenge in reversed(parse_challenges(header))}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            raise RegistryError(f"{self._host}: asks for an unknown kind of login", "bearer and basic are supported")
        with self._lock:
            self._challenge = challenge
            token = self._tokens.get(scopes)
            if token is not None and token.header == used:
                del self._tokens[scopes]

    def _obtain(self, challenge: Challenge, scopes: Scopes) -> _Token:
        credentials = self._keychain.get(self._host, self._repository)
        if challenge.scheme == "bearer":
            return self._fetch_token(challenge.parameters, scopes, credentials)
        if credentials is None or not credentials.username:
            raise RegistryError(f"{self._host}: needs a login", self.login_hint)
        return _Token(credentials.basic, float("inf"))

    @property
    def login_hint(self) -> str:
        """What to do about a refused login."""
        return f"log in with `docker login {self._host}` (or podman, skopeo), or set auth_file in the configuration"

    def _fetch_token(self, parameters: dict[str, str], scopes: Scopes, credentials: Credentials | None) -> _Token:
        realm = parameters.get("realm", "")
        parts = split_url(realm)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RegistryError(f"{self._host}: names no usable token server")
        if parts.scheme == "http" and not self._plain_ok and credentials is not None:
            raise RegistryError(
                f"{self._host}: wants the login sent to its token server in plain text", "use --insecure"
            )
        query = [("service", parameters["service"])] if parameters.get("service") else []
        wanted = [*scopes, *_further_scopes(parameters.get("scope", ""), scopes)]
        started = time.monotonic()
        response = self._transport.send(_token_request(realm, query, wanted, credentials))
        try:
            if response.status != 200:
                hint = self.login_hint if response.status in (400, 401, 403) else None
                raise error_of(response, f"token server {public_url(realm)}", hint)
            body = response.read(_TOKEN_LIMIT)
        finally:
            response.close()
        return _parse_token(body, started, public_url(realm))


def _further_scopes(text: str, scopes: Scopes) -> list[str]:
    """Scopes of the challenge on resources that ours do not name."""
    known = {scope.rpartition(":")[0] for scope in scopes}
    return [scope for scope in text.split() if scope.rpartition(":")[0] not in known]


def _token_request(
    realm: str, query: list[tuple[str, str]], scopes: list[str], credentials: Credentials | None
) -> HttpRequest:
    if credentials is not None and credentials.identity_token:
        form = [
            ("grant_type", "refresh_token"),
            *query,
            ("client_id", "erofs-ondemand"),
            ("scope", " ".join(scopes)),
            ("refresh_token", credentials.identity_token),
        ]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return HttpRequest("POST", realm, headers, urlencode(form).encode())
    query = query + [("scope", scope) for scope in scopes]
    if credentials is not None:
        query.insert(0, ("account", credentials.username))
    url = realm + ("&" if "?" in realm else "?") + urlencode(query)
    return HttpRequest("GET", url, {"Authorization": credentials.basic} if credentials else {})


def _parse_token(body: bytes, started: float, server: str) -> _Token:
    try:
        document = json.loads(body)
        token = document.get("token") or document["access_token"]
        expiry = float(document.get("expires_in") or _DEFAULT_EXPIRY)
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or expiry != expiry:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise TransientRegistryError(f"token server {server}: malformed answer") from None
    # A tenth earlier than told, so that no request is under way when it runs out.
    return _Token(f"Bearer {token}", started + 0.9 * min(max(expiry, 10.0), 86400.0))
