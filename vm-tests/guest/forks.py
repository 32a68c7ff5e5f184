"""What the daemon starts, `python -m MODULE`, as a fork of the process that starts it: it has imported all of it.

Under emulation the imports of a keeper and of a nursery take three seconds of processor, at every start. A fork gets
what such a process would: its environment, its descriptors and no others, its signals, its command line. What it does
not show is the start itself: `systemd_unit` and the host's own row do.
"""

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

MODULES = {"loader.keeper": "loader.keeper.__main__", "loader.worker.nursery": "loader.worker.nursery"}
_started = subprocess.Popen


def load():
    """Import what is forked, and what it would import later."""
    for name in (*MODULES.values(), "loader.registry.session"):
        importlib.import_module(name)


def use():
    """From here on this process, and what it forks, starts those modules by forking."""
    subprocess.Popen = _popen


def _popen(command, *arguments, **options):
    if command[0] == sys.executable and command[1] == "-m" and command[2] in MODULES:
        return Forked(command[2], **options)
    return _started(command, *arguments, **options)


class Forked:
    """What supervisor and keeper need of a subprocess.Popen: poll, wait, kill, send_signal."""

    def __init__(self, module, env, pass_fds, stdin, start_new_session=False):
        assert stdin == subprocess.DEVNULL
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become(module, env, pass_fds, start_new_session)
                status = importlib.import_module(MODULES[module]).main()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _become(module, env, pass_fds, new_session):
    """What exec(2) and the start of Python do."""
    gc.freeze()  # what is garbage by now must not close descriptors of the same numbers
    name_process(f"python -m {module}")
    if new_session:
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    below = 3
    for fd in (*sorted(pass_fds), 1 << 16):
        os.closerange(below, fd)
        below = fd + 1
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.setLevel(logging.WARNING if logger is logging.root else logging.NOTSET)


def name_process(line):
    """Write it over the arguments of this process, where /proc/PID/cmdline reads it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    ctypes.memmove(start, line.encode().ljust(end - start, b"\0")[: end - start], end - start)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("python")
