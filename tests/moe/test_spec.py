"""Which options of a layer are outside of what a kernel names."""

import dataclasses

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.spec import ANY, LayerSpec, Where
from megatron.parallel.groups import ALONE, ExpertGroup

SPEC = LayerSpec(ModelConfig(), MoEConfig(), 4, ExpertGroup(2, 1, None), ALONE, training=True)
NAMED = dict.fromkeys(("num_experts", "expert_group.size", "expert_group.rank", "expert_group.group", "training"), ANY)


@dataclasses.dataclass
class ListOption(MoEConfig):
    """With a default that is made anew for each object."""

    biased_layers: list[int] = dataclasses.field(default_factory=list)


def test_what_has_no_default_must_be_named():
    assert SPEC.unknown({}) == (
        "num_experts",
        "expert_group.size",
        "expert_group.rank",
        "expert_group.group",
        "training",
    )
    assert SPEC.unknown(NAMED) == ()


def test_an_option_that_is_not_named_must_have_its_default():
    spec = dataclasses.replace(SPEC, moe=MoEConfig(topk=2), model=ModelConfig(seq_length=8))
    assert spec.unknown(NAMED) == ("model.seq_length", "moe.topk")
    assert spec.unknown({**NAMED, "moe.topk": (1, 2)}) == ("model.seq_length",)
    assert spec.unknown({**NAMED, "moe.topk": ANY, "model.seq_length": Where(lambda n: n < 8)}) == ("model.seq_length",)


def test_a_named_option_must_have_one_of_the_values_even_at_its_default():
    assert SPEC.unknown({**NAMED, "moe.topk": (2,)}) == ("moe.topk",)


def test_defaults_may_be_made_by_a_function():
    assert dataclasses.replace(SPEC, moe=ListOption()).unknown(NAMED) == ()
    assert dataclasses.replace(SPEC, moe=ListOption(biased_layers=[1])).unknown(NAMED) == ("moe.biased_layers",)
