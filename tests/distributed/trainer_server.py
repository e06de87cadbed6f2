"""Forks trainer processes on demand; see trainers.py, which starts it and talks to it.

On stdin comes one order a line, JSON: environment, arguments, the file for the output, and maybe a death and faults. On
stdout goes one event a line: ``started PID``, ``joined PID``, ``ended PID STATUS SECONDS`` (monotonic).
"""

import ctypes
import functools
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

# what a trainer imports, at its start or later
PRELOADED = (
    *("megatron.training.pretrain", "deepspeed", "megatron.core.parallel_state", "tokenizers"),
    *("megatron.core.datasets.gpt_dataset", "megatron.core.datasets.blended_megatron_dataset_builder"),
)
# phase -> the module and the attribute there of the function that it is in
PHASES = {
    "joined": ("megatron.training.pretrain", "initialize"),
    "load": ("megatron.training.resume", "load"),
    "step": ("megatron.training.trainer", "Trainer._next"),
    "validate": ("megatron.training.hooks.validation", "evaluate"),
    "write": ("megatron.checkpoint.storage", "write_safetensors"),
    "commit": ("megatron.checkpoint.storage", "commit"),  # on rank 0 only
}


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    events = os.dup(1)
    os.dup2(2, 1)  # so that nothing else gets among the events
    buffer, alive = b"", set()
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if alive else None)
        if ready:
            data = os.read(0, 65536)
            if not data:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    _child(events, **json.loads(line))
                alive.add(pid)
                _tell(events, "started", pid)
        while alive and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            alive.discard(ended[0])
            _tell(events, "ended", ended[0], os.waitstatus_to_exitcode(ended[1]), time.monotonic())


def _tell(events: int, *words: object) -> None:
    os.write(events, (" ".join(map(str, words)) + "\n").encode())


def _child(
    events: int,
    environment: dict[str, str],
    arguments: list[str],
    output: str,
    dies: dict | None,
    faults: list[str],
    hooks: list[str],
) -> None:
    status = 1
    try:
        printed = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ.update(environment)
        _on_entry("joined", 1, lambda: _tell(events, "joined", os.getpid()))
        if dies:
            _on_entry(dies["phase"], dies["call"], lambda: _befall(dies))

        for fault in faults:
            import faults as module

            getattr(module, fault.split()[0])(*fault.split()[1:])
        import user_hooks

        from megatron.config.flags import parse_args
        from megatron.training.pretrain import pretrain
        from megatron.training.signals import StopSignals

        with StopSignals() as signals:
            status = pretrain(parse_args(arguments), signals, [getattr(user_hooks, name)() for name in hooks])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _befall(dies: dict) -> None:
    if dies["hangs"] == "in C":
        c, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        while True:
            c.pthread_mutex_lock(lock)  # no signal ends the second call
    elif dies["hangs"]:
        _hang()
    elif dies["sleeps"]:
        time.sleep(dies["sleeps"])
    else:
        _kill_after(dies["delay"])


def _hang() -> None:
    while True:
        time.sleep(1)


def _kill_after(delay: float) -> None:
    if delay == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _on_entry(phase: str, call: int, action: Callable[[], None]) -> None:
    """Have ``action()`` done when the function of ``phase`` is entered for the ``call``-th time."""
    module, path = PHASES[phase]
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, owner)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, watched)


if __name__ == "__main__":
    _serve()
