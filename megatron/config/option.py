"""One option of a run, and the rules between options.

Every option is one field of a section's dataclass, made by :func:`option`. Its line holds the default, the help, the
range or choices, how text is read, and whether it may change when a run is resumed. The command line, the YAML reader,
``--help``, validation and the check on a resume all read that line. What options require of each other is checked by
functions marked with :func:`rule`, below the section they belong to.
"""

import dataclasses
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, TypeVar

from megatron.config.errors import ConfigError, nearest

if TYPE_CHECKING:
    from megatron.config.run import RunConfig

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    resumable: bool | None = None,
    finetunable: bool = False,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    nargs: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that describes an option.

    Args:
        default: the value without a preset, a YAML file or a flag.
        help: one or two sentences for ``--help``.
        min: the smallest valid number; of a list, for each element, as are the other three bounds.
        max: the largest valid number.
        above: valid numbers are larger than this.
        below: valid numbers are smaller than this.
        choices: the valid values.
        resumable: True, the option may change when a run is resumed. None, it may change, with a warning: the run does
            not go on as it would have. False, the shapes of the checkpoint's tensors follow from it:
            :mod:`megatron.training.resume` refuses other shapes.
        finetunable: True, no warning if ``--finetune`` starts with another value than the checkpoint's: trained weights
            compute the same with any value. Only options of the model and its experts are compared then.
        flag: the flag's name; by default the field's name with dashes. A boolean field whose default is True takes the
            name of the flag that turns it off here (``--disable-…`` / ``--no-…``).
        parse: turns one word of the command line into a value; by default by the type of the field.
        nargs: argparse's ``nargs`` for list-valued options.
        metavar: what ``--help`` shows in place of the value.
    """
    description = {"range": Range(min, max, above, below), "help": help, "choices": choices}
    description |= {"resumable": resumable, "finetunable": finetunable}
    description |= {"flag": flag, "parse": parse, "nargs": nargs, "metavar": metavar}
    return dataclasses.field(default=default, metadata=description)


@dataclasses.dataclass(frozen=True)
class Range:
    """The valid numbers: from ``min`` to ``max``, larger than ``above``, smaller than ``below``."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __bool__(self) -> bool:
        return self != Range()

    def __str__(self) -> str:
        bounds = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one section, with what :func:`option` says of it."""

    name: str
    section: str
    kind: type  # of the value, or of its elements: int, float, str or bool
    many: bool  # whether the value is a tuple
    optional: bool  # whether the value may be None
    default: Any
    help: str
    range: Range
    choices: tuple[str, ...] | None
    resumable: bool | None
    finetunable: bool
    flag: str  # for a boolean that is true by default, the flag that turns it off
    opposite: str | None  # for a boolean, the flag that undoes ``flag``
    parse: Callable[[str], Any] | None
    nargs: str | None
    metavar: str | None

    def from_word(self, word: str) -> Any:
        """The value (of a tuple, one element) written as ``word`` on a command line; ``none`` unsets an optional one.

        Raises:
            ConfigError: the word is no such value.
        """
        return None if self.optional and word == "none" else self._element(word)

    def from_value(self, value: Any) -> Any:
        """The value given as ``value`` in a YAML or JSON file: lists become tuples, numbers may be written as counts.

        Raises:
            ConfigError: the value is of another type or not among the choices; the message does not name the option.
        """
        if value is None and self.optional:
            return None
        if not self.many:
            return self._element(value)
        # A blend such as [0.3, web_text, 0.7, code_text] mixes numbers and names: there a number stands for its text.
        elements = value if isinstance(value, list | tuple) else (value,)
        if self.kind is str:
            elements = [str(x) if isinstance(x, int | float) and not isinstance(x, bool) else x for x in elements]
        return tuple(self._element(x) for x in elements)

    def problems(self, value: Any) -> Iterator[str]:
        """What is wrong with a value by itself: its type, choices or range."""
        try:
            if self.from_value(value) != value:
                raise ConfigError(f"got {value!r}; expected {'a tuple' if self.many else self.kind.__name__}")
        except ConfigError as error:
            yield f"{self.flag}: {error}"
            return
        if value is None or self.kind not in (int, float):
            return
        if not all(number in self.range for number in (value if self.many else (value,))):
            default = f", such as the default {in_words(self.default)}" if self.default is not None else ""
            unset = ", or be left out" if self.optional else ""
            yield f"{self.flag} {in_words(value)} must be {self.range}{default}{unset}"

    def _element(self, value: Any) -> Any:
        wrong = f"got {value!r}; expected {KIND_NAMES[self.kind]}"
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, str | int | float):
            raise ConfigError(wrong)
        if isinstance(value, str) and self.kind in (int, float):
            try:
                value = (self.parse or self.kind)(value)
            except ValueError as error:
                raise ConfigError(str(error) if self.parse else wrong) from None
        if isinstance(value, str) != (self.kind is str):
            raise ConfigError(wrong + (" (put it in quotes)" if self.kind is str else ""))
        if not isinstance(value, str):
            if not (-1e100 < value < 1e100):
                raise ConfigError(f"got {str(value)[:40]}; expected a finite number of a sensible size")
            if self.kind is int and value != int(value):
                raise ConfigError(wrong)
        elif self.choices and value not in self.choices:
            best = nearest(value, self.choices)
            raise ConfigError(f"got {value!r}; choose from {', '.join(self.choices)} (nearest: {best!r})")
        return self.kind(value)


def in_words(value: Any) -> str:
    """A value as the words of a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_count(text: str) -> int:
    """Read a whole number such as ``300B``, ``375M``, ``1.5K``, ``2_400_000`` or ``1e9``.

    Raises:
        ValueError: the text is no number or not a whole one.
    """
    stripped = str(text).strip()
    factor = _SUFFIXES.get(stripped[-1:].upper(), 1)
    try:
        value = Decimal(stripped[:-1] if factor > 1 else stripped) * factor
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise ValueError(f"got {text!r}; expected a count: a whole number such as 2400000, 375M or 300B")
    if value != int(value):
        raise ValueError(f"got {text!r}, which is {value.normalize()}; expected a whole number")
    return int(value)


# ----------------------------------------------------------------------------------------------- rules between options

Check = Callable[["RunConfig", int], Iterator[str]]
C = TypeVar("C", bound=Check)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What :func:`rule` registers."""

    options: frozenset[str]
    check: Check
    files: bool


RULES: list[Rule] = []
"""All rules, in the order of the sections."""


def rule(*options: str, files: bool = False) -> Callable[[C], C]:
    """Register a function of a configuration and the number of processes that yields what is wrong, one line each.

    A line says what was got, what is required, with the numbers, and how to fix it.

    Args:
        *options: the fields that the function reads. It is called only if each is valid by itself.
        files: whether it looks at files; such rules are left out where a run is only planned.
    """

    def register(check: C) -> C:
        RULES.append(Rule(frozenset(options), check, files))
        return check

    return register
