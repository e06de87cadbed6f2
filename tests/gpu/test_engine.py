"""The engine on a GPU: bf16 and fp16 follow fp32, and fp16's loss scale finds its place and is resumed."""

import dataclasses

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig, RunConfig, TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCAB, SEQ, BATCH, STEPS = 512, 64, 16, 20


def config(precision: str, **optimizer) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4, seq_length=SEQ, hidden_dropout=0.0),
        moe=MoEConfig(num_experts=(8,)),
        optimizer=OptimizerConfig(lr=3e-3, precision=precision, **optimizer),
        training=TrainingConfig(train_tokens=STEPS * BATCH * SEQ, micro_batch_size=4, global_batch_size=BATCH),
    )


def micro_batch(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    text = (torch.randint(0, VOCAB, (4, 1), generator=generator) + torch.arange(SEQ + 1)) % VOCAB
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(4, SEQ), "sample_index": 4 * number}


@pytest.fixture(scope="module")
def topology():
    from megatron.config import ParallelConfig
    from megatron.parallel.initialize import initialize, rendezvous, shut_down
    from megatron.parallel.launch import Launch

    parallel = ParallelConfig()
    launch, store = rendezvous(Launch.from_environment({}), parallel.timeout)
    yield initialize(parallel, launch, torch.device("cuda", 0), store)
    shut_down()


def build(run: RunConfig, topology):
    from megatron.engine.engine import DeepSpeedEngine
    from megatron.model.gpt import GPTModel

    return DeepSpeedEngine(GPTModel(run.model, run.moe, VOCAB, topology.expert_group, seed=1), run, topology)


def train(engine, steps: int = STEPS) -> tuple[list[float], int]:
    losses, skipped = [], 0
    for step in range(steps):
        result = engine.train_step([micro_batch(4 * step + i) for i in range(4)], (step + 1) * BATCH * SEQ)
        losses.append(float(result.sums.losses[0] / result.sums.losses[3]))
        skipped += result.skipped
    return losses, skipped


def test_bf16_and_fp16_follow_fp32(topology):
    exact, _ = train(build(config("fp32"), topology))
    assert exact[-1] < exact[0] - 1
    for precision in ("bf16", "fp16"):
        losses, skipped = train(build(config(precision), topology))
        assert skipped <= 2
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=0.05, atol=0.1)


def test_the_fp16_loss_scale_falls_until_gradients_are_finite_and_is_part_of_the_state(topology):
    run = config("fp16", initial_loss_scale_power=32, hysteresis=1)
    engine = build(run, topology)
    _, skipped = train(engine, 30)
    state = engine.scalar_state()
    assert 0 < skipped < 30
    assert state["adam_step"] == 30 - skipped
    assert state["loss_scaler"]["cur_scale"] < 2.0**32
    resumed = build(dataclasses.replace(run), topology)
    resumed.load_scalar_state(state)
    assert resumed.scalar_state() == state


def test_an_overflow_that_uses_up_hysteresis_is_nothing_wrong_and_a_fixed_scale_stays_fixed(topology):
    engine = build(config("fp16", initial_loss_scale_power=32, hysteresis=2), topology)
    first, second = ([micro_batch(4 * step + i) for i in range(4)] for step in range(2))
    results = [engine.train_step(first, BATCH * SEQ), engine.train_step(second, 2 * BATCH * SEQ)]
    assert [(result.skipped, result.scale_fell) for result in results] == [(True, True)] * 2
    state = engine.scalar_state()
    assert (state["loss_scaler"]["cur_scale"], state["loss_scaler"]["cur_hysteresis"]) == (2.0**31, 1)
    fixed = build(config("fp16", loss_scale=128.0), topology)
    fixed.load_scalar_state(state)
    assert fixed._loss_scale() == 128.0
    assert fixed.scalar_state()["loss_scaler"] is None
    again = build(config("fp16", initial_loss_scale_power=10), topology)
    again.load_scalar_state(fixed.scalar_state())
    assert again._loss_scale() == 2.0**10
