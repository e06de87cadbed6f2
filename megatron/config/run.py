"""All of a run's configuration in one object, and its values as text, YAML, JSON and objects.

A value takes one of three shapes: a word of the command line (:meth:`Option.from_word`), a value of a YAML or JSON file
(:meth:`Option.from_value`), and the attribute of its section's dataclass. :func:`to_dict` and :func:`from_dict` convert
a whole :class:`RunConfig` and are exact inverses of each other.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError, nearest
from megatron.config.guard import GuardConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig, one_for_all_or_each
from megatron.config.optimizer import OptimizerConfig
from megatron.config.option import Option
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig


@dataclasses.dataclass
class RunConfig:
    """One section for each package; field names are unique over all sections."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    def expert_parallel_degree(self, layer: int) -> int:
        """Processes that share the experts of layer number ``layer`` (from 0); 1 for a dense layer."""
        if self.moe.experts_of_layer(layer) == 1:
            return 1
        return one_for_all_or_each(self.parallel.moe_expert_parallel_size, self.moe.moe_layer_index(layer))

    def expert_parallel_degrees(self) -> list[int]:
        """The degrees of all layers with experts, each once, ascending; none for a dense model."""
        layers = (n for n in range(self.model.num_layers) if self.moe.experts_of_layer(n) > 1)
        return sorted({self.expert_parallel_degree(layer) for layer in layers})

    def expert_counts(self, degree: int) -> list[int]:
        """The numbers of experts that layers of this degree have, each once, ascending."""
        layers = (n for n in range(self.model.num_layers) if self.expert_parallel_degree(n) == degree)
        return sorted({self.moe.experts_of_layer(layer) for layer in layers} - {1})


def _read_options(sections: Mapping[str, type]) -> dict[str, Option]:
    options = {}
    for section, kind_of_section in sections.items():
        hints = typing.get_type_hints(kind_of_section)
        for field in dataclasses.fields(kind_of_section):
            arms = typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else ()
            base = next((arm for arm in arms if arm is not types.NoneType), hints[field.name])
            many = typing.get_origin(base) is tuple
            kind = typing.get_args(base)[0] if many else base
            dashed = field.name.replace("_", "-")
            opposite = None if kind is not bool else f"--{dashed}" if field.default else f"--no-{dashed}"
            described = {**field.metadata, "flag": field.metadata["flag"] or f"--{dashed}"}
            options[field.name] = Option(
                field.name, section, kind, many, bool(arms), field.default, opposite=opposite, **described
            )
    return options


SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)
"""The sections' dataclasses by name."""

OPTIONS: dict[str, Option] = _read_options(SECTIONS)
"""Every option of a run by its field's name, in the order of the sections."""

PRECISIONS = OPTIONS["precision"].choices or ()
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
        elif key in SECTIONS:
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
    """Key of a file -> (field name, what ``true`` means, or None where the key takes the value itself)."""
    keys: dict[str, tuple[str, Any]] = {precision: ("precision", precision) for precision in PRECISIONS}
    for name, option in OPTIONS.items():
        if option.opposite is not None:
            for flag, value in ((option.flag, not option.default), (option.opposite, option.default)):
                keys[flag.removeprefix("--").replace("-", "_")] = (name, value)
        keys[name] = (name, None)
    return keys


_KEYS = _read_keys()
