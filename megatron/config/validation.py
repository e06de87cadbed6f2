"""Everything that can be wrong with a run's configuration, found before the first step.

Values by themselves are checked by their options (type, choices, range), values that must fit each other, the number of
processes and files by the rules of the sections. All problems are reported at once. Each says what was got, what is
required, with the numbers, and the nearest valid choice.
"""

from collections.abc import Iterator

from megatron.config.errors import ConfigError
from megatron.config.option import RULES
from megatron.config.run import OPTIONS, RunConfig, flatten


def validate(config: RunConfig, world_size: int) -> None:
    """Check a configuration for a run of ``world_size`` processes.

    Raises:
        ConfigError: at least one problem; all of them are listed, one line each.
    """
    _raise(_problems(config, world_size, files=True))


def validate_numbers(config: RunConfig, world_size: int) -> None:
    """Like :func:`validate`, without looking at files."""
    _raise(_problems(config, world_size, files=False))


def _problems(config: RunConfig, world_size: int, files: bool) -> Iterator[str]:
    if world_size < 1:
        yield f"got {world_size} processes; a run needs at least 1"
        return
    wrong = set()
    for name, value in flatten(config).items():
        for problem in OPTIONS[name].problems(value):
            wrong.add(name)
            yield problem
    for rule in RULES:
        if not rule.options & wrong and (files or not rule.files):
            yield from rule.check(config, world_size)


def _raise(problems: Iterator[str]) -> None:
    if found := tuple(dict.fromkeys(problems)):
        raise ConfigError(*found)
