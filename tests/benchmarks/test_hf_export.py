"""The benchmark of exported models, at a size for tests."""

import json

from benchmarks import hf_export

SMALL = "--device cpu --dtype fp32 --hidden-size 64 --layers 2 --experts 4 --prompt 8 --new 2 --repeats 1 --batches 1 2"


def test_it_checks_measures_and_writes(tmp_path, capsys):
    hf_export.main([*SMALL.split(), "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["experts"], row["batch"]) for row in rows] == [(e, b) for e in ("eager", "grouped_mm") for b in (1, 2)]
    assert all(row["prompt_tokens_per_s"] > 0 for row in rows)
    assert "| grouped_mm | 2 |" in capsys.readouterr().out
