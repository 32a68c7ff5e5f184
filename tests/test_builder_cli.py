"""The builder's commands as a user calls them: output, JSON, exit codes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from erofs_builder.digest import Digest
from loader.cli.builder import cli
from loader.registry.layout import Layout
from tests.support.oci import add_image, new_layout, tar_of
from tests.support.registry import free_port

PROGRAM = [sys.executable, "-c", "from loader.cli.builder import main; main()"]
REPOSITORY = Path(__file__).parent.parent


def builder(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    result = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = new_layout(tmp_path_factory.mktemp("cli") / "layout")
    layer = tar_of({"etc/": b"", "etc/name": b"one\n", "etc/\udcff": b"odd", "big": bytes(range(256)) * 1000})
    add_image(layout, [layer], "image")
    builder("convert", f"oci:{layout.path}:image", f"oci:{layout.path}:artifact")
    return layout


def test_convert_shows_what_it_did(layout: Layout, tmp_path: Path) -> None:
    text = builder("convert", f"oci:{layout.path}:image", f"oci:{tmp_path}/out:t").stdout
    assert "platform linux/amd64" in text and "5 inodes" in text and f"oci:{tmp_path}/out:t@sha256:" in text
    document = json.loads(builder("convert", f"oci:{layout.path}:image", f"oci:{tmp_path}/out:t", "--json").stdout)
    (image,) = document["images"]
    assert document["digest"] == image["artifact"]["digest"] and image["inodes"] == 5
    assert [blob["stored"] for blob in image["blobs"]] == ["there"]


def test_inspect(layout: Layout) -> None:
    text = builder("inspect", f"oci:{layout.path}:image").stdout
    assert "3 files" in text and "/big" in text and "metadata  encoded" in text
    document = json.loads(builder("inspect", f"oci:{layout.path}:artifact", "--json", "--top", "1").stdout)
    assert document["file_bytes"] == 256_000 + 7 and document["largest"] == [{"path": "/big", "size": 256_000}]


@pytest.mark.parametrize("form", ["encoded", "decoded"])
def test_dump(layout: Layout, form: str) -> None:
    lines = builder("dump", f"oci:{layout.path}:image", "--form", form).stdout.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["/", "/big", "/etc", "/etc/name", "/etc/\\xff"]
    assert lines[0].startswith("drwxr-xr-x    3")
    documents = [json.loads(line) for line in builder("dump", f"oci:{layout.path}:image", "--json").stdout.splitlines()]
    assert os.fsencode(documents[-1]["path"]) == b"/etc/\xff" and documents[1]["size"] == 256_000


@pytest.mark.parametrize("form", ["encoded", "decoded"])
def test_export(layout: Layout, tmp_path: Path, form: str) -> None:
    file = tmp_path / "flat.erofs"
    document = json.loads(builder("export", f"oci:{layout.path}:image", str(file), "--form", form, "--json").stdout)
    assert document["size"] == file.stat().st_size
    assert file.read_bytes()[1024:1028] == b"\xe2\xe1\xf5\xe0"
    assert [path.name for path in tmp_path.iterdir()] == ["flat.erofs"]


def test_check(layout: Layout, tmp_path: Path) -> None:
    assert builder("check", f"oci:{layout.path}:image").stdout.startswith("ok: sha256:")
    subprocess.run(["cp", "-r", str(layout.path), f"{tmp_path}/copy"], check=True)
    document = json.loads(builder("inspect", f"oci:{layout.path}:artifact", "--json").stdout)
    blob = tmp_path / "copy/blobs/sha256" / document["blobs"][0]["digest"][7:]
    data = bytearray(blob.read_bytes())
    data[20] ^= 1
    blob.write_bytes(data)
    text = builder("check", f"oci:{tmp_path}/copy:image", code=12)
    assert "DAMAGED" in text.stdout and "frame 0" in text.stdout and "error:" in text.stderr
    report = json.loads(builder("check", f"oci:{tmp_path}/copy:image", "--json", code=12).stdout)
    assert not report["ok"] and report["damage"][0]["paths"]
    blob.unlink()
    builder("check", f"oci:{tmp_path}/copy:image", code=12)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["convert", "ftp://x", "oci:y"], 2),
        (["convert", "only-one"], 2),
        (["nonsense"], 2),
        (["inspect", "oci:/nowhere"], 10),
        (["inspect", "oci:LAYOUT:none"], 10),
        (["inspect", "127.0.0.1:PORT/a"], 11),
        (["convert", "oci:LAYOUT:artifact", "oci:LAYOUT:x"], 2),
        (["inspect", "oci:LAYOUT:image", "--config", "/nowhere.toml"], 2),
        (["export", "oci:LAYOUT:image", "/nowhere/x"], 1),
        (["inspect", "oci:LAYOUT:broken"], 15),
        (["inspect", "docker-daemon:nginx"], 2),
        (["inspect", "/nowhere"], 2),
        (["convert", "oci:LAYOUT:image", "oci:LAYOUT:x", "--trace", "/nowhere"], 10),
    ],
)
def test_exit_codes(layout: Layout, arguments: list[str], code: int) -> None:
    broken = layout.path / "blobs/sha256" / Digest.of(b"[]").hex
    if not broken.exists():
        broken.write_bytes(b"[]")
    arguments = [word.replace("oci:LAYOUT:broken", f"oci:{layout.path}@{Digest.of(b'[]')}") for word in arguments]
    arguments = [word.replace("LAYOUT", str(layout.path)).replace("PORT", str(free_port())) for word in arguments]
    result = builder(*arguments, code=code)
    assert result.stderr and "Traceback" not in result.stderr
    if arguments[0] != "nonsense" and len(arguments) > 2 or arguments[0] == "inspect":
        error = json.loads(builder(*arguments, "--json", code=code).stderr)
        assert error["message_type"] == "exit_error" and error["code"] == code


@pytest.mark.parametrize("text", ["", "arm64", "linux/", "/arm64", "a/b/c/d", "linux/arm 64", "Linux/AMD64", "all"])
def test_a_platform_is_written_as_one(layout: Layout, text: str) -> None:
    for command in (["inspect"], ["check"], ["dump"], ["export"], ["convert"]):
        if (command, text) == (["convert"], "all"):
            continue
        target = [f"oci:{layout.path}:x"] if command[0] in ("export", "convert") else []
        error = builder(*command, f"oci:{layout.path}:image", *target, "--platform", text, code=2).stderr
        assert error == f"error: platform {text!r}: expected os/architecture[/variant], e.g. linux/amd64\n"


@pytest.mark.parametrize("tag", ["image", "artifact"])
def test_the_only_one_must_be_of_the_platform(layout: Layout, tag: str) -> None:
    reference = f"oci:{layout.path}:{tag}"
    assert not builder("inspect", reference, "--platform", "linux/amd64").stderr
    for wrong in ("linux/arm64", "linux/amd64/v3", "windows/amd64"):
        error = builder("inspect", reference, "--platform", wrong, code=10).stderr
        assert error == f"error: {reference}: the artifact is for linux/amd64, not for {wrong}\n"


def test_a_platform_that_nothing_tells_is_warned_of(layout: Layout, tmp_path: Path) -> None:
    out = f"oci:{tmp_path}/out:t"
    warning = "nothing says which platform it is for; it is taken for linux/arm64"
    add_image(layout, [], "silent", platform="/")
    converted = builder("convert", f"oci:{layout.path}:silent", out, "--platform", "linux/arm64")
    assert converted.stderr == f"warning: oci:{layout.path}:silent: {warning}\n"
    builder("convert", f"oci:{layout.path}:image", out)  # whose own platform is in another layout
    assert builder("inspect", out, "--platform", "linux/arm64").stderr == f"warning: {out}: {warning}\n"
    said = json.loads(builder("inspect", out, "--platform", "linux/arm64", "--json").stderr)
    assert said == {"message_type": "warning", "message": f"{out}: {warning}"}
    assert not builder("inspect", out).stderr


def test_an_error_is_a_line_and_its_remedy_another(layout: Layout) -> None:
    missing = builder("check", code=2).stderr.splitlines()
    assert missing == [
        "error: Missing argument 'REFERENCE'.", "hint: erofs-builder check [OPTIONS] REFERENCE (--help says more)"
    ]  # fmt: skip
    nowhere = builder("export", f"oci:{layout.path}:image", "/nowhere/x", code=1).stderr
    assert nowhere == "error: /nowhere: No such file or directory\n"


def test_output_to_a_closed_pipe(layout: Layout) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [*PROGRAM, "dump", f"oci:{layout.path}:image"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("program", ["builder", "loader"])
@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_to_a_closed_pipe(program: str, word: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", f"from loader.cli.{program} import main; main()", word]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=REPOSITORY, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for number in range(3000):
        (tmp_path / f"root/a-name-of-some-length-{number}").touch()
    builder("convert", f"rootfs:{tmp_path}/root", f"oci:{tmp_path}/out:t")
    script = f"set -o pipefail; {shlex.join([*PROGRAM, 'dump', f'oci:{tmp_path}/out:t'])} | head -1"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("drwx")


def test_another_broken_pipe_is_a_failure() -> None:
    failing = """
