"""Helper processes must not outlive the process they work for."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """Make this process, started by multiprocessing, end when its parent is gone, be that by SIGKILL.

    Python sees to that only where a parent ends in good order. A fork server's children otherwise wait for ever: they
    keep the server alive, and the server is all they watch.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
