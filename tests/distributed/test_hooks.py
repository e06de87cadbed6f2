"""A hook that a user adds has its state in checkpoints, and gets it back."""

import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from distributed.trainers import Death

from megatron.checkpoint import latest, read_meta

pytestmark = pytest.mark.distributed


def states(folder: Path) -> dict[str, Any]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_meta(checkpoint)["hooks"]


def history(folder: Path) -> dict[str, float]:
    return states(folder)["LossHistory"]["losses"]


def test_the_state_of_a_hook_survives_a_kill(server, corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = server.start(1, tiny_run.flags(corpus, save=whole), hooks=["LossHistory"])
    assert job.wait() == [0], job.output()
    logged = {str(record["step"]): record["loss"] for record in tiny_run.records(whole, "train")}
    assert history(whole) == logged
    assert len(logged) == 8

    arguments = tiny_run.flags(corpus, save=killed, load=killed)
    job = server.start(1, arguments, Death(rank=0, phase="step", call=6), hooks=["LossHistory"])
    assert job.wait() == [-signal.SIGKILL], job.output()
    assert list(history(killed)) == ["1", "2", "3"]
    job = server.start(1, arguments, hooks=["LossHistory"])
    assert job.wait() == [0], job.output()
    assert history(killed) == logged
    assert states(killed) == states(whole)
    assert "instability" in states(whole)
