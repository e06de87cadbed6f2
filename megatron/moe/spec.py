"""All that an MoE layer can be asked to do, in a form in which a kernel can say what of it it knows."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from megatron.config import ModelConfig, MoEConfig
from megatron.parallel.groups import ExpertGroup, TensorGroup


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One MoE layer in training or in evaluation.

    It holds the configuration itself and not a choice from it, so a new option is part of it without a change here.
    """

    model: ModelConfig
    moe: MoEConfig
    num_experts: int
    expert_group: ExpertGroup
    tensor_group: TensorGroup
    training: bool

    def unknown(self, known: Mapping[str, Container[Any]]) -> tuple[str, ...]:
        """The options that have neither a value that ``known`` names nor, if it does not name them, their default.

        Args:
            known: option -> values. Options of a section are named "moe.topk" and so on.
        """
        return tuple(
            name
            for name, value, default in self._options()
            if (value not in known[name] if name in known else value != default)
        )

    def _options(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, value and default of each option."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if dataclasses.is_dataclass(value):
                for inner in dataclasses.fields(value):
                    yield f"{field.name}.{inner.name}", getattr(value, inner.name), _default(inner)
            else:
                yield field.name, value, _default(field)


def _default(field: dataclasses.Field) -> Any:
    """A field's default; for a field without one ``dataclasses.MISSING``, which equals no value."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclasses.dataclass(frozen=True)
class Where:
    """The values for which ``condition`` holds."""

    condition: Callable[[Any], bool]

    def __contains__(self, value: object) -> bool:
        return self.condition(value)


ANY = Where(lambda value: True)
