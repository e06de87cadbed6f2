"""What a run says of the checkpoint that it starts from."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.checkpoint import CheckpointStatus
from megatron.checkpoint.folder import begin, commit
from megatron.training.announce import warnings_of
from megatron.training.clock import Clock
from megatron.training.hooks import Hook
from megatron.training.start import Checkpoint
from megatron.training.starting_point import StartingPoint


class LossHistory(Hook):
    """As a user writes it."""


def warnings(start: StartingPoint, *hooks: Hook) -> list[str]:
    run: Any = SimpleNamespace(start=start, hooks=hooks)
    return warnings_of(run)


@pytest.mark.parametrize("status", [CheckpointStatus.CONFIRMED, CheckpointStatus.DOUBTED])
def test_a_checkpoint_in_doubt_is_a_warning(tmp_path, status):
    begin(tmp_path, 1)
    source = Checkpoint(commit(tmp_path, 1, {}, status), {})
    for start in (StartingPoint(32, Clock(16), resumed=source), StartingPoint(32, Clock(16), base=source)):
        expected = ["step_00000001 is in doubt: updates that were not good have followed it"]
        assert warnings(start) == (expected if status is CheckpointStatus.DOUBTED else [])


def test_differences_are_warnings(tmp_path):
    start = StartingPoint(32, Clock(16), differences=["--lr: checkpoint 1, this run 2"])
    assert warnings(start) == ["this run differs from the checkpoint's: --lr: checkpoint 1, this run 2"]


def test_the_state_of_a_hook_that_is_missing_is_a_warning(tmp_path):
    source = Checkpoint(tmp_path / "step_00000001", {"hooks": {"LossHistory": {"losses": {}}}})
    start = StartingPoint(32, Clock(16), resumed=source)
    assert warnings(start) == ["the checkpoint has the state of a hook LossHistory, which this run lacks"]
    assert warnings(start, LossHistory()) == []
