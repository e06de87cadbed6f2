"""What one pipeline saved, every other one resumes, and so does a single process."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_engine import whole
from distributed.test_pipeline_engine import TOP1, build, layout, update

from megatron.config import RunConfig

LAYOUTS = {"PP1": layout(TOP1, 1), "PP2": layout(TOP1, 2), "PP4": layout(TOP1, 4)}
SAVERS = ("PP2", "PP4", "PP1")


def steps(engine, first: int, count: int) -> list[tuple[float, float]]:
    from megatron.training.metrics import mean_losses, reduce_sums

    history = []
    for step in range(first, first + count):
        outcome = update(engine, step)
        history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
    return history


def save_then_go_on(folder: str, run: RunConfig) -> tuple:
    """Two updates, a checkpoint, two more: their losses and all tensors; and the shapes of the parameters kept here."""
    from megatron.checkpoint import save

    engine = build(run)
    steps(engine, 0, 2)
    save(folder, 2, engine.saved_tensors(), engine.scalar_state())
    kept = {name: p.numel() for name, p in engine.model.named_parameters()}
    return steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg."), whole(engine, "exp_avg_sq."), kept


def resume(folders: list[str], run: RunConfig) -> list[tuple]:
    from megatron.checkpoint import load
    from megatron.parallel.initialize import forget_groups

    results = []
    for folder in folders:
        # other initial weights: all must come from the checkpoint
        other = dataclasses.replace(run, training=dataclasses.replace(run.training, seed=99))
        engine = build(other)
        engine._config.training.seed = run.training.seed
        with engine.loading() as tensors:
            scalars = load(folder, tensors)
        engine.load_scalar_state(scalars)
        results.append((steps(engine, 2, 2), whole(engine), whole(engine, "exp_avg."), whole(engine, "exp_avg_sq.")))
        forget_groups()
    return results if dist.get_rank() == 0 else []


@pytest.mark.distributed
def test_pipelines_resume_each_other_and_one_process(tmp_path: Path):
    uninterrupted, folders = {}, {}
    for name in SAVERS:
        folders[name] = str(tmp_path / name)
        ranks = run_distributed(save_then_go_on, int(name[2:]), folders[name], LAYOUTS[name])
        uninterrupted[name] = ranks[0][:4]
        kept = [rank[4] for rank in ranks]
        if len(ranks) > 1:  # each stage has its own layers; only the token table exists twice
            table = "embedding.word_embeddings.weight"
            assert set(kept[0]) & set(kept[-1]) == {table}
            whole_model = sum(value.numel() for value in ranks[0][1].values())
            assert sum(sum(stage.values()) for stage in kept) == whole_model + kept[0][table]
    for loader, run in LAYOUTS.items():
        results = run_distributed(resume, int(loader[2:]), list(folders.values()), run)[0]
        for saver, found in zip(folders, results, strict=True):
            where = f"saved {saver}, resumed {loader}"
            expected = uninterrupted[saver]
            torch.testing.assert_close(
                torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5, msg=where
            )
            for mine, theirs in zip(found[1:], expected[1:], strict=True):
                assert mine.keys() == theirs.keys()
                for key, value in theirs.items():
                    error = (mine[key] - value).abs().max()
                    assert error <= 1e-5, f"{where}: {key}: {error}"  # NaN fails too
