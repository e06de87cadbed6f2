"""On a GPU too a training with ``--deterministic`` repeats bit for bit, compiled layers and dropout included."""

import pytest
from distributed.spawn import run_distributed
from distributed.test_deterministic import assert_same_bits
from distributed.tiny_training import Trained
from gpu import small_training
from gpu.processes import needs_two_gpus

from megatron.config import MoEConfig

pytestmark = pytest.mark.gpu
MODELS = {
    "dense": MoEConfig(),
    "top-1": MoEConfig(num_experts=(8,)),
    "dropless": MoEConfig(num_experts=(8,), moe_token_dropping=False),
    "top-2": MoEConfig(num_experts=(8,), topk=2),
}


def train() -> list[Trained]:
    """Each model's training in a process that is set up as ``--deterministic`` does."""
    from megatron.parallel.determinism import make_deterministic

    make_deterministic()
    return [small_training.train(small_training.build(moe)) for moe in MODELS.values()]


def test_two_runs_are_one_bit_for_bit():
    first, second = (run_distributed(train, 1, timeout=580, backend="nccl")[0] for _ in range(2))
    assert_same_bits(first, second)


@needs_two_gpus
def test_two_runs_of_two_processes_are_one_bit_for_bit():
    first, second = (run_distributed(train, 2, timeout=580, backend="nccl")[0] for _ in range(2))
    assert_same_bits(first, second)
