"""tools/plan_communication.py: the table, and what it says about a run that does not fit."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "plan_communication.py"
spec = importlib.util.spec_from_file_location("plan_communication", TOOL)
plan_communication = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_communication)

DOCUMENT = TOOL.parents[1] / "docs" / "scaling.md"


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_published_runs_are_the_table_of_the_documentation(capsys):
    assert plan_communication.main([]) == 0
    printed = capsys.readouterr().out
    assert len(rows(printed)) == 2 + 2 * 8
    assert printed in DOCUMENT.read_text(encoding="utf-8"), "print it anew and put it into docs/scaling.md"


def test_every_line_of_the_documentation_is_computed(capsys):
    """The other tables' lines come from the commands that stand above them."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("python tools/plan_communication.py --"):
            assert plan_communication.main(line.split()[2:]) == 0
            assert capsys.readouterr().out.splitlines()[-1] in text, line


def test_one_run_and_its_mistakes(capsys):
    flags = ["--world-size", "8", "--num-layers", "4", "--num-experts", "4", "8", "--moe-expert-parallel-size"]
    assert plan_communication.main([*flags, "2", "4"]) == 0
    (line,) = rows(capsys.readouterr().out)[2:]
    assert line[:4] == ["run", "8", "DP 8 EP 2, 4", "8 of 4"]
    assert plan_communication.main([*flags, "2", "16"]) == 2
    assert "16 must not exceed the number of processes, 8" in capsys.readouterr().err


def test_it_needs_both_sizes_to_be_numbers():
    with pytest.raises(SystemExit):
        plan_communication.main(["--world-size", "many"])
