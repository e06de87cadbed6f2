"""What a run leaves out of its data."""

import pytest

from megatron.config import RunConfig
from megatron.config.data import DataConfig
from megatron.training.clock import Step
from megatron.training.skipped_data import SkippedData


def update(number: int) -> Step:
    return Step(number, 16 * (number - 1), 16 * number)


def test_spans_are_of_the_data_and_not_of_what_was_trained_on():
    skipped = SkippedData([(16, 32), (64, 96)])
    assert skipped.span_of(update(1), update(1)) == (0, 16)
    assert skipped.span_of(update(2), update(3)) == (
        32,
        64,
    )  # trained samples 16 to 47 are samples 32 to 63 of the data
    assert skipped.span_of(update(3), update(5)) == (48, 128)


def config(*spans: str) -> RunConfig:
    return RunConfig(data=DataConfig(skip_samples=spans))


def test_a_resumed_run_leaves_out_what_it_did_and_what_is_new_and_still_to_come():
    meta = {"detours": {"skipped": [[16, 32]], "restarts": 2}}
    assert SkippedData.of(config(), None, 0) == SkippedData([], 0)
    assert SkippedData.of(config(), {}, 64) == SkippedData([], 0), "a checkpoint from before there were any"
    assert SkippedData.of(config(), meta, 64) == SkippedData([(16, 32)], 2)
    assert SkippedData.of(config("16-32", "80-96"), meta, 64) == SkippedData([(16, 32), (80, 96)], 2)
    with pytest.raises(ValueError, match="read its data up to sample 80"):
        SkippedData.of(config("79-96"), meta, 64)


def test_a_restart_leaves_out_one_span_more():
    skipped = SkippedData([(16, 32)])
    skipped.restart_without((32, 64))
    assert skipped.state() == {"skipped": [[16, 64]], "restarts": 1}
    assert SkippedData.of(config(), {"detours": skipped.state()}, 0) == skipped
