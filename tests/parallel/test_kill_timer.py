"""A process that holds the GIL for too long is killed and its stacks are printed; other processes are left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEEP_THE_GIL = """
import ctypes
c, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
while True: c.pthread_mutex_lock(lock)  # no signal ends the second call
"""
TIMER = "from megatron.parallel.kill_timer import KillTimer; timer = KillTimer('rank 3')"
WATCHDOG = """
from types import SimpleNamespace as Any
from megatron.parallel import watchdog
watchdog.KILL_MARGIN_SECONDS = 0.5
dog = watchdog.Watchdog(None, 0.2, None, Any(launch=Any(rank=3)), None, always=True)
dog.begin(1, "update 1")
"""


def start(*lines: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def end(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed to stdout and stderr. Returns only when no process holds these any more."""
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize("lines", [(TIMER, "timer.set(0.5)"), (WATCHDOG,)], ids=["timer", "watchdog"])
def test_a_process_that_holds_the_gil_is_killed_with_its_stacks(lines):
    process = start(*lines, KEEP_THE_GIL)
    _, said = end(process)
    assert process.returncode == -signal.SIGKILL, said
    before, stacks = said.split("error on rank 3: stuck in foreign code that keeps Python from running; its threads:\n")
    assert before == ""
    assert 'File "<string>", line' in stacks, said


@pytest.mark.parametrize(
    "lines",
    [
        ("timer.set(0.3)", "timer.set(None)", "time.sleep(1)"),
        ("for _ in range(8): timer.set(1.5); time.sleep(0.3)",),
        ("timer.set(0.3)", "timer.close()", "time.sleep(1)"),
        # a forked process holds the timer's pipe for longer than the process lives
        ("timer.set(100)", "pid = os.fork()", "if pid == 0: os.close(1); os.close(2); time.sleep(2); os._exit(0)"),
        ("pid = os.fork()", "if pid == 0: time.sleep(1); os._exit(0)", "timer.close()"),
    ],
    ids=["for ever", "again", "closed", "forked", "closed, forked"],
)
def test_other_processes_exit_normally_and_the_timer_with_them(lines):
    process = start("import os, time", TIMER, *lines, "print('well', flush=True)")
    assert end(process) == ("well\n", "")
    assert process.returncode == 0


def test_suspended_time_does_not_count():
    process = start("import time", TIMER, "timer.set(2)", "print('now', flush=True)", "time.sleep(0.3)",
                    "timer.set(None)", "print('well')")  # fmt: skip
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert end(process) == ("well\n", "")


def test_signals_to_all_processes_of_a_job_do_not_stop_the_timer():
    lines = ("import os, signal, time", TIMER, "time.sleep(1)", "timer.set(0.5)")
    signals = "for s in (15, 2, 1, 10): signal.signal(s, signal.SIG_IGN); os.kill(timer._process.pid, s)"
    process = start(*lines, signals, KEEP_THE_GIL)
    end(process)
    assert process.returncode == -signal.SIGKILL
