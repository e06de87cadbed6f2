"""Run by test_crash.py: saves that are killed, each in a folder of its own.

Usage: crashing.py steps FOLDER      kills a save before every change it makes to the file system, one after the other
       crashing.py times FOLDER N    kills N loops of saves with SIGKILL at random moments
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron.checkpoint import Box, ShardedTensor, save

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def save_value(folder: Path, step: int, value: float, numel: int = 1000) -> None:
    """A checkpoint whose tensors, in several boxes, are full of ``value``, as its meta says."""
    third = numel // 3
    pieces = [torch.full((third,), value), torch.full((numel - third,), value)]
    boxes = [Box((0,), pieces[0]), Box((third,), pieces[1])]
    save(folder, step, [ShardedTensor("w", (numel,), torch.float32, boxes)], {"value": value}, keep_last=2)


def die_before_change(number: int) -> None:
    """Kill this process when it is about to change the file system for the ``number``-th time from now."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fork(work: Callable[[], None]) -> int:
    """Do ``work`` in a child process, which has torch already."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def kill_between_all_steps(folder: Path) -> None:
    for scenario, step in (("new", 3), ("again", 2), ("first", 1)):
        for number in range(1, 200):
            own = folder / f"{scenario}-{number:03d}"
            if scenario != "first":
                save_value(own, 1, 1.0)
                save_value(own, 2, 2.0)

            def killed(own: Path = own, step: int = step, number: int = number) -> None:
                die_before_change(number)
                save_value(own, step, 3.0)

            _, status = os.waitpid(fork(killed), 0)
            if not os.WIFSIGNALED(status):
                assert status == 0
                break


def kill_at_random(folder: Path, times: int) -> None:
    generator = random.Random(0)
    for number in range(times):
        own = folder / f"random-{number:03d}"
        start = time.perf_counter()
        save_value(own, 1, 1.0, 300_000)
        one_save = time.perf_counter() - start

        def loop(own: Path = own) -> None:
            for count in range(2, 1000):
                save_value(own, 1 + count % 4, float(count), 300_000)

        child = fork(loop)
        time.sleep(generator.uniform(0, 6 * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        kill_between_all_steps(Path(sys.argv[2]))
    else:
        kill_at_random(Path(sys.argv[2]), int(sys.argv[3]))
