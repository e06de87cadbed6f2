"""The optimizer's state in CPU memory or with 8-bit moments: the same training, and checkpoints that either resumes."""

import copy
from pathlib import Path

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_engine import not_finite
from distributed.test_layout_resume import compare_ended, resume, save_then_go_on
from distributed.test_layouts import EP, PP, SP, TP, marked
from distributed.tiny_training import (
    DENSE,
    FP16_ON_CPU,
    STEPS,
    TOP1,
    Trained,
    build,
    compare,
    differences,
    reference,
    run_config,
    strayed,
    updates,
    whole,
)

from megatron.config import RunConfig

needs_fp16 = pytest.mark.skipif(not FP16_ON_CPU, reason="needs a processor with instructions for fp16")
LAYOUTS = [
    (1, {}),
    (4, {PP: 2, EP: (2,)}),
    *(
        pytest.param(*one, marks=pytest.mark.exhaustive)
        for one in [(2, {EP: (2,)}), (4, {EP: (2,)}), (2, {TP: 2, SP: True}), (2, {PP: 2})]
    ),
]


def with_(run: RunConfig, **optimizer) -> RunConfig:
    """The same run with these options of its optimizer."""
    run = copy.deepcopy(run)
    vars(run.optimizer).update(optimizer)
    return run


def offloaded(run: RunConfig) -> RunConfig:
    return with_(run, optimizer_cpu_offload=True)


def eight_bit(run: RunConfig) -> RunConfig:
    pytest.importorskip("torchao", reason="needs the extra [8bit]")
    return with_(run, optimizer_name="adamw8bit")


def train(run: RunConfig) -> tuple[Trained, bool, str]:
    """A training; whether DeepSpeed took its state to be in CPU memory, and which optimizer it updates."""
    engine = build(run)
    trained = updates(engine, 0, STEPS)
    off = bool(getattr(engine._optimizer, "cpu_offload", False))
    return trained, off, type(engine._sharded_optimizer).__name__


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_offloaded_updates_are_those_of_one_process_in_plain_torch(size: int, layout: dict):
    found, off, name = run_distributed(train, size, offloaded(run_config(TOP1, **layout)))[0]
    assert (off, name) == (True, "AdamW")
    compare(found, reference(TOP1), str(layout))


@pytest.mark.parametrize(
    ("precision", "size", "layout"),
    [
        pytest.param("bf16", 1, {}, marks=pytest.mark.exhaustive),
        pytest.param("bf16", 2, {}, marks=pytest.mark.exhaustive),
        pytest.param("bf16", 2, {TP: 2, SP: True}, marks=pytest.mark.exhaustive),
        ("bf16", 2, {PP: 2}),
        pytest.param("fp16", 2, {}, marks=needs_fp16),
        pytest.param("fp16", 2, {PP: 2}, marks=(needs_fp16, pytest.mark.exhaustive)),
    ],
    ids=str,
)
def test_offloading_in_half_precision_changes_the_last_digits_at_most(size: int, layout: dict, precision: str):
    run = run_config(DENSE, precision, **layout)
    found, expected = (run_distributed(train, size, r)[0] for r in (offloaded(run), run))
    assert (found[1], expected[1]) == (True, False)
    errors = differences(found[0], expected[0])
    # of bf16 weights, a rounding may turn; of fp16 nothing may change
    assert max(errors) <= (0.0 if precision == "fp16" else 1e-3), errors


