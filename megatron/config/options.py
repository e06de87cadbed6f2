"""The options of a run, read from the dataclass fields, and their values as text, YAML, JSON and objects.

A value takes one of three shapes: a word of the command line (:meth:`Option.from_word`), a value of a YAML or JSON file
(:meth:`Option.from_value`), and the attribute of its section's dataclass. :func:`to_dict` and :func:`from_dict` convert
a whole :class:`RunConfig` and are exact inverses of each other.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from megatron.config.errors import ConfigError, nearest
from megatron.config.run import RunConfig

_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one section, with everything its flag needs (see :func:`megatron.config.fields.option`)."""

    name: str
    section: str
    kind: type  # of the value, or of its elements: int, float, str or bool
    many: bool  # whether the value is a tuple
    optional: bool  # whether the value may be None
    default: Any
    help: str
    flag: str  # for a boolean that is true by default, the flag that turns it off
    opposite: str | None  # for a boolean, the flag that undoes ``flag``
    parse: Any
    choices: tuple[str, ...] | None
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

    def _element(self, value: Any) -> Any:
        wrong = f"got {value!r}; expected {_KIND_NAMES[self.kind]}"
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, str | int | float):
            raise ConfigError(wrong)
        if isinstance(value, str) and self.kind in (int, float):
            try:
                value = (self.parse or self.kind)(value)
            except ValueError as error:
                raise ConfigError(str(error) if self.parse else wrong) from None
        if isinstance(value, str) != (self.kind is str):
            raise ConfigError(wrong + (" (put it in quotes)" if self.kind is str else ""))
        if self.kind in (int, float) and not (-1e100 < value < 1e100):
            raise ConfigError(f"got {str(value)[:40]}; expected a finite number of a sensible size")
        if self.kind is int and value != int(value):
            raise ConfigError(wrong)
        if self.choices and value not in self.choices:
            best = nearest(value, self.choices)
            raise ConfigError(f"got {value!r}; choose from {', '.join(self.choices)} (nearest: {best!r})")
        return self.kind(value)


def _read_options() -> dict[str, Option]:
    options = {}
    for section in dataclasses.fields(RunConfig):
        hints = typing.get_type_hints(section.type)
        for field in dataclasses.fields(section.type):
            arms = typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else ()
            base = next((arm for arm in arms if arm is not types.NoneType), hints[field.name])
            many = typing.get_origin(base) is tuple
            kind = typing.get_args(base)[0] if many else base
            dashed = field.name.replace("_", "-")
            opposite = None if kind is not bool else f"--{dashed}" if field.default else f"--no-{dashed}"
            described = {**field.metadata, "flag": field.metadata["flag"] or f"--{dashed}"}
            options[field.name] = Option(
                field.name, section.name, kind, many, bool(arms), field.default, opposite=opposite, **described
            )
    return options


OPTIONS: dict[str, Option] = _read_options()
"""Every option of a run by its field's name, in the order of the sections."""

SECTIONS: dict[str, type] = {section.name: section.type for section in dataclasses.fields(RunConfig)}
"""The sections' dataclasses by name."""

PRECISIONS = OPTIONS["precision"].choices
"""Number formats; each is a flag of its own, as in Megatron (``--bf16``)."""


def build(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from values by field name; defaults for the rest."""
    sections = {section: {} for section in SECTIONS}
    for name, value in values.items():
        sections[OPTIONS[name].section][name] = value
    return RunConfig(**{section: SECTIONS[section](**chosen) for section, chosen in sections.items()})


def flatten(config: RunConfig) -> dict[str, Any]:
    """A configuration's values by field name; inverse of :func:`build`."""
    return {name: getattr(getattr(config, option.section), name) for name, option in OPTIONS.items()}


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """``{section: {field: value}}`` ready for JSON or YAML: tuples become lists."""
    result: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in flatten(config).items():
        result[OPTIONS[name].section][name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(mapping: Mapping[str, Any]) -> RunConfig:
    """Inverse of :func:`to_dict`; also reads all that :func:`read_mapping` does.

    Raises:
        ConfigError: an unknown key or a wrong value, all of them named.
    """
    return build(read_mapping(mapping))


def read_mapping(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field name from a mapping whose keys are sections, field names or flag names, in any mixture.

    ``{"model": {"num_layers": 12}, "train-tokens": "300B", "bf16": True, "no-moe-rts": True}`` is a valid mapping.

    Raises:
        ConfigError: unknown, misplaced or repeated keys and wrong values, all of them named.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in mapping.items():
        if key in SECTIONS and isinstance(value, Mapping | None):  # an empty section of a YAML file is None
            for inner, inner_value in (value or {}).items():
                _read_key(inner, inner_value, key, values, problems)
        elif key in SECTIONS and key not in OPTIONS:
            problems.append(f"{key}: got {value!r}; expected a section, that is a mapping of its options")
        else:
            _read_key(key, value, None, values, problems)
    if problems:
        raise ConfigError(*problems)
    return values


def _read_key(key: Any, value: Any, section: str | None, values: dict[str, Any], problems: list[str]) -> None:
    path = f"{section}.{key}" if section else str(key)
    word = str(key).removeprefix("--").replace("-", "_")
    name, meaning = _KEYS.get(word, (None, None))
    if name is None:
        keys = [name for name, option in OPTIONS.items() if section in (None, option.section)]
        best = nearest(word, keys if section else [*_KEYS, *SECTIONS])
        problems.append(f"{path}: unknown key; the nearest valid one is {best!r}")
    elif section and OPTIONS[name].section != section:
        problems.append(f"{path}: {key!r} belongs to the section {OPTIONS[name].section!r}")
    elif name in values:
        problems.append(f"{path}: {name} is given twice")
    elif meaning is None:
        try:
            values[name] = OPTIONS[name].from_value(value)
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    elif value is True:
        values[name] = meaning
    elif value is False and isinstance(meaning, bool):
        values[name] = not meaning
    elif value is not False:  # "fp16: false" says nothing
        problems.append(f"{path}: got {value!r}; expected true or false")


def _read_keys() -> dict[str, tuple[str, Any]]:
    """Key of a file -> (field name, what ``true`` stands for, or None where the key takes the value itself)."""
    keys: dict[str, tuple[str, Any]] = {precision: ("precision", precision) for precision in PRECISIONS}
    for name, option in OPTIONS.items():
        if option.kind is bool:
            for flag, value in ((option.flag, not option.default), (option.opposite, option.default)):
                keys[flag.removeprefix("--").replace("-", "_")] = (name, value)
        keys[name] = (name, None)
    return keys


_KEYS = _read_keys()
