"""The picture of the layer benchmark."""

import json

import pytest

from benchmarks import plot


def content() -> dict:
    rows = [{"layer": "dense", "hidden": 8, "tokens": 4, "experts": 1, "even_ms": 1.0, "skewed_ms": None}]
    for experts in (2, 4):
        rows.append({**rows[0], "layer": "ours", "experts": experts, "even_ms": 2.0, "skewed_ms": 2.5})
    rows.append({**rows[0], "layer": "a peer", "experts": 4, "even_ms": 3.0, "skewed_ms": 2.9})  # failed with 2
    return {"device": "cpu", "torch": "2", "dtype": "fp32", "rows": rows}


def test_it_draws(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "layer.json").write_text(json.dumps(content()))
    plot.main([str(tmp_path / "layer.json"), "--out", str(tmp_path / "layer.svg")])
    picture = (tmp_path / "layer.svg").read_text()
    assert all(f"<!-- {label} -->" in picture for label in ("ours", "a peer", "2 experts", "4 experts"))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "router.json").write_text(json.dumps({"rows": [{"router": "ours"}]}))
    with pytest.raises(SystemExit, match=r"expected the JSON of benchmarks\.moe_layer"):
        plot.main([str(tmp_path / "router.json"), "--out", str(tmp_path / "out.png")])
