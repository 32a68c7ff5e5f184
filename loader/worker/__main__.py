"""The worker's process: `python -m loader.worker`, started by the keeper (loader/keeper/protocol.py says how)."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from loader.cache.layout import Layout
from loader.config import SETTINGS_VARIABLE, Config, load_config
from loader.keeper.protocol import CONTROL_FD_ENV, KEEPER_FD_ENV, Kind
from loader.worker.api import Api
from loader.worker.complaints import open_kernel_log
from loader.worker.confinement import confine
from loader.worker.control import ControlServer
from loader.worker.link import Link, Packet
from loader.worker.service import Service
from loader.worker.settings import current_settings

log = logging.getLogger("loader.worker")

SWITCH_INTERVAL = 0.0002  # seconds that a thread which computes may keep one waiting whose data has come
PATIENCE = 3.0  # seconds in which a worker that leaves still answers what it has
ANSWER_PATIENCE = 0.5  # the same for the control socket: `stop` itself is asked there


def main() -> int:
    """Wait for the first packet, then serve until the keeper hangs up or SIGTERM asks us to leave."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    settings = os.environ.get(SETTINGS_VARIABLE)
    config = Config.decode(settings) if settings else load_config()
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its messages quote URLs with secrets; ours say the rest
    connection = socket.socket(fileno=int(os.environ[KEEPER_FD_ENV]))
    listener = socket.socket(fileno=int(os.environ[CONTROL_FD_ENV]))
    writable = Layout(config.root).writable()
    for directory in writable:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    kernel_log = open_kernel_log()
    confinement = confine(writable)
    leaving = threading.Event()
    _handle_signals(connection, leaving)
    link = Link(connection)
    packets = link.packets()
    first = next(packets, None)
    if first is None:
        return 0
    config, registries = current_settings(config)
    logging.getLogger().setLevel(config.log_level.upper())
    service = Service(config, registries, link, _plane(first, config), confinement)
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=service.log_waiting, name="waiting").start())
    if kernel_log is not None:
        service.follow(kernel_log)
    server = ControlServer(listener, Api(service))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="control", daemon=True).start()
    service.serve(itertools.chain([first], packets))
    if leaving.is_set():
        server.finish(ANSWER_PATIENCE)
        _drain(service)
    service.stop()
    return 0


def _plane(first: Packet, config: Config) -> str:
    """The plane that the keeper serves: every first packet says so, or is of one that has it."""
    kind, body, _ = first
    if isinstance(body, dict) and "plane" in body:
        return str(body["plane"])
    return "cachefiles" if kind in (Kind.OPEN, Kind.CLOSED) else config.plane


def _handle_signals(connection: socket.socket, leaving: threading.Event) -> None:
    def leave(_number: int, _frame: object) -> None:
        leaving.set()
        connection.shutdown(socket.SHUT_RD)  # ends the loop over packets; answers still go out

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor, which tells us
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # a lease that ends (mounting.py) would kill us otherwise
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a service with something in flight
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def _drain(service: Service) -> None:
    until = time.monotonic() + PATIENCE
    while service.flights.waiting() and time.monotonic() < until:
        time.sleep(0.05)


def run() -> NoReturn:
    """Be a worker's process, to its end."""
    status = main()
    # Threads may still be in a request; what they fetch is not recorded, so nothing is lost by not waiting for them.
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    run()
