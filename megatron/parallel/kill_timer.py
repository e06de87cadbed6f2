"""Kills a process that hangs in foreign code while it holds the GIL, so that none of its own threads can end it.

    timer = KillTimer("rank 3")
    timer.set(300.0)  # seconds from now; replaces an earlier time
    timer.set(None)   # no limit
    timer.close()

The timer is a process of its own. When the time is up, it makes the watched process write the stacks of its threads to
its standard error (SIGUSR2, which :mod:`faulthandler` handles without the GIL), then kills it. It counts the time
itself, so that time during which one or both of the processes are suspended does not count.
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TICK_SECONDS = 0.2
DUMP_SECONDS = 2.0  # for writing the stacks
DUMP_SIGNAL = signal.SIGUSR2


class KillTimer:
    """Starts the timer process for this process. ``name`` is what the last message calls this process."""

    def __init__(self, name: str) -> None:
        faulthandler.register(DUMP_SIGNAL, file=sys.__stderr__ or 2, all_threads=True)
        command = [sys.executable, "-I", "-S", __file__, name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)

    def set(self, seconds: float | None) -> None:
        """Kill this process after ``seconds`` unless set again before; None: never."""
        with contextlib.suppress(OSError):  # the timer process was killed, or something keeps it from reading
            os.write(self._stdin.fileno(), b"%f\n" % (math.inf if seconds is None else seconds))

    def close(self) -> None:
        """End the timer process."""
        self._process.kill()  # closing the pipe would not end it while forked processes hold the pipe
        self._process.communicate()
        faulthandler.unregister(DUMP_SIGNAL)


def run_timer(name: str) -> None:
    """The main function of the timer process. Reads times from standard input, which ends with the watched process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they may be sent to all processes of a job
    watched, left = os.getppid(), math.inf
    while left > 0:
        if select.select([0], [], [], TICK_SECONDS)[0]:
            words = os.read(0, 65536).split()
            if not words:
                return
            left = float(words[-1])
        elif os.getppid() != watched:  # it is gone, and a process that it forked holds the pipe
            return
        elif not _suspended(watched):
            left -= TICK_SECONDS
    print(f"error on {name}: stuck in foreign code that keeps Python from running; its threads:", file=sys.stderr)
    sys.stderr.flush()
    for number, seconds in ((DUMP_SIGNAL, DUMP_SECONDS), (signal.SIGKILL, 0)):
        if os.getppid() == watched:
            os.kill(watched, number)
            time.sleep(seconds)


def _suspended(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger (``state`` in proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    except OSError:
        return False


if __name__ == "__main__":
    run_timer(sys.argv[1])
