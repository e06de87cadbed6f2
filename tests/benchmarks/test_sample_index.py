"""One process builds the index, the others wait for it; a cache is used, and a damaged one is rebuilt."""

import json

import pytest

from benchmarks import sample_index


@pytest.mark.distributed
@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_it_measures_three_launches(tmp_path, capsys, processes):
    out = tmp_path / "out.json"
    sample_index.main(["--documents", "2K", "--processes", processes, "--folder", str(tmp_path), "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["cache"], row["built"]) for row in rows] == [("none", 1), ("whole", 0), ("damaged", 1)]
    assert len({row["index_bytes"] for row in rows}) == 1
    assert "| damaged |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
