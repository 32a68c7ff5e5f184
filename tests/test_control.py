"""The control socket: routes, arguments, errors; through the client that the commands use, and through curl."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.errors import IntegrityError
from loader.cli.loader_client import Client
from loader.errors import BusyError, KernelSupportError, LoaderError, NotFoundError, UsageError
from loader.worker.api import Api
from loader.worker.control import ControlServer


class FakeApi(Api):
    """Answers without a daemon."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.release = threading.Event()

    def status(self) -> dict[str, Any]:
        self.release.wait(10)
        return {"well": True}

    def stats(self) -> dict[str, Any]:
        raise IntegrityError("wrong bytes")

    def images(self) -> list[dict[str, Any]]:
        return [{"name": "a"}]

    def mounts(self) -> list[dict[str, Any]]:
        raise ZeroDivisionError("a bug")

    def metrics(self) -> str:
        return "erofs_loader_requests_total 1\n"

    def mount(self, image: str, target: str, form: str | None = None, domain: str | None = None) -> dict[str, Any]:
        self.calls.append((image, target, form))
        if image == "busy":
            raise BusyError("in use", hint="wait")
        return {"target": target}

    def umount(self, target: str, lazy: bool = False) -> dict[str, Any]:
        self.calls.append((target, lazy))
        raise NotFoundError("not mounted")

    def gc(self, dry_run: bool = False, everything: bool = False) -> dict[str, Any]:
        raise KernelSupportError("no such kernel")

    def prefetch(self, image: str, paths: list[str], form: str | None = None) -> Iterator[dict[str, Any]]:
        yield {"fetched": 1, "paths": paths}
        if image == "broken":
            raise NotFoundError("gone")
        yield {"fetched": 2, "finished": True}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, FakeApi]]:
    path, api = tmp_path / "s", FakeApi()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ControlServer(listener, api)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield path, api
        api.release.set()
        server.shutdown()
        thread.join()


def test_requests_reach_their_operation(served: tuple[Path, FakeApi]) -> None:
    client = Client(served[0])
    assert client.request("GET", "/v1/images") == [{"name": "a"}]
    assert client.request("POST", "/v1/mounts", {"image": "i", "target": "/t"}) == {"target": "/t"}
    with pytest.raises(NotFoundError, match="not mounted"):
        client.request("DELETE", "/v1/mounts", query={"target": "/t", "lazy": "1"})
    assert served[1].calls == [("i", "/t", None), ("/t", True)]


def test_errors_keep_their_kind_and_hint(served: tuple[Path, FakeApi]) -> None:
    client = Client(served[0])
    with pytest.raises(BusyError, match="in use") as caught:
        client.request("POST", "/v1/mounts", {"image": "busy", "target": "/t"})
    assert caught.value.hint == "wait"
    with pytest.raises(IntegrityError, match="wrong bytes"):
        client.request("GET", "/v1/stats")
    with pytest.raises(KernelSupportError):
        client.request("POST", "/v1/gc", {})
    with pytest.raises(LoaderError, match="a bug"):
        client.request("GET", "/v1/mounts")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/nothing", None),
        ("PUT", "/v1/images", None),
        ("POST", "/v1/mounts", {"image": "i"}),
        ("POST", "/v1/mounts", {"target": "/t"}),
        ("POST", "/v1/mounts", {"image": 7, "target": "/t"}),
        ("POST", "/v1/mounts", {"image": "i", "target": "/t", "other": 1}),
        ("POST", "/v1/mounts", ["i"]),
        ("POST", "/v1/prefetch", {"image": "i", "paths": [1]}),
        ("POST", "/v1/gc", {"dry_run": "perhaps"}),
    ],
)
def test_malformed_requests_are_usage_errors(
    served: tuple[Path, FakeApi], method: str, path: str, body: object
) -> None:
    if method == "PUT":
        with pytest.raises(LoaderError):
            Client(served[0]).request(method, path, body)
        return
    with pytest.raises(UsageError):
        Client(served[0]).request(method, path, body)


