"""What one degree of expert parallelism saved, every other one resumes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_engine import BATCH, DENSE, MOE, SEQ, build, config, my_micro_batches, whole

from megatron.config import MoEConfig


def steps(engine, first: int, count: int) -> list[tuple[float, float]]:
    from megatron.training.metrics import mean_losses, reduce_sums

    history = []
    for step in range(first, first + count):
        outcome = engine.train_step(my_micro_batches(step), (step + 1) * BATCH * SEQ)
        history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
    return history


def save_and_resume(folder: str, moe: MoEConfig, savers: list[tuple[int, str]], loaders: list[tuple[int, str]]) -> dict:
    """Losses, norms and all tensors after four updates: uninterrupted, and for each pair of saver and loader."""
    from megatron.checkpoint import load, save
    from megatron.parallel.initialize import forget_groups

    results = {}
    for saver in savers:
        engine = build(config(moe, *saver))
        steps(engine, 0, 2)
        save(folder + "/" + "-".join(map(str, saver)), 2, engine.saved_tensors(), engine.scalar_state())
        results[saver] = (steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg_sq."))
        forget_groups()
    for saver in savers:
        for loader in loaders:
            engine = build(config(moe, *loader, seed=99))  # other initial weights: all must come from the checkpoint
            engine._config.training.seed = config(moe).training.seed
            with engine.loading() as tensors:
                scalars = load(folder + "/" + "-".join(map(str, saver)), tensors)
            engine.load_scalar_state(scalars)
            results[saver, loader] = (steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg_sq."))
            forget_groups()
    return results if dist.get_rank() == 0 else {}


@pytest.mark.distributed
@pytest.mark.parametrize(("moe", "degrees"), [(DENSE, [1]), (MOE, [1, 2, 4])], ids=["dense", "moe"])
def test_every_degree_of_expert_parallelism_resumes_every_other(tmp_path: Path, moe: MoEConfig, degrees: list[int]):
    layouts = [(degree, "fp32") for degree in degrees]
    results = run_distributed(save_and_resume, 4, str(tmp_path), moe, layouts, layouts, timeout=400)[0]
    for saver in layouts:
        for loader in layouts:
            compare(results[saver, loader], results[saver], f"saved {saver}, resumed {loader}")


@pytest.mark.distributed
def test_a_bf16_run_resumes_with_its_fp32_weights(tmp_path: Path):
    layouts = [(2, "bf16")]
    results = run_distributed(save_and_resume, 2, str(tmp_path), MOE, layouts, layouts)[0]
    compare(results[layouts[0], layouts[0]], results[layouts[0]], "bf16")


def compare(found: tuple, expected: tuple, where: str) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5, msg=where)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            error = (mine[name] - value).abs().max()
            assert error <= 1e-5, f"{where}: {name}: {error}"  # NaN fails too
