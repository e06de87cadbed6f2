"""The benchmark of one MoE layer, at sizes that a CPU manages."""

import json

import pytest
import torch

from benchmarks import moe_layer


def test_it_checks_measures_and_writes(tmp_path, capsys):
    file = tmp_path / "layer.json"
    sizes = ["--sizes", "32x64", "--experts", "4", "8", "--dtype", "fp32", "--device", "cpu", "--repeats", "2"]
    moe_layer.main([*sizes, "--skip-peers", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["layer"], row["experts"]) for row in rows] == [("dense", 1), ("ours", 4), ("ours", 8)]
    assert all(row["even_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| ours | 32 | 64 |") == 2


def test_a_wrong_layer_is_not_timed(monkeypatch):
    layer = moe_layer.make_layer(32, 4, "cpu", torch.float32)
    monkeypatch.setattr(layer.experts, "b2", torch.nn.Parameter(layer.experts.b2 + 1))
    args = moe_layer.parse_args(["--dtype", "fp32", "--device", "cpu"])
    forward = layer.experts.forward
    monkeypatch.setattr(layer.experts, "forward", lambda x: forward(x) * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        moe_layer.check(layer, 32, 64, args)
