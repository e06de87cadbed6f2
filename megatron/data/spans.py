"""Spans of numbered things: where each begins, and the number after its last."""

import re
from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def parse_span(word: str) -> Span:
    """``96-160`` is (96, 160): 96 to 159.

    Raises:
        ValueError: the word is no span, or an empty one.
    """
    found = re.fullmatch(r"(\d+)-(\d+)", word)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"got {word!r}; expected FIRST-END with FIRST below END, such as 96-160 for 96 to 159")
    return int(found[1]), int(found[2])


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same numbers in as few spans as there can be, in order."""
    merged: list[Span] = []
    for first, end in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((first, end))
    return merged


def nth_outside(spans: Sequence[Span], index: int) -> int:
    """The number, from 0, that is the ``index``-th not in any of the merged ``spans``."""
    for first, end in spans:
        if index < first:
            break
        index += end - first
    return index
