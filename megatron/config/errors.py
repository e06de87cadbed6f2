"""The error of a wrong configuration, and suggestions for misspelt names and numbers that do not fit."""

import difflib
import math
from collections.abc import Iterable


class ConfigError(ValueError):
    """One or more things wrong with a run's configuration; ``problems`` holds one line for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems in the configuration:{lines}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """The member of ``valid`` that is spelt most like ``word``."""
    valid = sorted(valid)
    return (difflib.get_close_matches(word, valid, n=1, cutoff=0.0) or valid)[0]


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def around(value: float, valid: Iterable[int]) -> str:
    """The nearest members of ``valid`` below and above ``value``, in words."""
    valid = sorted(valid)
    below, above = [x for x in valid if x <= value][-1:], [x for x in valid if x >= value][:1]
    return " or ".join(str(x) for x in sorted({*below, *above}))


def remainder(number: int, by: int) -> str:
    """The division of ``number`` by ``by`` as an equation."""
    return f"{number} = {number // by} x {by} + {number % by}"


def multiples(value: int, step: int) -> list[int]:
    """The multiples of ``step`` just below and above ``value``; without 0."""
    below = value // step * step
    return [x for x in (below, below + step) if x > 0]
