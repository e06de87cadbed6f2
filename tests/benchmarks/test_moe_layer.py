"""The benchmark of one MoE layer, at sizes that a CPU manages."""

import json

import pytest
import torch

from benchmarks import moe_layer, peers

TINY = ["--sizes", "32x64", "--dtype", "fp32", "--device", "cpu", "--repeats", "2"]


def test_it_checks_measures_and_writes(tmp_path, capsys):
    file = tmp_path / "layer.json"
    moe_layer.main([*TINY, "--experts", "4", "8", "--skip-peers", "--json", str(file)])
    out = json.loads(file.read_text())
    rows = out["rows"]
    assert (out["device"], out["dtype"]) == ("cpu", "fp32")
    assert [(row["layer"], row["experts"]) for row in rows] == [("dense", 1), ("ours", 4), ("ours", 8)]
    assert all(row["even_ms"] > 0 for row in rows)
    assert all(row["busiest"] > 1.2 and 0 < row["dropped"] < 0.5 for row in rows[1:])
    assert capsys.readouterr().out.count("| ours | 32 | 64 |") == 2


def test_peers_are_compared_with_ours_and_what_fails_is_said(tmp_path, capsys, monkeypatch):
    def broken(shape: peers.Shape) -> peers.Peer:
        raise RuntimeError("no\n  luck")

    monkeypatch.setitem(peers.PEERS, "megatron", broken)
    file = tmp_path / "layer.json"
    moe_layer.main([*TINY, "--experts", "4", "--peers", "megatron", "grouped_mm", "--json", str(file)])
    dense, ours, peer = json.loads(file.read_text())["rows"]
    assert (dense["layer"], ours["layer"], peer["layer"]) == ("dense", "ours", "sort + grouped_mm")
    assert peer["over_ours_even"] == pytest.approx(peer["even_ms"] / ours["even_ms"])
    assert peer["over_ours_skewed"] == pytest.approx(peer["skewed_ms"] / ours["skewed_ms"])
    assert peer["dropped"] == 0 < ours["dropped"]
    assert "megatron with 4 experts is left out: RuntimeError: no luck\n" in capsys.readouterr().out


def test_a_wrong_layer_is_not_timed(monkeypatch):
    layer = moe_layer.make_layer(32, 4, "cpu", torch.float32)
    monkeypatch.setattr(layer.experts, "b2", torch.nn.Parameter(layer.experts.b2 + 1))
    args = moe_layer.parse_args(["--dtype", "fp32", "--device", "cpu"])
    forward = layer.experts.forward
    monkeypatch.setattr(layer.experts, "forward", lambda x: forward(x) * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        moe_layer.check(layer, 32, 64, args)
