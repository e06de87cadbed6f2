"""The benchmark of one MoE layer, at sizes that a CPU manages."""

import json

import pytest

from benchmarks import moe_layer


@pytest.mark.parametrize("mode", ["capacity", "dropless"])
@pytest.mark.parametrize("topk", [1, 2])
def test_it_checks_measures_and_writes(topk, mode, tmp_path, capsys):
    file = tmp_path / "layer.json"
    sizes = ["--sizes", "32x64", "--experts", "4", "8", "--dtype", "fp32", "--device", "cpu", "--repeats", "2"]
    settings = ["--mode", mode, "--topk", str(topk)]
    moe_layer.main([*sizes, *settings, "--skip-peers", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["layer"], row["experts"]) for row in rows] == [("dense", 1), ("ours", 4), ("ours", 8)]
    assert all(row["even_ms"] > 0 for row in rows)
    assert all((row["dropped"] is None) == (mode == "dropless") for row in rows[1:])
    assert capsys.readouterr().out.count("| ours | 32 | 64 |") == 2


@pytest.mark.parametrize("part", ["forward", "forward_sorted"])
@pytest.mark.parametrize("topk", [1, 2])
def test_a_wrong_layer_is_not_timed(topk, part, monkeypatch):
    mode = "capacity" if part == "forward" else "dropless"
    args = moe_layer.parse_args(["--dtype", "fp32", "--device", "cpu", "--mode", mode, "--topk", str(topk)])
    layer = moe_layer.make_layer(32, 4, args)
    moe_layer.check(layer, 32, 64, args)
    right = getattr(layer.experts, part)
    monkeypatch.setattr(layer.experts, part, lambda *rows: right(*rows) * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        moe_layer.check(layer, 32, 64, args)