def test_reports_come_as_lines_and_the_last_may_be_an_error(served: tuple[Path, FakeApi]) -> None:
    client = Client(served[0])
    reports = list(client.stream("/v1/prefetch", {"image": "i", "paths": ["/a"]}))
    assert reports == [{"fetched": 1, "paths": ["/a"]}, {"fetched": 2, "finished": True}]
    reports = []
    with pytest.raises(NotFoundError, match="gone"):
        reports.extend(client.stream("/v1/prefetch", {"image": "broken"}))


def test_a_long_operation_blocks_no_other(served: tuple[Path, FakeApi]) -> None:
    client, answers = Client(served[0]), list[Any]()
    thread = threading.Thread(target=lambda: answers.append(client.request("GET", "/v1/status")))
    thread.start()
    assert client.request("GET", "/v1/images") == [{"name": "a"}]
    assert answers == []
    served[1].release.set()
    thread.join(10)
    assert answers == [{"well": True}]


def test_who_was_asked_before_the_end_still_answers(tmp_path: Path) -> None:
    """`stop` is asked here and ends the worker: its own answer must get out."""
    path, api = tmp_path / "s", FakeApi()
    found: list[Any] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ControlServer(listener, api)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        asking = threading.Thread(target=lambda: found.append(Client(path).request("GET", "/v1/status")))
        asking.start()
        while not server._answering:
            time.sleep(0.01)
        server.finish(0)
        assert server._answering
        threading.Timer(0.1, api.release.set).start()
        server.finish(10)
        assert not server._answering
        asking.join()
        serving.join()
    assert found == [{"well": True}]


def test_no_daemon_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="no daemon listens") as caught:
        Client(tmp_path / "nothing").request("GET", "/v1/status")
    assert str(caught.value.hint).startswith("systemctl start erofs-loader (or `erofs-loader serve`)")
    assert caught.value.exit_code == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_is_client_enough(served: tuple[Path, FakeApi]) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--unix-socket", str(served[0]), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert json.loads(curl("http://x/v1/images")) == [{"name": "a"}]
    assert curl("http://x/metrics") == "erofs_loader_requests_total 1\n"
    assert json.loads(curl("-d", '{"image": "i", "target": "/t"}', "http://x/v1/mounts")) == {"target": "/t"}
    assert json.loads(curl("-d", "{", "http://x/v1/mounts"))["code"] == 2


def test_a_daemon_that_never_answers_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.cli.loader_client._QUERY_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(LoaderError, match=r"did not answer within 0 s") as caught:
            Client(tmp_path / "s").request("GET", "/v1/status")
    assert "journalctl" in str(caught.value.hint)


def _answering(path: Path, *answers: bytes) -> threading.Thread:
    """Someone who gives each caller one of these answers, and hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


OK = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(
    "broken",
    [b"", b"HTTP/1.0 200", b"nonsense\r\n\r\n", OK + b"Content-Length: 9\r\n", OK + b"Content-Length: 9\r\n\r\n{}"],
)
def test_a_request_whose_answer_breaks_off_is_made_again(tmp_path: Path, broken: bytes) -> None:
    answering = _answering(tmp_path / "s", broken, OK + b"Content-Length: 2\r\n\r\n{}")
    assert Client(tmp_path / "s").request("GET", "/v1/status") == {}
    answering.join(20)
    answering = _answering(tmp_path / "t", broken, broken)
    with pytest.raises(LoaderError, match="hung up"):
        Client(tmp_path / "t").request("GET", "/v1/status")
    answering.join(20)


@pytest.mark.parametrize("answer", [b"", OK + b"\r\n", OK + b'\r\n{"fetched": 1, "finished": false}\n'])
def test_a_stream_that_breaks_off_is_no_success(tmp_path: Path, answer: bytes) -> None:
    answering = _answering(tmp_path / "s", answer)
    with pytest.raises(LoaderError, match="hung up"):
        list(Client(tmp_path / "s").stream("/v1/prefetch", {}))
    answering.join(20)
