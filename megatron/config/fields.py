"""How a dataclass field describes its command-line flag.

Every option of a run is one dataclass field made by :func:`option`. The flag parser, the YAML reader, ``--help``
and the documentation are generated from these descriptions, so an option is written down once.
"""

import dataclasses
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    nargs: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with the description of its flag.

    Args:
        default: the value without a preset, a YAML file or a flag.
        help: one or two sentences for ``--help``.
        flag: the flag's name; by default the field's name with dashes. A boolean field whose default is True takes the
            name of the flag that turns it off here (``--disable-…`` / ``--no-…``).
        parse: turns one word of the command line into a value; by default by the type of the field.
        choices: the values allowed.
        nargs: argparse's ``nargs`` for list-valued options.
        metavar: what ``--help`` shows in place of the value.
    """
    metadata = {"help": help, "flag": flag, "parse": parse, "choices": choices, "nargs": nargs, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


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
