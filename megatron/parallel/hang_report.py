"""Finds the stragglers when a run hangs: the state of each rank, and which ranks keep the others waiting."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_NAMED = 8  # ranks that a message names


@dataclasses.dataclass(frozen=True)
class RankState:
    """How far a rank has come.

    Attributes:
        step: the unit of work that it is in, such as an update; grows during the run.
        collectives: for each of its process groups, how many collectives it has started. A key names the same group on
            all ranks.
        location: the line of code at which its main thread is.
    """

    step: int
    collectives: Mapping[str, int]
    location: str

    @classmethod
    def from_json(cls, value: Any) -> "RankState | None":
        """Inverse of :func:`dataclasses.asdict`; None for anything else."""
        try:
            collectives = {str(group): int(count) for group, count in value["collectives"].items()}
            return cls(int(value["step"]), collectives, value["location"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def find_stragglers(states: Mapping[int, RankState]) -> list[int]:
    """The ranks that the others wait for; empty if the states do not show it.

    If the steps differ, these are the ranks with the smallest. Otherwise a rank that has started fewer collectives of a
    group than another member keeps that member waiting, and the stragglers are the ranks that keep others waiting and
    wait for nobody themselves.
    """
    if not states:
        return []
    least = min(state.step for state in states.values())
    if any(state.step != least for state in states.values()):
        return sorted(rank for rank, state in states.items() if state.step == least)
    most: dict[str, int] = {}
    fewest: dict[str, int] = {}
    for state in states.values():
        for group, count in state.collectives.items():
            most[group] = max(most.get(group, count), count)
            fewest[group] = min(fewest.get(group, count), count)
    late = {rank for rank, state in states.items() if any(n < most[group] for group, n in state.collectives.items())}
    waiting = {
        rank for rank, state in states.items() if any(n > fewest[group] for group, n in state.collectives.items())
    }
    return sorted(late - waiting)


def describe_hang(states: Mapping[int, RankState | None], names: Mapping[int, str]) -> str:
    """A description of which ranks are behind.

    Args:
        states: of all ranks; None for those that did not answer.
        names: of the ranks, such as ``rank 3 (host gpu7, process 4711)``.
    """
    known = {rank: state for rank, state in states.items() if state is not None}
    silent = sorted(states.keys() - known.keys())
    if silent:
        return f"no answer from {_join(silent, names)}: stopped, or stuck outside Python"
    stragglers = find_stragglers(known)
    if not stragglers:
        return "no rank is known to be behind"
    location = known[stragglers[0]].location
    return f"{_join(stragglers, names)} {'is' if len(stragglers) == 1 else 'are'} behind, at {location}"


def _join(ranks: Sequence[int], names: Mapping[int, str]) -> str:
    listed = ", ".join(names.get(rank, f"rank {rank}") for rank in ranks[:_MAX_NAMED])
    return listed + (f" and {len(ranks) - _MAX_NAMED} others" if len(ranks) > _MAX_NAMED else "")
