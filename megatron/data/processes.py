"""Worker processes: batches to them and results back in order, and none that outlives the process it works for."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from megatron.data.errors import DataError

_QUEUED_PER_WORKER = 4
_WORKERS_PER_CORE = 8  # each takes 100 MB and more

Item = TypeVar("Item")
Result = TypeVar("Result")
_process_function: Callable[[Any], Any] | None = None  # of a worker process, made once by _start_worker


@contextlib.contextmanager
def in_order(
    make: Callable[..., Callable[[Item], Result]], arguments: tuple, workers: int
) -> Iterator[Callable[[Iterator[Item]], Iterator[tuple[Item, Result]]]]:
    """Apply a function to many items in processes, and get the results in the order of the items.

    Args:
        make: makes the function from ``arguments``, once in each process; must be importable by name.
        arguments: that can be pickled.
        workers: processes; 0 works in this one.

    Yields:
        What turns items into pairs of item and result; no more than a few items a worker are under way at a time.

    Raises:
        DataError: the number is negative or far beyond the machine's cores, or a worker died.
    """
    if workers < 0:
        raise DataError(f"--workers {workers}: expected 0 (work in this process) or more")
    if workers > (most := _WORKERS_PER_CORE * (os.cpu_count() or 1)):
        raise DataError(
            f"--workers {workers}: expected {most} at most, {_WORKERS_PER_CORE} for each core of this machine"
        )
    if workers == 0:
        function = make(*arguments)
        yield lambda items: ((item, function(item)) for item in items)
        return
    # Fresh processes: forking one in which libraries have started threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make, arguments))
    try:
        yield lambda items: _ordered(pool, items, workers * _QUEUED_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError(
            "a working process died; most often the system ended it for lack of memory. Try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Make this process, started by multiprocessing, end when its parent is gone, be that by SIGKILL.

    Python sees to that only where a parent ends in good order. A fork server's children otherwise wait for ever: they
    keep the server alive, and the server is all they watch.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _ordered(pool: ProcessPoolExecutor, items: Iterator[Item], most: int) -> Iterator[tuple[Item, Any]]:
    waiting: collections.deque[tuple[Item, Future]] = collections.deque()
    for item in items:
        waiting.append((item, pool.submit(_call, item)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _start_worker(make: Callable[..., Callable], arguments: tuple) -> None:
    global _process_function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    end_with_parent()
    _process_function = make(*arguments)


def _call(item: Any) -> Any:
    assert _process_function is not None  # set by _start_worker
    return _process_function(item)


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
