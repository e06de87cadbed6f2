"""What one layout saved, another one resumes: other tensor, pipeline, expert and data parallelism, other world size.

A run goes on after a checkpoint as if it had not stopped and had always had the new layout: losses, gradient norms,
parameters and Adam's moments are those of one process that was never interrupted, to 1e-5.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, ETP, LAYOUTS, PP, SP, TP, marked
from distributed.tiny_training import (
    BALANCED,
    DENSE,
    DROPLESS,
    STEPS,
    TOP1,
    TOP2,
    Trained,
    build,
    compare,
    run_config,
    updates,
    whole,
)

from megatron.config import MoEConfig, RunConfig

SAVED_AFTER = 1  # updates

# model -> pairs of the layout that saves and the one that resumes
PAIRS: dict[str, tuple[MoEConfig, list[tuple[str, str]]]] = {
    "dense": (
        DENSE,
        [
            ("DP2", "TP2 SP"),
            ("TP2 SP", "PP4"),
            ("PP4", "1 process"),
            ("PP2 x TP2 SP", "DP3"),
            ("1 process", "PP2 x TP2 SP"),
        ],
    ),
    "top-1, up to 4 processes": (
        TOP1,
        [
            ("1 process", "TP2 SP x EP2"),
            ("TP2 SP x EP2", "PP2 x EP2"),
            ("PP2 x EP2", "1 process"),
        ],
    ),
    "top-1, up to 8 processes": (
        TOP1,
        [
            ("1 process", "EP4"),
            ("EP4", "EP2 x DP2 (expert-DP 2)"),
            ("EP2 x DP2 (expert-DP 2)", "TP2 SP x EP2"),
            ("TP2 SP x EP2", "PP2 x EP2"),
            ("PP2 x EP2", "PP2 x TP2 SP x EP2"),
            ("PP2 x TP2 SP x EP2", "EP4 x DP2 (expert-DP 2)"),
            ("EP4 x DP2 (expert-DP 2)", "ETP2 SP x EP2"),
            ("ETP2 SP x EP2", "PP4"),
            ("PP4", "1 process"),
        ],
    ),
    "top-2, experts by layer": (TOP2, [("ETP4", "EP4"), ("EP4", "PP2 x ETP2"), ("PP2 x ETP2", "DP3")]),
    "dropless residual": (DROPLESS, [("PP2 x TP2", "EP2"), ("EP2", "TP2 SP")]),
    "quantile balancing, centered": (
        BALANCED["quantile balancing"],
        [("1 process", "PP2 x EP2"), ("PP2 x EP2", "TP2 SP")],
    ),
}


class Ended(NamedTuple):
    """The updates after the checkpoint, and Adam's moments at the end."""

    trained: Trained
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]


def go_on(engine) -> Ended:
    trained = updates(engine, SAVED_AFTER, STEPS)
    return Ended(trained, whole(engine, "exp_avg."), whole(engine, "exp_avg_sq."))


def save_then_go_on(folder: str, run: RunConfig, further: bool) -> Ended | None:
    """Train, save, and if wanted train on."""
    from megatron.checkpoint import save

    engine = build(run)
    updates(engine, 0, SAVED_AFTER)
    save(folder, SAVED_AFTER, engine.saved_tensors(), engine.scalar_state())
    return go_on(engine) if further else None


def resume(folder: str, run: RunConfig) -> Ended | None:
    """Train on from a checkpoint."""
    from megatron.checkpoint import load

    seed, run.training.seed = run.training.seed, 99  # other initial weights: all must come from the checkpoint
    engine = build(run)
    run.training.seed = seed
    with engine.loading() as tensors:
        scalars = load(folder, tensors)
    engine.load_scalar_state(scalars)
    ended = go_on(engine)
    return ended if dist.get_rank() == 0 else None


def compare_ended(found: Ended, expected: Ended, where: str) -> None:
    compare(found.trained, expected.trained, where)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            error = (mine[name] - value).abs().max()
            assert error <= 1e-5, f"{where}: {name}: {error}"  # NaN fails too


@pytest.mark.distributed
@pytest.mark.parametrize("model", [marked(model, ("top-1, up to 4 processes",)) for model in PAIRS])
def test_what_one_layout_saved_another_resumes(tmp_path: Path, model: str):
    moe, pairs = PAIRS[model]
    uninterrupted = run_distributed(save_then_go_on, 1, str(tmp_path / "1 process"), run_config(moe), True)[0]
    for layout in {saver for saver, _ in pairs} - {"1 process"}:
        size, options = LAYOUTS[layout]
        run_distributed(save_then_go_on, size, str(tmp_path / layout), run_config(moe, **options), False)
    for saver, loader in pairs:
        size, options = LAYOUTS[loader]
        found = run_distributed(resume, size, str(tmp_path / saver), run_config(moe, **options))[0]
        compare_ended(found, uninterrupted, f"{model}: saved by {saver}, resumed by {loader}")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [{EP: (2,)}, {PP: 2}, pytest.param({TP: 2, SP: True, ETP: True}, marks=pytest.mark.exhaustive)], ids=str
)
def test_a_bf16_run_resumes_with_its_fp32_weights(tmp_path: Path, layout: dict):
    run = run_config(TOP1, "bf16", **layout)
    expected = run_distributed(save_then_go_on, 2, str(tmp_path), run, True)[0]
    compare_ended(run_distributed(resume, 2, str(tmp_path), run)[0], expected, "bf16")


def kept(run: RunConfig) -> dict[str, int]:
    return {name: p.numel() for name, p in build(run).model.named_parameters()}


@pytest.mark.distributed
def test_a_pipeline_stage_keeps_nothing_of_the_others_but_the_token_table():
    (one,), stages = run_distributed(kept, 1, run_config(TOP1)), run_distributed(kept, 4, run_config(TOP1, **{PP: 4}))
    table = "embedding.word_embeddings.weight"
    assert set(stages[0]) & set(stages[-1]) == {table}
    assert sum(sum(stage.values()) for stage in stages) == sum(one.values()) + one[table]
