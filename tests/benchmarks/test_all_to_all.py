"""The benchmark runs on CPUs, checks before it times, and writes what it prints."""

import json

import pytest
import torch
from distributed.spawn import run_distributed

from benchmarks.all_to_all import compare, parse_args, run

TINY = "--hidden-size 16 --tokens 24 --experts 4 --dtype fp32 --warm-up 0 --repeats 1"


def benchmark(folder: str, *words: str) -> None:
    run(parse_args([*TINY.split(), *words, "--json", f"{folder}/out.json"]), torch.device("cpu"))


@pytest.mark.distributed
def test_every_form_of_the_exchange_is_timed(tmp_path):
    run_distributed(benchmark, 4, str(tmp_path), "--ranks-per-node", "2", "--chunks", "1", "2")
    out = json.loads((tmp_path / "out.json").read_text())
    assert [(row["by_node"], row["chunks"]) for row in out["rows"]] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(row["layer_ms"] > 0 and row["exchange_gb_per_s"] > 0 for row in out["rows"])
    assert out["rows"][0]["ratio"] == 1
    assert (out["processes"], out["hidden_size"], out["dtype"]) == (4, 16, "fp32")


def test_it_does_not_time_what_is_wrong():
    right = {"output": torch.ones(3)}
    compare({"output": torch.ones(3)}, right, 0.0)
    for wrong in (1.5, float("nan")):
        with pytest.raises(AssertionError, match="output"):
            compare({"output": torch.tensor([1.0, wrong, 1.0])}, right, 1e-3)
