"""When a run stands still: where each rank is, and who keeps the others waiting."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_NAMED = 8  # ranks that a message names


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a rank has come.

    ``number`` rises with the run (an update, say). ``begun`` holds, for each process group of the rank, how many of its
    collectives the rank has begun; equal keys on several ranks mean the same group. ``at`` is the line that it is at.
    """

    number: int
    begun: Mapping[str, int]
    at: str

    @classmethod
    def from_json(cls, value: Any) -> "Place | None":
        """Inverse of :func:`dataclasses.asdict`; None for what is no place."""
        try:
            return cls(
                int(value["number"]), {str(key): int(count) for key, count in value["begun"].items()}, value["at"]
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def behind(places: Mapping[int, Place]) -> list[int]:
    """The ranks that the others wait for; none where that does not show.

    Those with the least ``number`` if it differs. Else, a rank that has begun fewer collectives of a group than another
    member keeps that one waiting; those are meant who keep somebody waiting and wait for nobody themselves.
    """
    if not places:
        return []
    least = min(place.number for place in places.values())
    if any(place.number != least for place in places.values()):
        return sorted(rank for rank, place in places.items() if place.number == least)
    most: dict[str, int] = {}
    fewest: dict[str, int] = {}
    for place in places.values():
        for key, count in place.begun.items():
            most[key] = max(most.get(key, count), count)
            fewest[key] = min(fewest.get(key, count), count)
    late = {rank for rank, place in places.items() if any(n < most[key] for key, n in place.begun.items())}
    waiting = {rank for rank, place in places.items() if any(n > fewest[key] for key, n in place.begun.items())}
    return sorted(late - waiting)


def verdict(places: Mapping[int, Place | None], names: Mapping[int, str]) -> str:
    """Who is behind, in words.

    Args:
        places: of every rank of the run; None for those that did not answer.
        names: of the ranks, such as ``rank 3 (host gpu7, process 4711)``.
    """
    known = {rank: place for rank, place in places.items() if place is not None}
    silent = sorted(places.keys() - known.keys())
    if silent:
        return f"no answer from {_list(silent, names)}: stopped, or stuck outside Python"
    found = behind(known)
    if not found:
        return "no rank is known to be behind"
    at = known[found[0]].at
    return f"{_list(found, names)} {'is' if len(found) == 1 else 'are'} behind, at {at}"


def _list(ranks: Sequence[int], names: Mapping[int, str]) -> str:
    words = ", ".join(names.get(rank, f"rank {rank}") for rank in ranks[:_NAMED])
    return words + (f" and {len(ranks) - _NAMED} others" if len(ranks) > _NAMED else "")
