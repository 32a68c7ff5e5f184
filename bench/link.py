"""A slow link in a process: a TCP proxy with a given rate and round-trip time that counts what goes through.

    python -m bench.link --target 127.0.0.1:5000 --rate 3e6 --rtt 0.02

Model: each direction is one queue of the given rate shared by all connections, then half the round-trip time; a new
connection's first bytes wait for one round trip more, as a TCP handshake would. Slow start and loss are not modelled.
Counted are the bytes of the TCP streams: bodies, HTTP headers and TLS, not the headers of TCP and IP.

The process speaks lines of JSON: first `{"port": N}`; for each line `stats` on its standard input the counters, for
`reset` the counters before they are set to zero, for `rate R` the counters when it changed; at end of file it ends.
`Link` wraps all that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

# How far a queue may run ahead of the clock, in seconds: timers are no finer than that.
_SLACK = 0.002
_SMALLEST, _LARGEST = 4096, 262_144


class Counters(NamedTuple):
    """Bytes from the target, bytes to it, and connections, since the start or the last reset."""

    down: int
    up: int
    connections: int


class _Queue:
    """One direction of the link: bytes leave it one after the other at the given rate."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0  # when the last byte accepted so far has left
        self.count = 0

    async def pass_through(self, size: int) -> float:
        """Account for `size` bytes; returns when they have left, once that is now."""
        loop = asyncio.get_running_loop()
        self.count += size
        # A late wake-up is made good: the link did not idle, its clock was coarse.
        self.free = max(self.free, loop.time() - _SLACK) + size / self.rate
        left = self.free
        if left - loop.time() > _SLACK:
            await asyncio.sleep(left - loop.time())
        return left


class _Proxy:
    def __init__(self, host: str, port: int, rate: float, rtt: float) -> None:
        self.host, self.port, self.rtt = host, port, rtt
        self.down, self.up = _Queue(rate), _Queue(rate)
        self.connections = 0
        # Small pieces make the connections share fairly; large ones keep a fast link cheap.
        self.piece = min(max(int(rate * _SLACK), _SMALLEST), _LARGEST)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            target_reader, target_writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.close()
            return
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(
                self._carry(reader, target_writer, self.up, self.rtt),
                self._carry(target_reader, writer, self.down, 0),
            )
        for each in (writer, target_writer):
            each.close()

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, queue: _Queue, setup: float
    ) -> None:
        """Carry one direction of one connection; `setup` is the time a new connection takes."""
        # What is on its way: bounded by the time a byte is under way.
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        landing = asyncio.ensure_future(self._land(flying, sink))
        start = asyncio.get_running_loop().time() + setup
        try:
            while data := await source.read(self.piece):
                left = await queue.pass_through(len(data))
                flying.put_nowait((max(left, start) + self.rtt / 2, data))
                if landing.done():
                    break
        finally:
            flying.put_nowait((0, b""))
            await landing

    async def _land(self, flying: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                arrival, data = await flying.get()
                if not data:
                    break
                if arrival > loop.time():
                    await asyncio.sleep(arrival - loop.time())
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()

    def counters(self) -> Counters:
        return Counters(self.down.count, self.up.count, self.connections)

    def reset(self) -> None:
        self.down.count = self.up.count = self.connections = 0


async def _run(proxy: _Proxy, listen: tuple[str, int]) -> None:
    server = await asyncio.start_server(proxy.serve, *listen, limit=2 * _LARGEST)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        print(json.dumps(proxy.counters()._asdict()), flush=True)
        if line.strip() == b"reset":
            proxy.reset()
        elif line.startswith(b"rate "):
            proxy.down.rate = proxy.up.rate = float(line.split()[1])


class Link:
    """A link to `target` ("host:port") as a process of its own, at `address` while the context is open.

    `rate` is in bytes a second, `rtt` in seconds.
    """

    def __init__(self, target: str, rate: float, rtt: float) -> None:
        command = [sys.executable, "-m", "bench.link", "--target", target, "--rate", str(rate), "--rtt", str(rtt)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        self.address = f"127.0.0.1:{self._receive()['port']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def _ask(self, command: str) -> Counters:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return Counters(**self._receive())

    def counters(self) -> Counters:
        """What went through since the start or the last reset."""
        return self._ask("stats")

    def reset(self) -> Counters:
        """Set the counters to zero; returns what they were."""
        return self._ask("reset")

    def set_rate(self, rate: float) -> Counters:
        """Be that fast from now on, in bytes a second; returns the counters."""
        return self._ask(f"rate {rate}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="a TCP proxy that is a slow link")
    parser.add_argument("--target", required=True, help="host:port")
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port; port 0 for a free one")
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second in each direction")
    parser.add_argument("--rtt", type=float, default=0.02, help="round-trip time in seconds")
    options = parser.parse_args()
    (host, _, port), (own, _, own_port) = options.target.rpartition(":"), options.listen.rpartition(":")
    asyncio.run(_run(_Proxy(host, int(port), options.rate, options.rtt), (own, int(own_port))))


if __name__ == "__main__":
    main()
