import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import ROOT

from megatron.training.signals import StopRequest, StopSignals, process_age


def test_the_age_of_a_process_counts_from_its_start():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        time.sleep(0.3)
        os.write(writer, str(process_age()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert float(os.read(reader, 100)) == pytest.approx(0.3, abs=0.25)
    assert process_age() > 0.3


def process(body: str) -> subprocess.Popen:
    """A Python process inside the block of ``signals``, which has printed a line."""
    script = "import sys, time\nfrom megatron.training.signals import StopSignals\n"
    script += "with StopSignals() as signals:\n" + "".join(f"    {line}\n" for line in body.splitlines())
    started = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdout.readline() == "ready\n"
    return started


WAIT = "print('ready', flush=True)\nwhile not signals.received: time.sleep(0.01)\n"


def test_usr1_is_remembered_from_the_start():
    with process(WAIT + "print(signals.received, signals.interrupted_rendezvous)") as started:
        started.send_signal(signal.SIGUSR1)
        assert started.communicate(timeout=20)[0] == f"{signal.SIGUSR1.value} False\n"
    assert started.returncode == 0


def test_term_ends_a_process_that_waits_in_foreign_code_for_others():
    body = "import ctypes, os\nreader, writer = os.pipe()\nprint('ready', flush=True)\n"
    with process(body + "ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)") as started:
        started.send_signal(signal.SIGTERM)
        errors = started.communicate(timeout=5)[1]
    assert started.returncode == 0
    assert "SIGTERM before training began: nothing is lost" in errors


def test_once_all_have_met_term_is_remembered_too():
    with process("signals.rendezvous_done()\n" + WAIT + "time.sleep(1.5)\nprint(signals.received)") as started:
        started.send_signal(signal.SIGTERM)
        assert started.communicate(timeout=20)[0] == f"{signal.SIGTERM.value}\n"
    assert started.returncode == 0


def test_the_end_of_a_process_is_not_disturbed():
    """Handlers are gone before the interpreter is; what it does then can take long."""
    ending = "import atexit\nclass Slow:\n    def __del__(self, sleep=time.sleep): sleep(1)\nsys.slow = Slow()\n"
    with process(ending + "print('ready', flush=True)") as started:
        end = time.monotonic() + 20
        while started.poll() is None and time.monotonic() < end:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                started.send_signal(number)
            time.sleep(0.005)
    assert started.returncode == 0


def test_a_forked_child_keeps_its_signals_to_itself():
    body = "import os, signal\nsignals.rendezvous_done()\n"
    body += "if os.fork() == 0:\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
    body += "    os._exit(0)\nos.wait()\ntime.sleep(0.2)\n"
    body += "print('ready', flush=True)\nprint(signals.received, file=sys.stderr)"
    with process(body) as started:
        assert started.communicate(timeout=20)[1] == "0\n"


class Alone:
    @staticmethod
    def agree_max(value: int) -> int:
        return value


def test_the_reason_is_the_signal_or_the_time():
    signals = StopSignals()
    assert StopRequest(signals, Alone()).agreed() is None
    assert StopRequest(signals, Alone(), minutes=1e6).agreed() is None
    assert StopRequest(signals, Alone(), minutes=process_age() / 60 / 2).agreed() == "the time limit"
    signals.received = signal.SIGUSR1
    assert StopRequest(signals, Alone(), minutes=0).agreed() == "SIGUSR1"
