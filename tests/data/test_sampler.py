"""The order of samples does not depend on ranks, on batch sizes, or on where a run was stopped."""

import pytest

from megatron.data.errors import DataError
from megatron.data.sampler import MicroBatchSampler


def order(num_samples, mbs, dp, consumed=0, steps=None):
    """Samples in the order of the run; ``steps`` are global batch sizes, by default one for all that is there."""
    ranks = [iter(MicroBatchSampler(num_samples, mbs, rank, dp, consumed)) for rank in range(dp)]
    steps = steps or [(num_samples - consumed) // (mbs * dp) * mbs * dp]
    seen = []
    for size in steps:
        share = size // (mbs * dp)
        shares = [[next(rank) for _ in range(share)] for rank in ranks]
        seen += [sample for number in range(share) for rank in shares for sample in rank[number]]
    return seen


@pytest.mark.parametrize("mbs", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_all_layouts_cover_the_same_samples_in_order(mbs, dp):
    assert order(64, mbs, dp) == list(range(64))


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 2)), ((2, 1), (2, 4)), ((1, 4), (4, 2)), ((3, 2), (2, 2))])
def test_resume_anywhere_in_any_layout(before, after):
    for consumed in range(0, 48, before[0] * before[1]):
        first = order(48, *before, steps=[consumed]) if consumed else []
        rest = order(48, *after, consumed=consumed)
        assert first + rest == list(range(consumed + (48 - consumed) // (after[0] * after[1]) * after[0] * after[1]))


def test_a_ramp_up_changes_only_where_updates_end():
    assert order(96, 2, 2, steps=[4, 4, 8, 16, 32, 32]) == list(range(96))
    assert order(96, 2, 2, consumed=16, steps=[16, 32, 32]) == list(range(16, 96))


def test_ranks_yield_equally_often():
    samplers = [MicroBatchSampler(23, 2, rank, 3) for rank in range(3)]
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers] == [3, 3, 3]


def test_nothing_is_left_after_the_end():
    assert list(MicroBatchSampler(10, 2, 0, 1, consumed_samples=10)) == []
    assert list(MicroBatchSampler(10, 2, 0, 1, consumed_samples=12)) == []


@pytest.mark.parametrize("arguments", [(10, 0, 0, 1), (10, 1, 1, 1), (10, 1, -1, 2), (10, 1, 0, 1, -1)])
def test_numbers_out_of_range(arguments):
    with pytest.raises(DataError):
        MicroBatchSampler(*arguments)
