"""A disk that fills up costs checkpoints, not the run: training goes on, and earlier checkpoints stay as they are."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run

from megatron.checkpoint import latest

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which only root can"),
]
FLAGS = {"num_experts": 4, "moe_expert_parallel_size": 2, "save_interval": 2, "train_tokens": 24 * 16 * tiny_run.SEQ}


@pytest.fixture(scope="module")
def on_a_large_disk(server, corpus, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("large")
    job = server.start(2, tiny_run.flags(corpus, save=save, **FLAGS))
    assert job.wait() == [0, 0], job.output()
    return save


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of ``size`` bytes on ``folder``."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", folder], check=False)
    if mount.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)


@pytest.mark.parametrize(
    "in_background", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["synchronous", "asynchronous"]
)
def test_a_run_outlives_a_full_disk(server, corpus, on_a_large_disk, tmp_path, in_background):
    checkpoint = sum(file.stat().st_size for file in (on_a_large_disk / "step_00000002").iterdir())
    save = tmp_path / "small"
    arguments = tiny_run.flags(corpus, save=save, load=save, async_save=in_background, **FLAGS)
    with small_disk(save, int(1.5 * checkpoint)):
        full = server.start(2, [*arguments, "--exit-tokens", str(8 * 16 * tiny_run.SEQ)])
        assert full.wait() == [1, 1], full.output()
        assert full.output(0).count("NOT SAVED: the checkpoint of step") == 3
        assert "error on rank 0: the checkpoint of step 8 was not saved" in full.output(0)
        assert "No space left on device" in full.output(0)
        assert latest(save) == save / "step_00000002"

        again = server.start(2, arguments)
        server.listen_until(lambda: "NOT SAVED" in again.output(0))
        enlarge(save)
        assert again.wait() == [0, 0], again.output()
        assert "resuming at 1.02k tokens" in again.output(0)
        assert tiny_run.curve(save) == tiny_run.curve(on_a_large_disk)
        assert tiny_run.records(save, "stop")[-1]["step"] == 24
        assert (save / "latest").read_text().strip() == "step_00000024"
        assert not [path for path in save.iterdir() if path.name.startswith(".step")]
