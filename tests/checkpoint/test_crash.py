"""A save may be killed at any moment: what was complete before stays loadable, and the next save puts all in order."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import Box, ShardedTensor, latest, load, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HERE = Path(__file__).parent


def crash(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, HERE / "crashing.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )


def load_value(folder: Path, numel: int) -> float:
    tensor = torch.full((numel,), -1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the newest complete checkpoint")
        meta = load(folder, [ShardedTensor("w", (numel,), torch.float32, [Box((0,), tensor)])])
    assert (tensor == meta["value"]).all()
    return meta["value"]


def check_next_save(folder: Path, numel: int) -> None:
    save(
        folder, 9, [ShardedTensor("w", (numel,), torch.float32, [Box((0,), torch.full((numel,), 9.0))])], {"value": 9.0}
    )
    assert load_value(folder, numel) == 9.0
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not left, "the next save removes what the crashed one left over"
    for path in folder.glob("step_*"):
        load_value(path, numel)


@pytest.mark.slow
def test_killed_between_any_two_steps(tmp_path):
    crash("steps", tmp_path)
    outcomes: dict[str, list[float | None]] = {}
    for folder in sorted(tmp_path.iterdir()):
        scenario = folder.name.partition("-")[0]
        found = None
        if scenario != "first" or any(folder.glob("step_*")):
            found = load_value(folder, 1000)
        else:
            assert latest(folder) is None
        outcomes.setdefault(scenario, []).append(found)
        check_next_save(folder, 1000)
    # first as before the save, from some step on as after it, and never back
    for scenario, before in (("new", 2.0), ("again", 2.0), ("first", None)):
        found = outcomes[scenario]
        changed = found.index(3.0)
        assert changed >= 7, "folder, data, index, meta, manifest, and the change of names"
        assert found == [before] * changed + [3.0] * (len(found) - changed)


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    crash("times", tmp_path, "15")
    values = []
    for folder in sorted(tmp_path.iterdir()):
        values.append(load_value(folder, 300_000))
        check_next_save(folder, 300_000)
    assert len(values) == 15
    assert max(values) > 2, "some saves were completed before the kill"