import click
from loader.cli.common import Commands, run

@click.group(cls=Commands)
def cli(): pass

@cli.command()
def fail(): raise BrokenPipeError(32, "Broken pipe")

run(cli, "cli", ["fail"])
"""
    command = [sys.executable, "-c", failing]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (result.returncode, result.stderr) == (1, "error: Broken pipe\n")


@pytest.mark.parametrize("program", ["builder", "loader"])
def test_without_a_command_there_is_help(program: str) -> None:
    command = [sys.executable, "-c", f"from loader.cli.{program} import main; main()"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("Usage: ")
    asked = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert asked.stdout == result.stderr


@pytest.mark.parametrize(
    ("before", "behind", "level"),
    [([], [], "WARNING"), ([], ["-v"], "INFO"), (["-v"], ["-v"], "DEBUG"), (["-vv"], [], "DEBUG")],
)
def test_verbose_may_stand_behind_the_command(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, before: list[str], behind: list[str], level: str
) -> None:
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    result = CliRunner().invoke(cli, [*before, "inspect", f"oci:{layout.path}:image", *behind], catch_exceptions=False)
    assert result.exit_code == 0 and logging.getLevelName(logging.root.level) == level


def test_sigterm_leaves_nothing_behind(layout: Layout, tmp_path: Path) -> None:
    fifo_root = tmp_path / "root"
    fifo_root.mkdir()
    for number in range(40):
        (fifo_root / f"f{number}").write_bytes(os.urandom(4 << 20))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [*PROGRAM, "convert", f"rootfs:{fifo_root}", f"oci:{tmp_path}/out:t", "--level", "19"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob(".convert-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Traceback" not in stderr
    assert not list((tmp_path / "out").glob(".convert-*"))


_LOSES_IT = """
import contextlib, pathlib, sys, threading, time
import click
from loader.cli import common
common._CLEANING_UP = 0.2

@click.command()
def command():
    try:
        if "thread" in sys.argv:
            threading.Thread(target=threading.Event().wait).start()
        print("begun", flush=True)
        with contextlib.suppress(SystemExit):  # as Python does within some callbacks
            time.sleep(60)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

common.run(command, "command", [])
"""


@pytest.mark.parametrize("words", [[], ["thread"]], ids=["lost", "a thread hangs"])
def test_sigterm_ends_also_who_loses_it(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _LOSES_IT, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "cleaned up\n")


def test_completion_knows_the_commands() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "_EROFS_BUILDER_COMPLETE": "bash_source"}
    result = subprocess.run(PROGRAM, capture_output=True, text=True, env=environment, timeout=60)
    assert "erofs-builder" in result.stdout and "complete" in result.stdout
