"""Our update of a bf16 model against DeepSpeed's own, whose place it takes."""

import gc
import math

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from engine.test_deepspeed_internals import MICRO, SEQ, batch, engine
from torch.autograd.graph import get_gradient_edge

UPDATES = 4


class LeftToDeepSpeed:
    """In the place of our update: DeepSpeed's."""

    def __init__(self, optimizer, layouts, config, topology) -> None:
        self._optimizer = optimizer

    def begin(self, micro_batches: int) -> None:
        pass

    @property
    def norm(self) -> torch.Tensor:
        return torch.as_tensor(float(self._optimizer._global_grad_norm))


def train(micro_batches: int, ours: bool, options: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Updates of which the second has a parameter without gradient and the third one that is not finite."""
    from megatron.engine import bf16_update

    original = bf16_update.BF16Update
    bf16_update.BF16Update = original if ours else LeftToDeepSpeed
    try:
        made = engine(**options)
    finally:
        bf16_update.BF16Update = original
    norms = []
    for step in range(UPDATES):
        made.model.final_layernorm.bias.requires_grad_(step != 1)
        first = (step * dist.get_world_size() + dist.get_rank()) * micro_batches
        batches = [batch(first + i) for i in range(micro_batches)]
        if step == 2:
            batches[0]["loss_mask"][0, 0] = math.inf if dist.get_rank() == 0 else 1.0
        result = made.train_step(batches, (step + 1) * 4 * MICRO * SEQ)
        assert result.skipped == (step == 2)
        norms.append(result.grad_norm)
    weights = {t.name: b.tensor.float() for t in made.saved_tensors() for b in t.boxes}
    weights |= {f"computes with {name}": p.detach().float() for name, p in made.model.named_parameters()}
    return norms, weights


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "micro_batches", "expert_size"), [(1, 1, 1), (1, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_updates_are_deepspeeds(processes: int, micro_batches: int, expert_size: int):
    options = {"expert_size": expert_size, "clip": 0.05}
    ours, theirs = (run_distributed(train, processes, micro_batches, mine, options) for mine in (True, False))
    for (norms, weights), (their_norms, their_weights) in zip(ours, theirs, strict=True):
        assert norms == pytest.approx(their_norms, rel=1e-5)
        assert all(norm > 0.05 for norm in norms), "clipping must have something to do"
        assert weights.keys() == their_weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, their_weights[name], rtol=1e-5, atol=1e-7, msg=name)


def directly() -> tuple[dict, dict]:
    """Whether groups of large parameters, of one process, keep bf16 gradients: with one micro-batch and with two."""
    from megatron.engine import bf16_update

    bf16_update.MANY = 64
    made = engine()
    seen = []
    for micro_batches in (1, 2, 1):
        made.train_step([batch(i) for i in range(micro_batches)], SEQ)
        groups = made._update._groups
        seen.append([(g.direct, g.sums.untyped_storage().size() > 0) for g in groups])
    return seen


def test_one_micro_batch_needs_no_fp32_gradients():
    one, two, again = run_distributed(directly, 1)[0]
    assert {direct for direct, _ in one} == {True, False}
    assert all(direct != has_sums for direct, has_sums in one)
    assert all(not direct and has_sums for direct, has_sums in two)
    assert [direct for direct, _ in again] == [direct for direct, _ in one]


def kept_alive() -> list[str]:
    """Parameters whose gradient's node in autograd's graph lives on between passes, with the stream it was made on."""
    made = engine()
    made.train_step([batch(0)], SEQ)
    parameters = dict(made.model.named_parameters())
    for parameter in parameters.values():
        get_gradient_edge(parameter).node.metadata["seen"] = True
    gc.collect()
    return [name for name, p in parameters.items() if "seen" in get_gradient_edge(p).node.metadata]


def test_nothing_of_autograds_graph_lives_on_between_updates():
    """A CUDA graph could not be recorded otherwise."""
    assert run_distributed(kept_alive, 1) == [[]]


def test_bf16_moments_follow_fp32_ones():
    (norms, weights), (exact_norms, exact) = (
        run_distributed(train, 1, 1, True, {"exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype})[0]
        for dtype in ("bf16", "fp32")
    )
    assert norms == pytest.approx(exact_norms, rel=2e-2)
    for name, value in weights.items():
        if name.startswith("model."):  # four updates move a weight by up to 1e-3
            errors = (value - exact[name]).abs()
            if name.endswith("qkv.bias"):  # the gradient of key biases is 0 but for rounding, which Adam blows up
                queries, _, values = errors.chunk(3)
                errors = torch.cat([queries, values])
            assert bool((errors <= 1e-4).all()), name
    assert any(not torch.equal(value, exact[name]) for name, value in weights.items())
