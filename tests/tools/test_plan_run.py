"""tools/plan_run.py: what it prints of a run, of a search, of all scripts and of measured peaks."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron.config import flags
from megatron.config.validation import validate_numbers

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_run.py"
spec = importlib.util.spec_from_file_location("plan_run", TOOL)
plan_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_run)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_run_that_fits(capsys):
    words = ["--world-size", "64", "--gpu", "A100", "--price-per-gpu-hour", "2", "--model", "350M+MoE-128"]
    assert plan_run.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("350M+MoE-128 on 64 x NVIDIA A100-SXM4-80GB, 8 a node")
    for name in ("model", "experts", "schedule", "layout", "parameters", "memory", "speed", "time", "checkpoint"):
        assert f"\n  {name} " in printed
    assert "13.1B, 357M active" in printed


def test_a_plan_says_what_the_data_are(capsys, tmp_path):
    import tiny_run

    prefix, words = tiny_run.make_dataset(tmp_path), ["--world-size", "8", "--model", "125M", "--seq-length", "32"]
    assert plan_run.main([*words, "--train-data-path", str(prefix), "--valid-data-path", f"books={prefix}"]) == 0
    printed = capsys.readouterr().out
    assert f"\n  {prefix}" in printed
    assert f"\n  books: {prefix}" in printed
    assert plan_run.main([*words, "--data-path", str(prefix), "absent"]) == 0
    assert "data: not looked at, since there is no absent.idx, absent.bin\n" in capsys.readouterr().out
    assert plan_run.main([*words, "--data-path", str(prefix), "--valid-data-path", str(prefix)]) == 2


def test_the_vocabulary_of_bytes_is_their_own(capsys):
    def parameters(*words: str) -> str:
        assert plan_run.main(["--world-size", "8", "--model", "125M", *words]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  parameters"))

    assert parameters("--tokenizer-type", "ByteTokenizer") == parameters("--vocab-size", "257") != parameters()


def test_documents_kept_apart_need_attention_without_dropout(capsys):
    words = ["--world-size", "64", "--model", "350M+MoE-128", "--reset-attention-mask", "--reset-position-ids"]
    assert plan_run.main(words) == 2
    assert "--reset-attention-mask requires --attention-dropout 0" in capsys.readouterr().err
    assert plan_run.main([*words, "--eod-mask-loss", "--attention-dropout", "0"]) == 0


def test_a_run_that_does_not_fit_gets_the_nearest_layout_that_does(capsys):
    run = [
        "--model",
        "1.3B",
        "--global-batch-size",
        "256",
        "--rampup-batch-size",
        "none",
        "--no-checkpoint-activations",
    ]
    run += ["--tensor-model-parallel-size", "1", "--micro-batch-size", "32", "--train-tokens", "1B"]
    assert plan_run.main(["--world-size", "8", *run]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    other = printed.splitlines()[-1].split()
    validate_numbers(flags.parse_args([*run, *other]), 8)
    assert plan_run.main(["--world-size", "8", *run, *other]) == 0


def test_no_layout_fits(capsys):
    assert plan_run.main(["--world-size", "1", "--model", "6.7B", "--rampup-batch-size", "none",
                          "--tensor-model-parallel-size", "1"]) == 1  # fmt: skip
    assert "No layout of this run fits" in capsys.readouterr().out


def test_the_search_ranks_by_speed(capsys):
    words = ["--world-size", "8", "--gpu", "H100", "--model", "350M", "--global-batch-size", "32", "--search"]
    assert plan_run.main([*words, "--top", "4"]) == 0
    printed = capsys.readouterr().out
    header, _, *found = rows(printed)
    assert len(found) == 4
    days = [float(line[header.index("days")]) for line in found]
    assert days == sorted(days)
    assert days[0] > 0
    flags_of_first = next(line for line in printed.splitlines() if line.startswith("1. ")).split()[1:]
    validate_numbers(flags.parse_args(["--model", "350M", "--global-batch-size", "32", *flags_of_first]), 8)


def test_all_scripts_in_one_table(capsys):
    assert plan_run.main(["--all-scripts", "--price-per-gpu-hour", "1.5"]) == 0
    header, _, *lines = rows(capsys.readouterr().out)
    assert [line[0] for line in lines] == [
        *("125M_dense", "125M_MoE64", "350M_dense", "350M_MoE128"),
        *("1.3B_dense", "1.3B_MoE128", "6.7B_dense", "6.7B_MoE128"),
    ]
    assert all(len(line) == len(header) for line in lines)
    assert {line[header.index("fits")] for line in lines} == {"yes"}
    hours, cost = (float(lines[0][header.index(name)].replace(",", "")) for name in ("GPU-hours", "cost"))
    assert cost == pytest.approx(1.5 * hours, abs=1)


def test_the_documentation_shows_that_table(capsys):
    assert plan_run.main(["--all-scripts"]) == 0
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, "print it anew and put it into docs/planning.md"


def test_measured_peaks_beside_planned_ones(capsys, tmp_path):
    assert plan_run.main(["--compare"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    content = {"rows": [{"run": "350M:16 ours", "memory_gb": 34.42}], "precision": "bf16"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert plan_run.main(["--compare", str(tmp_path / "a.json")]) == 0
    assert rows(capsys.readouterr().out)[2] == ["350M:16", "precision bf16", "34.4", "34.4", "1.00"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "350M", "--gpu", "H1000"], "the nearest is 'H100'"),
        (["--model", "350M+MoE-128", "--world-size", "8"], "64 must not exceed the number of processes, 8"),
        (["--model", "350M", "--gpu", "V100"], "is not known; plan for another GPU or precision"),
        (["--compare", "/no/such/file.json"], "file.json cannot be read: No such file or directory; give what"),
        (["--compare", "/dev/null"], "/dev/null: got no JSON"),
    ],
)
def test_mistakes(capsys, words, said):
    assert plan_run.main(words) == 2
    assert said in capsys.readouterr().err


def test_flags_that_do_not_belong_together():
    with pytest.raises(SystemExit):
        plan_run.main(["--all-scripts", "--model", "350M"])
    with pytest.raises(SystemExit):
        plan_run.main(["--world-size", "0", "--model", "350M"])


@pytest.mark.parametrize("price", ["nan", "inf", "-2", "free"])
def test_a_price_is_a_number_above_0(capsys, price):
    with pytest.raises(SystemExit):
        plan_run.main(["--price-per-gpu-hour", price, "--model", "350M"])
    assert "--price-per-gpu-hour: " in capsys.readouterr().err
