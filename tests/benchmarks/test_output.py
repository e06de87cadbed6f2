"""What the benchmarks share: arguments, table, JSON."""

import dataclasses
import importlib
import json

import pytest

from benchmarks import output


@dataclasses.dataclass
class Row:
    name: str
    ms: float


def test_table_and_json(tmp_path):
    assert output.markdown("<name | ms", [["a", output.number(1234.567, 1)], ["b", output.number(None, 1)]]) == (
        "| name | ms |\n|---|---:|\n| a | 1,234.6 |\n| b |  |"
    )
    output.write_json(tmp_path / "out.json", "cpu", [Row("a", 1.25)], dtype="fp32")
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["device"], out["dtype"], out["rows"]) == ("cpu", "fp32", [{"name": "a", "ms": 1.25}])
    output.write_json(None, "cpu", [])


def test_an_error_is_one_short_line():
    assert output.one_line(ValueError("a\n   b")) == "ValueError: a b"
    assert output.one_line(KeyError()) == "KeyError"
    assert len(output.one_line(ValueError("x" * 9999))) < 400


@pytest.mark.parametrize(
    "name", ["moe_layer", "router", "train_step", "all_to_all", "preprocess", "zero_shot", "checkpoint_memory"]
)
def test_help_teaches(name, capsys):
    if name == "router":
        pytest.importorskip("triton")
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert f"-m benchmarks.{name}" in shown  # a command to copy
    assert module.__doc__.splitlines()[-1] in shown  # all of the docstring
    assert "--json FILE" in shown
