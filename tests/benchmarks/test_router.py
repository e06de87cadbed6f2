"""The benchmark of the router, with the kernels in Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def benchmark(*words: str) -> str:
    """In a process of its own: Triton must be told of the interpreter before kernels are defined."""
    on_gpu = torch.cuda.is_available()
    environment = os.environ if on_gpu else os.environ | {"TRITON_INTERPRET": "1"}
    device = [] if on_gpu else ["--device", "cpu"]
    command = [sys.executable, "-m", "benchmarks.router", "--dtype", "fp32", "--repeats", "2", *device, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_checks_measures_and_writes(tmp_path):
    file = tmp_path / "router.json"
    shown = benchmark("--tokens", "64", "--hidden-size", "32", "--experts", "4", "8", "--json", str(file))
    out = json.loads(file.read_text())
    ours = ["ours", "ours, quantile balancing"]
    names = [*ours, "plain torch, [T, E] masks", "gate product alone", "tokens read once", "DeepSpeed, forward"]
    assert [(row["router"], row["experts"]) for row in out["rows"]] == [(name, e) for e in (4, 8) for name in names]
    assert all(row["forward_ms"] > 0 for row in out["rows"])
    assert [row["both_ms"] is not None for row in out["rows"][:6]] == [True, True, True, False, False, False]
    assert out["dtype"] == "fp32"
    assert shown.count("| ours | 64 | 32 |") == 2
