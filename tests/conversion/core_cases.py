"""Which models ``core_model.py`` saves; nothing heavy is imported here."""

import dataclasses
from typing import Any

LAYERS, H, N, V, POSITIONS, E = 2, 32, 4, 128, 48, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is shared: tensor-parallel, stages, expert-parallel."""

    tensor: int = 1
    stages: int = 1
    shares: int = 1
    experts: tuple[int, ...] = ()  # 1 for each layer with some
    topk: int = 1
    biases: bool = True
    grouped: bool = False
    qk_layernorm: bool = False
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    1: {
        "dense": Case(),
        "top2": Case(experts=(1, 1), topk=2),
        "single": Case(experts=(1, 0), biases=False, metadata={"singleton_local_shards": True}),
    },
    2: {
        "dense_tp2": Case(tensor=2),
        "qk_layernorm": Case(tensor=2, qk_layernorm=True),
        "dense_pp2": Case(stages=2),
        "ep2": Case(shares=2, experts=(0, 1)),
        "pp2_experts": Case(stages=2, experts=(0, 1), topk=2),
        "grouped": Case(shares=2, experts=(1, 1), topk=2, biases=False, grouped=True),
    },
}
