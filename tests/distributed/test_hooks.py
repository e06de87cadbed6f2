"""A hook that a user adds has its state in checkpoints, and gets it back."""

from pathlib import Path

import pytest
import tiny_run
from distributed.trainers import Death

from megatron.checkpoint import latest, read_meta

pytestmark = pytest.mark.distributed


def history(folder: Path) -> dict[str, float]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_meta(checkpoint)["hooks"]["LossHistory"]["losses"]


def test_the_state_of_a_hook_survives_a_kill(server, corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = server.start(2, tiny_run.flags(corpus, save=whole), hooks=["LossHistory"])
    assert job.wait() == [0, 0], job.output()
    logged = {str(record["step"]): record["loss"] for record in tiny_run.records(whole, "train")}
    assert history(whole) == logged
    assert len(logged) == 8

    arguments = tiny_run.flags(corpus, save=killed, load=killed)
    job = server.start(2, arguments, Death(rank=1, phase="step", call=6), hooks=["LossHistory"])
    assert 0 not in job.wait(), job.output()
    assert list(history(killed)) == ["1", "2", "3"]
    job = server.start(2, arguments, hooks=["LossHistory"])
    assert job.wait() == [0, 0], job.output()
    assert history(killed) == logged

    job = server.start(2, tiny_run.flags(corpus, save=tmp_path / "without", load=killed, train_tokens=16 * 32 * 9))
    assert job.wait() == [0, 0], job.output()
    assert "warning: the checkpoint has the state of a hook LossHistory, which this run lacks" in job.output(0)
