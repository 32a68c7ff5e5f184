"""A real docker-registry on loopback, with or without logins and TLS, for the length of a `with` block."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(directory: Path) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Two servers' certificates, each with its key, of one CA (ca.pem): a good one, and one that has expired."""
    directory.mkdir(parents=True, exist_ok=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=directory)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
            "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    (directory / "ca.conf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        "unique_subject=no\ncopy_extensions=copy\n[p]\ncommonName=supplied\n"
    )
    (directory / "index").touch()
    (directory / "serial").write_text("01\n")
    made = []
    for name, end in (("good", "20990101000000Z"), ("old", "20210101000000Z")):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-addext",
                "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        valid = ("-startdate", "20200101000000Z", "-enddate", end)
        openssl("ca", "-batch", "-config", "ca.conf", "-cert", "ca.pem", "-keyfile", "ca.key", *valid,
                "-in", f"{name}.csr", "-out", f"{name}.pem", "-notext")  # fmt: skip
        made.append((directory / f"{name}.pem", directory / f"{name}.key"))
    return made[0], made[1]


@contextmanager
def docker_registry(
    directory: Path,
    auth: dict[str, Any] | None = None,
    tls: tuple[Path, Path] | None = None,
    port: int | None = None,
) -> Iterator[str]:
    """Serve `directory`/storage; yields host:port. `auth` is its own auth section, `tls` certificate and key."""
    port = port or free_port()
    directory.mkdir(parents=True, exist_ok=True)
    http: dict[str, Any] = {"addr": f"127.0.0.1:{port}", "secret": "test"}
    if tls:
        http["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    document: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}, "delete": {"enabled": True}},
        "http": http,
    }
    if auth:
        document["auth"] = auth
    config = directory / "config.yml"
    config.write_text(json.dumps(document))  # JSON is YAML
    with (directory / "registry.log").open("ab") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        wait_for_port(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until something listens on loopback's port; RuntimeError if the process ends before."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen on {port}")


def htpasswd_auth(directory: Path, username: str, password: str) -> dict[str, Any]:
    """The registry's auth section for basic logins of one user."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "htpasswd"
    run = subprocess.run(["htpasswd", "-Bbn", username, password], check=True, capture_output=True)
    file.write_bytes(run.stdout)
    return {"htpasswd": {"realm": "test", "path": str(file)}}


def login_file(directory: Path, username: str, password: str, *hosts: str) -> Path:
    """A config.json with one login for some hosts; an older one is replaced."""
    file = directory / "login.json"
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    fresh = directory / "login.new"
    fresh.write_text(json.dumps({"auths": {host: {"auth": auth} for host in hosts}}))
    fresh.rename(file)
    return file


def self_signed(directory: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate for an address, and its key."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", f"subjectAltName=IP:{host},DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def get_json(url: str) -> Any:
    """A JSON document by plain HTTP; None for 404."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
