"""The benchmark of one MoE layer, at sizes that a CPU manages."""

import json
import time

import pytest

from benchmarks import moe_layer, peers

TINY = ["--sizes", "32x64", "--dtype", "fp32", "--device", "cpu", "--repeats", "2"]


@pytest.mark.parametrize("mode", ["capacity", "dropless"])
@pytest.mark.parametrize("topk", [1, 2])
def test_it_checks_measures_and_writes(topk, mode, tmp_path, capsys):
    file = tmp_path / "layer.json"
    settings = ["--mode", mode, "--topk", str(topk)]
    moe_layer.main([*TINY, "--experts", "4", "8", *settings, "--skip-peers", "--json", str(file)])
    out = json.loads(file.read_text())
    rows = out["rows"]
    assert (out["device"], out["dtype"], out["mode"], out["topk"]) == ("cpu", "fp32", mode, topk)
    assert [(row["layer"], row["experts"]) for row in rows] == [("dense", 1), ("ours", 4), ("ours", 8)]
    assert all(row["even_ms"] > 0 for row in rows)
    assert all(row["busiest"] > 1.2 for row in rows[1:])
    assert all(0 < row["dropped"] < 0.5 if mode == "capacity" else row["dropped"] == 0 for row in rows[1:])
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


def test_a_peer_that_hangs_is_cut_off(capsys, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "megatron", lambda shape: time.sleep(100))
    moe_layer.main([*TINY, "--experts", "4", "--peers", "megatron", "grouped_mm", "--peer-seconds", "1"])
    out = capsys.readouterr().out
    assert "megatron with 4 experts is left out: TimeoutError: took more than 1 s\n" in out
    assert "| sort + grouped_mm |" in out


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
