"""A token server as the distribution token specification describes it: real HTTP, tokens signed with openssl.

docker-registry checks its tokens, so a client that passes both has spoken the protocol.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.registry import self_signed

ISSUER, SERVICE = "test issuer", "test service"


class TokenServer(ThreadingHTTPServer):
    """Gives `pull` to everybody and `push` to the one user (by password or by identity token)."""

    daemon_threads = True

    def __init__(self, directory: Path, username: str, password: str, identity_token: str, lifetime: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.certificate, self.key = self_signed(directory)
        self.basic = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
        self.identity_token = identity_token
        self.lifetime = lifetime
        self.requests: list[str] = []  # "GET user", "GET anonymous", "POST user"

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/token"

    @property
    def auth(self) -> dict[str, Any]:
        """The registry's auth section."""
        bundle = str(self.certificate)
        return {"token": {"realm": self.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": bundle}}

    def token(self, scopes: list[str], may_push: bool) -> str:
        """A signed token for those of the scopes' actions that are allowed."""
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [action for action in actions.split(",") if action == "pull" or may_push]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [self._der()]}
        claims = {"iss": ISSUER, "sub": "", "aud": SERVICE, "nbf": now - 10, "iat": now, "exp": now + self.lifetime}
        claims |= {"jti": secrets.token_hex(8), "access": access}
        signed = f"{_base64url(json.dumps(header).encode())}.{_base64url(json.dumps(claims).encode())}"
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.key)]
        signature = subprocess.run(command, input=signed.encode(), check=True, capture_output=True).stdout
        return f"{signed}.{_base64url(signature)}"

    def _der(self) -> str:
        lines = self.certificate.read_text().splitlines()
        return "".join(lines[1:-1])


class _Handler(BaseHTTPRequestHandler):
    server: TokenServer

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        authorization = self.headers.get("Authorization")
        if authorization is not None and authorization != self.server.basic:
            self._answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]})
            return
        self._grant("GET", query.get("scope", []), authorization is not None)

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("grant_type") != ["refresh_token"] or form.get("refresh_token") != [self.server.identity_token]:
            self._answer(401, {"details": "bad refresh token"})
            return
        self._grant("POST", form["scope"][0].split(" "), True)

    def _grant(self, method: str, scopes: list[str], known: bool) -> None:
        self.server.requests.append(f"{method} {'user' if known else 'anonymous'}")
        token = self.server.token(scopes, known)
        self._answer(200, {"token": token, "access_token": token, "expires_in": self.server.lifetime})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def token_server(
    directory: Path, username: str = "user", password: str = "secret", identity_token: str = "", lifetime: int = 300
) -> Iterator[TokenServer]:
    """A running token server."""
    server = TokenServer(directory, username, password, identity_token, lifetime)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
