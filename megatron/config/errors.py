"""The error of a wrong configuration, and suggestions for misspelt names."""

import difflib
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
