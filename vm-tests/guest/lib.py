"""What a scenario has in the guest: its task, steps that are timed and reported, questions to the host, processes."""

import contextlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path

DISK = Path("/run/disk")


class Failure(Exception):
    """An expectation of a scenario did not hold."""


class Guest:
    """The scenario's side of the port."""

    def __init__(self, task, port):
        self.task = task
        self._port = port
        self._lock = threading.Lock()
        self._steps = []
        self._facts = {}

    @contextlib.contextmanager
    def step(self, name):
        """A named, timed part of the scenario; it fails with the scenario."""
        started = time.monotonic()
        record = {"name": name, "ok": False}
        self._steps.append(record)
        try:
            yield record
            record["ok"] = True
        finally:
            record["seconds"] = round(time.monotonic() - started, 2)
            self._send({"say": f"{'ok  ' if record['ok'] else 'FAIL'} {name} ({record['seconds']} s)"})

    def fact(self, name, value):
        """Something measured, kept with the result."""
        self._facts[name] = value
        self._send({"say": f"     {name}: {value}"})

    def ask(self, name, *arguments):
        """Have the host do something (one of the scenario's handlers) and give back what it says."""
        with self._lock:
            self._write({"ask": name, "arguments": arguments})
            line = b""
            while not line.endswith(b"\n"):
                line += os.read(self._port.fileno(), 65536)
        reply = json.loads(line)
        if "error" in reply:
            raise Failure(f"the host's {name}: {reply['error']}")
        return reply["value"]

    def cut_power(self):
        """End this boot as a power failure does: the host kills the machine; what was not synced is lost."""
        self._send({"cut": self._outcome(ok=True)})
        while True:
            time.sleep(60)

    def end(self, **outcome):
        """The last line of a boot."""
        self._send({"end": self._outcome(**outcome)})

    def _outcome(self, **outcome):
        return {**outcome, "steps": self._steps, "facts": self._facts, "kernel": os.uname().release}

    def _send(self, message):
        with self._lock:
            self._write(message)

    def _write(self, message):
        data = json.dumps({"nonce": self.task["nonce"], **message}).encode() + b"\n"
        while data:
            data = data[os.write(self._port.fileno(), data) :]


def expect(condition, message):
    """Fail the scenario with `message` unless the condition holds."""
    if not condition:
        raise Failure(message)


def run(*command, ok=True, env=None, limit=120):
    """Run a program and give back the finished process; with `ok` a failure is the scenario's."""
    environment = {**os.environ, **(env or {})}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=limit)
    if ok and done.returncode:
        raise Failure(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def network():
    """The one link to QEMU's user network."""
    run("ip", "link", "set", "lo", "up")
    if Path("/sys/class/net/eth0").exists():
        run("ip", "addr", "add", "10.0.2.15/24", "dev", "eth0")
        run("ip", "link", "set", "eth0", "up")
        run("ip", "route", "add", "default", "via", "10.0.2.2")


def wait_for(condition, limit, what, pause=0.05):
    """Poll until the condition holds; the limit only ends a hang."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"gave up after {limit} s: {what}")
        time.sleep(pause)
