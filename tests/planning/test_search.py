"""The search: every layout is valid and fits, the first is the fastest, the nearest changes least."""

import pytest

from megatron.config import flags
from megatron.config.errors import ConfigError
from megatron.config.validation import validate_numbers
from megatron.planning import search
from megatron.planning.devices import find_device
from megatron.planning.measured import VOCAB, run_of
from megatron.planning.plan import Machine, make_plan
from megatron.planning.search import fitting, flags_of, layouts, nearest

A100 = find_device("A100")
RUN = run_of("350M+8:4", global_batch_size=32, train_tokens=10**9)


def test_layouts_are_all_valid_and_different():
    found = list(layouts(RUN, 8, 8))
    for run in found:
        validate_numbers(run, 8)
    assert len({flags_of(run) for run in found}) == len(found) > 100
    degrees = {run.parallel.moe_expert_parallel_size for run in found}
    assert degrees == {(1,), (2,), (4,), (8,)}
    assert {run.parallel.tensor_model_parallel_size for run in found} == {1, 2, 4, 8}
    assert {run.training.checkpoint_activations for run in found} == {False, True}


def test_tensor_parallelism_stays_in_a_node():
    assert {run.parallel.tensor_model_parallel_size for run in layouts(RUN, 8, 2)} == {1, 2}


def test_a_ramp_that_does_not_fit_is_left_out():
    run = run_of("1.3B:2", global_batch_size=512, rampup_batch_size=(32, 32, 1000), train_tokens=10**10)
    ramps = {(r.parallel.data_parallel_size(64), r.training.micro_batch_size): r.training.rampup_batch_size
             for r in layouts(run, 64, 8)}  # fmt: skip
    assert ramps[16, 2] == (32, 32, 1000)
    assert ramps[64, 1] is None


def test_the_fastest_comes_first_and_all_fit():
    run = run_of("1.3B+8:4", global_batch_size=32, train_tokens=10**9)
    plans = fitting(run, Machine(8, 8, find_device("RTX4090")), VOCAB).plans
    seconds = [plan.step.seconds for plan in plans]
    assert seconds == sorted(seconds)
    assert all(plan.fits for plan in plans)
    assert 0 < len(plans) < len(list(layouts(run, 8, 8)))  # some do not fit


def test_the_nearest_layout_that_fits():
    """24 x 32 x 2048 x 2048 x 32 bytes of activations fit into no A100: the nearest change is one of these two."""
    run = run_of("1.3B:32", global_batch_size=256, train_tokens=10**10)
    plan = make_plan(run, Machine(8, 8, A100), VOCAB)
    assert not plan.fits
    found = nearest(run, fitting(run, plan.machine, VOCAB))
    assert found.fits
    assert found.config.parallel == run.parallel
    changed = (found.config.training.micro_batch_size, found.config.training.checkpoint_activations)
    assert changed in ((32, True), (16, False))


def test_nothing_fits():
    run = run_of("6.7B:1", train_tokens=10**10)
    plan = make_plan(run, Machine(1, 1, A100), VOCAB)
    assert not plan.fits
    assert nearest(run, fitting(run, plan.machine, VOCAB)) is None


def test_the_runs_own_layout_does_not_matter():
    run = run_of(
        "1.3B:1", global_batch_size=48, tensor_model_parallel_size=8, sequence_parallel=True, train_tokens=10**9
    )
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 8 x"):
        validate_numbers(run, 3)
    plans = fitting(run, Machine(3, 3, A100), VOCAB).plans
    assert {plan.config.parallel.pipeline_model_parallel_size for plan in plans} == {1, 3}


@pytest.mark.parametrize(
    ("changes", "world", "said"),
    [
        ({"num_layers": 0, "expert_interval": 0}, 8, "--num-layers 0 must be at least 1"),
        ({"moe_hierarchical_all_to_all": True, "lr": -1.0}, 8, "--lr -1.0 must be above 0"),
        ({"num_layers": 2}, 5, "must be a multiple of --micro-batch-size 4 x 5 processes"),
    ],
)
def test_a_run_that_is_wrong_in_every_layout_is_an_error_with_the_reason(changes, world, said):
    run = run_of("350M+8:4", global_batch_size=32, train_tokens=10**9, **changes)
    with pytest.raises(ConfigError, match=said):
        fitting(run, Machine(world, world, A100), VOCAB)


def test_a_search_that_takes_too_long_reports_how_much_it_has_seen(monkeypatch):
    whole = fitting(RUN, Machine(8, 8, A100), VOCAB)
    assert whole.in_words == f"{len(list(layouts(RUN, 8, 8)))} layouts"
    monkeypatch.setattr(search, "SECONDS", 0.0)
    part = fitting(RUN, Machine(8, 8, A100), VOCAB)
    assert part.in_words == f"1 layouts, taken at random from {whole.layouts} because there was no time for more"


def test_the_flags_give_the_layout_again():
    base = ["--model", "350M+MoE-128", "--train-tokens", "1B", "--global-batch-size", "64"]
    run = flags.parse_args(base)
    for other in list(layouts(run, 8, 8))[::17]:
        again = flags.parse_args([*base, *flags_of(other).split()])
        assert (again.training, again.parallel.moe_expert_parallel_size) == (
            other.training, other.parallel.moe_expert_parallel_size,
        )  # fmt: skip
        assert again.parallel.sequence_parallel == other.parallel.sequence_parallel


def test_an_unknown_device_cannot_be_searched_for():
    with pytest.raises(ConfigError, match="name one with --gpu"):
        fitting(RUN, Machine(8, 8), VOCAB)
