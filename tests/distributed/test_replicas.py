"""Replicas are equal in every layout, and one that is not is found and named on all ranks."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_layouts import LAYOUTS
from distributed.tiny_training import TOP1, build, run_config, update, with_dropout

from megatron.config import RunConfig


def check(run: RunConfig, parameter: str, place: int) -> tuple[str, str]:
    """What the check says after an update, and after the process at ``place`` changed one bit of ``parameter``."""
    from megatron.parallel.replicas import ReplicasDiffer

    engine, said = build(run), []
    update(engine, 0)
    for changed in (False, True):
        if changed and dist.get_rank() == place:
            with torch.no_grad():
                dict(engine.model.named_parameters())[parameter].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        try:
            engine.check_replicas()
            said.append("equal")
        except ReplicasDiffer as error:
            said.append(str(error))
    return tuple(said)


TABLE, NORM, QKV, EXPERT = (
    "embedding.word_embeddings.weight",
    "layers.0.input_layernorm.weight",
    "layers.2.attention.qkv.weight",
    "layers.1.mlp.experts.w1",
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "parameter", "place", "ranks"),
    [
        pytest.param("DP4", QKV, 2, [0, 1, 2, 3], marks=pytest.mark.exhaustive),
        ("EP2 x DP2 (expert-DP 2)", EXPERT, 3, [1, 3]),
        ("TP2 SP x EP2", NORM, 1, [0, 1, 2, 3]),
        pytest.param("TP2 SP x EP2", EXPERT, 1, [0, 1], marks=pytest.mark.exhaustive),
        ("PP2 x TP2 SP", TABLE, 3, [1, 3]),
        ("ETP2 SP x EP2", EXPERT, 0, None),
        pytest.param("EP4", EXPERT, 0, None, marks=pytest.mark.exhaustive),
    ],
)
def test_the_first_parameter_that_differs_is_named_with_its_ranks(layout, parameter, place, ranks):
    """Where there is only one copy (``ranks`` None) there is nothing to compare."""
    size, options = LAYOUTS[layout]
    results = run_distributed(check, size, with_dropout(run_config(TOP1, **options)), parameter, place)
    assert len(set(results)) == 1, "all ranks must say the same"
    before, after = results[0]
    assert before == "equal"
    if ranks is None:
        assert after == "equal"
        return
    assert f"replicas differ: {parameter}" in after
    assert f"is not the same on ranks {ranks}" in after
    assert "more parameters" not in after
    assert (f"(odd: rank {place})" if len(ranks) > 2 else "(no majority agrees)") in after
