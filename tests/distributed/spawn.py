"""Run a function in several processes that have met, and hand back what each returns.

    from distributed.spawn import run_distributed

    def work(text: str) -> str: ...  # torch.distributed is up: dist.get_rank(), dist.get_world_size()

    results = run_distributed(work, 2, "hello")

The processes are forked from a server which has imported what they need (:mod:`distributed.preloaded`) and done nothing
else, because that takes seconds. The server starts with the first call and ends with the test session.
"""

import datetime
import faulthandler
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120.0
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ChildError(AssertionError):
    """A process failed; the message holds its traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS, backend: str = "gloo"
) -> list[Any]:
    """Call ``fn(*args)`` in each of ``world_size`` processes; returns what each rank returned.

    The processes run one thread each and are in a group of all of them. As soon as one fails, or when ``timeout``
    seconds have passed, all are ended.

    Args:
        fn: a function at the top level of its file.
        world_size: how many processes.
        args: anything that pickles; so must the results.
        timeout: seconds for all that the processes do.
        backend: of their group; with nccl process i uses GPU i, or shares it (:mod:`gpu.processes`).

    Raises:
        ChildError: with the traceback of each process that raised, or what those that hang or died had printed.
    """
    context = _start_server()
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as name:
        folder = Path(name)
        torch.save((fn, args), folder / "call.pt")
        code = (fn.__module__, fn.__code__.co_filename)
        processes = [
            context.Process(target=_child, args=(name, rank, world_size, timeout, backend, environment, *code))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise ChildError(_failure(folder, codes, timeout))
        return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _start_server() -> multiprocessing.context.BaseContext:
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed.preloaded"])
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), before.get("PYTHONPATH", "")])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _wait(processes: list[BaseProcess], deadline: float) -> None:
    """Return when all have ended, shortly after the first failure, or at the deadline."""
    failed = False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + 1.0)  # let the others report too
        time.sleep(0.02)


def _failure(folder: Path, codes: list[int | None], timeout: float) -> str:
    """The tracebacks of those that raised, the first to raise first; if none did, the end of everybody's output."""
    raised = sorted(folder.glob("traceback-*"), key=lambda file: file.stat().st_mtime_ns)
    if raised:
        return "\n".join(f"\n--- process {file.name.split('-')[1]} ---\n{file.read_text()}" for file in raised)
    parts = [f"none raised within {timeout:g} s: it hangs, or a signal ended a process; exit codes {codes}"]
    for rank in range(len(codes)):
        output = folder / f"output-{rank}"
        text = output.read_text(errors="replace")[-4000:] if output.exists() else "(did not start)"
        parts.append(f"\n--- process {rank} ---\n{text}")
    return "\n".join(parts)


def _child(
    name: str,
    rank: int,
    world_size: int,
    timeout: float,
    backend: str,
    environment: dict[str, str],
    module_name: str,
    file: str,
) -> None:
    folder = Path(name)
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(max(timeout - 3, timeout / 2), file=output)  # where it hangs, if it does
    try:
        os.environ.clear()
        os.environ.update(environment | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        if module_name not in sys.modules and Path(file).exists():  # a test file is not importable by name
            spec = importlib.util.spec_from_file_location(module_name, file)
            sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
        fn, args = torch.load(folder / "call.pt", weights_only=False)
        store = dist.FileStore(str(folder / "store"), world_size)
        limit = datetime.timedelta(seconds=timeout + 10)  # a hang is for the parent to end
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
            os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        torch.save(fn(*args), folder / f"result-{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still needs it
            dist.destroy_process_group()
    except BaseException:
        (folder / f"traceback-{rank}").write_text(traceback.format_exc())
        raise
