"""Preflight on real GPUs: sensible speeds, and what is wrong with one of them."""

import re

import pytest
import tiny_run
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_speeds_are_those_of_a_gpu_and_nothing_is_wrong(tmp_path):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    arguments = tiny_run.flags(
        tmp_path, save=tmp_path / "save", device="cuda", fp32=False, bf16=True, preflight_only=True
    )
    count = min(torch.cuda.device_count(), 2)
    done = tiny_run.train(count, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("  0 "))
    speeds = re.split(r"\s{2,}", row.strip())[4:7]
    assert float(speeds[0]) > 50, row
    if count > 1:
        assert float(speeds[1]) > 5, row
        assert float(speeds[2]) > 5, row


def test_memory_that_is_taken_is_told(tmp_path):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    taken = torch.empty(int(0.2 * torch.cuda.get_device_properties(0).total_memory), dtype=torch.uint8, device="cuda")
    arguments = tiny_run.flags(
        tmp_path, save=tmp_path / "save", device="cuda", fp32=False, bf16=True, preflight_only=True
    )
    done = tiny_run.train(1, arguments)
    del taken
    assert done.returncode == 1
    assert "broken: rank 0 (host" in done.stdout
    assert "GB are in use before the run" in done.stdout