def test_experts_offloaded_in_bf16_stay_as_close_to_fp32_as_they_are_on_the_device():
    run = run_config(TOP1, "bf16", **{EP: (2,)})
    found, expected = (run_distributed(train, 2, r)[0][0] for r in (offloaded(run), run))
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=1e-6)
    assert found.losses[0] == expected.losses[0]
    assert found.losses[1] == pytest.approx(expected.losses[1], rel=1e-4)  # the norm's last digits turn some roundings
    assert strayed(found, TOP1) <= 1.1 * strayed(expected, TOP1)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_a_gradient_that_is_not_finite_on_one_process_skips_the_update_on_all(precision: str):
    run = run_config(TOP1, precision, **{EP: (2,)})
    for results in run_distributed(not_finite, 2, offloaded(run), eight_bit(run)):
        assert results == [(True, [], False, True, 2)] * 2


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, {EP: (2,)}),
        pytest.param(1, {}, marks=pytest.mark.exhaustive),
        pytest.param(4, {PP: 2, EP: (2,)}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_with_8_bit_moments_a_training_stays_close_to_the_exact_one(size: int, layout: dict):
    run = run_config(TOP1, **layout)
    found, _, name = run_distributed(train, size, eight_bit(run))[0]
    expected = reference(TOP1)
    assert name == "AdamW8bit"
    # the first update is computed from gradients alone: nothing is rounded yet
    assert found.losses[:2] == pytest.approx(expected.losses[:2], abs=1e-5)
    assert found.norms[:2] == pytest.approx(expected.norms[:2], rel=1e-4)
    assert 1e-4 < strayed(found, TOP1) < 0.02, "moments are rounded, and little is lost by it"


@pytest.mark.exhaustive
def test_8_bit_moments_in_bf16_stray_no_further_than_bf16_does():
    run = run_config(TOP1, "bf16", **{EP: (2,)})
    found, expected = (run_distributed(train, 2, r)[0][0] for r in (eight_bit(run), run))
    assert strayed(found, TOP1) <= 1.1 * strayed(expected, TOP1)


@pytest.mark.parametrize(
    ("saves", "resumes"),
    [(False, True), *(pytest.param(True, resumes, marks=pytest.mark.exhaustive) for resumes in (False, True))],
)
def test_a_checkpoint_goes_from_gpu_to_cpu_memory_and_back(tmp_path: Path, saves: bool, resumes: bool):
    run = run_config(TOP1, **{EP: (2,)})
    expected = run_distributed(save_then_go_on, 2, str(tmp_path / "plain"), run, True)[0]
    run_distributed(save_then_go_on, 2, str(tmp_path / "saved"), with_(run, optimizer_cpu_offload=saves), False)
    found = run_distributed(resume, 2, str(tmp_path / "saved"), with_(run, optimizer_cpu_offload=resumes))[0]
    compare_ended(found, expected, f"saved with offload {saves}, resumed with {resumes}")


def bf16_moments(run: RunConfig) -> RunConfig:
    return with_(run, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")


def test_a_resumed_run_rounds_bf16_moments_as_it_would_have(tmp_path: Path):
    run = bf16_moments(run_config(TOP1, "bf16", **{EP: (2,)}))
    expected = run_distributed(save_then_go_on, 2, str(tmp_path), run, True)[0]
    found = run_distributed(resume, 2, str(tmp_path), run)[0]
    for mine, theirs in zip(
        (found.trained.weights, *found[1:]), (expected.trained.weights, *expected[1:]), strict=True
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in found.exp_avg_sq.values())


def replicas(run: RunConfig) -> bool:
    """Raises an error if copies differ after all updates."""
    engine = build(run)
    updates(engine, 0, STEPS)
    engine.check_replicas()
    return True


@pytest.mark.parametrize(
    "layout", [{PP: 2, TP: 2}, pytest.param({EP: (2,), TP: 2, SP: True}, marks=pytest.mark.exhaustive)], ids=str
)
def test_copies_of_a_weight_round_bf16_moments_alike(layout: dict):
    """The token table is on the first and the last stage, norms and routers are on all tensor-parallel processes."""
    assert all(run_distributed(replicas, 4, bf16_moments(run_config(TOP1, "bf16", **layout))))


def load(folder: str, run: RunConfig) -> tuple[dict, dict, dict, int]:
    """Weights, moments and Adam's step after loading."""
    from megatron.checkpoint import load

    engine = build(run)
    with engine.loading() as tensors:
        scalars = load(folder, tensors)
    engine.load_scalar_state(scalars)
    weights, *moments = (whole(engine, prefix) for prefix in ("model.", "exp_avg.", "exp_avg_sq."))
    trained = updates(engine, 2, STEPS)
    assert all(bool(torch.isfinite(value).all()) for value in trained.weights.values())
    return weights, *moments, engine.scalar_state()["adam_step"]


def saving(folder: str, run: RunConfig) -> tuple[dict, dict, dict]:
    """Train, save in the background, and what was saved."""
    from megatron.checkpoint import AsyncSaver

    engine = build(run)
    updates(engine, 0, 2)
    saver = AsyncSaver()
    saver.save(folder, 2, engine.saved_tensors(), engine.scalar_state())
    saved = tuple(whole(engine, prefix) for prefix in ("model.", "exp_avg.", "exp_avg_sq."))
    updates(engine, 2, STEPS)  # while it is being written
    saver.wait()
    return saved


# What saves on 2 processes, and what loads that on how many: a change of the run, and its layout.
MOVES = {
    "8 bits to plain": (eight_bit, {EP: (2,)}, copy.deepcopy, {}, 1),
    "8 bits, tensor-parallel, to a pipeline": (eight_bit, {TP: 2}, eight_bit, {PP: 2}, 2),
    "offload to 8 bits": (offloaded, {EP: (2,)}, eight_bit, {EP: (4,)}, 4),
    "8 bits to offload, tensor-parallel": (eight_bit, {EP: (2,)}, offloaded, {TP: 2}, 2),
}
CORE_MOVES = ("8 bits to plain",)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.exhaustive), "bf16"])
@pytest.mark.parametrize("name", [marked(name, CORE_MOVES) for name in MOVES])
def test_8_bit_moments_are_saved_as_fp32_and_loaded_from_it(tmp_path: Path, name: str, precision: str):
    saver, saved_layout, loader, loaded_layout, size = MOVES[name]
    resumes = loader(run_config(TOP1, precision, **loaded_layout))
    saves = saver(run_config(TOP1, precision, **saved_layout))
    weights, *moments = run_distributed(saving, 2, str(tmp_path), saves)[0]
    loaded, *found, step = run_distributed(load, size, str(tmp_path), resumes)[0]
    assert step == STEPS
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    for mine, theirs in zip(found, moments, strict=True):
        assert mine.keys() == theirs.keys()
        encoded = resumes.optimizer.optimizer_name == "adamw8bit"
        largest = max(float(value.abs().max()) for value in theirs.values())
        errors = {key: float((mine[key] - value).abs().max()) for key, value in theirs.items()}
        assert all(error <= (largest / 64 if encoded else 0.0) for error in errors.values()), errors
        vectors = [key for key, value in theirs.items() if key.endswith("norm.bias") and value.any()]
        assert vectors
        assert all(errors[key] == 0 for key in vectors), "moments of norms are fp32 always"
