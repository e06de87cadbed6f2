"""torchrun with trainers, started as a user starts it: its output, its processes, its end."""

import os
import signal
import subprocess
from pathlib import Path

import tiny_run


def start(processes: int, arguments: list[str]) -> subprocess.Popen:
    """``torchrun`` with ``processes`` ranks of the trainer; output and errors are one text."""
    return subprocess.Popen(
        tiny_run.command(processes, arguments),
        env=tiny_run.environment(),
        cwd=tiny_run.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(text: str, process: subprocess.Popen) -> str:
    """Read the output up to a line that contains ``text``."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came; the output was:\n{seen}")


def output_until_the_end(process: subprocess.Popen, seconds: float) -> str:
    """What it still prints. If it does not end in time all its processes are killed, and the error tells how they were.

    Raises:
        AssertionError: it has not ended.
    """
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        pids = [process.pid, *descendants(process.pid)]
        states = "\n".join(map(state, pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        raise AssertionError(f"not ended after {seconds} s\n{states}\nthe output was:\n{output}") from None


def children(pid: int) -> list[int]:
    """The child processes, such as the trainers under a torchrun, in the order in which they were started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def descendants(pid: int) -> list[int]:
    """The child processes, theirs, and so on."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def state(pid: int) -> str:
    """What a process and its threads are doing, as far as the kernel tells."""

    def read(folder: Path, name: str) -> str:
        try:
            return (folder / name).read_text(errors="replace").replace("\0", " ").strip()
        except OSError as error:
            return f"({error.strerror})"

    process = Path(f"/proc/{pid}")
    lines = [f"process {pid}: {read(process, 'cmdline')[:100]}"]
    told = ("State:", "SigPnd:", "ShdPnd:")
    lines += [line for line in read(process, "status").splitlines() if line.startswith(told)]
    for thread in sorted(process.glob("task/*")):
        stack = " ".join(line.split()[-1] for line in read(thread, "stack").splitlines())
        lines.append(f"  thread {thread.name} {read(thread, 'comm')}: {read(thread, 'wchan')} | {stack}")
    return "\n".join(lines)
