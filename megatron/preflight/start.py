"""Errors that keep ranks from starting, gathered before there are process groups, so that no rank waits for them."""

import json
import socket

import torch.distributed as dist

from megatron.parallel.launch import Launch

_KEY = "preflight"


def gather_problems(launch: Launch, store: dist.Store, problem: str | None) -> list[str]:
    """Every rank's problem, in words that name it; equal on all ranks, which must all call this.

    Args:
        launch: this process among all.
        store: reaches all ranks.
        problem: of this rank; None if it can start.
    """
    mine = {"host": socket.gethostname(), "problem": problem}
    store.set(f"{_KEY}/{launch.rank}", json.dumps(mine))
    if launch.rank == 0:
        found = [json.loads(store.get(f"{_KEY}/{rank}")) for rank in range(launch.world_size)]
        store.set(f"{_KEY}/all", json.dumps(_merge_equal(found)))
    return json.loads(store.get(f"{_KEY}/all"))


def _merge_equal(found: list[dict[str, str | None]]) -> list[str]:
    """Equal problems once, with the ranks that have them."""
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(found):
        if each["problem"] is not None:
            ranks.setdefault(each["problem"], []).append(rank)
    lines = []
    for problem, where in ranks.items():
        hosts = ", ".join(dict.fromkeys(str(found[rank]["host"]) for rank in where))
        numbers = "all ranks" if len(where) == len(found) else f"rank {', '.join(map(str, where))} ({hosts})"
        lines.append(f"{numbers}: {problem}")
    return lines
