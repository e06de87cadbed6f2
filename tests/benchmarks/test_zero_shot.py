"""The comparison of zero-shot evaluations: what is the same, and what is not."""

import copy
import json

import pytest
import saved_model
from zero_shot_data import write_data

from benchmarks import zero_shot
from megatron.config import ModelConfig


def results() -> dict:
    """lm-eval's, of a task with log-likelihoods and one with texts."""
    samples = {
        "piqa": [{"doc_id": n, "resps": [[(-3.25, False)], [(-1.5, True)]]} for n in range(2)],
        "triviaqa": [{"doc_id": 0, "resps": [["a text"]]}],
    }
    scores = {
        "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "perplexity,none": 100.0},
        "triviaqa": {"exact_match,remove_whitespace": 0.0},
    }
    return {"samples": samples, "results": scores}


def test_what_is_the_same():
    ours = json.loads(json.dumps(results()))  # as it comes from a file
    ours["samples"]["piqa"][0]["resps"][0][0] = [-3.25005, "False"]
    ours["results"]["piqa"]["perplexity,none"] = 100.001
    row, wrong = zero_shot.compare("piqa", 2, ours, results())
    assert wrong == []
    assert row.difference == pytest.approx(5e-5)
    assert (row.processes, row.documents, row.log_likelihoods, row.texts) == (2, 2, 4, 0)
    row, wrong = zero_shot.compare("triviaqa", 1, ours, results())
    assert (wrong, row.difference, row.log_likelihoods, row.texts, row.equal_texts) == ([], None, 0, 1, 1)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", lambda r: r["samples"]["piqa"][1]["resps"][1].__setitem__(0, (-1.5002, True)), "request 1: (-1.5002"),
        ("piqa", lambda r: r["samples"]["piqa"][1]["resps"][0].__setitem__(0, (-3.25, True)), "document 1, request 0"),
        ("piqa", lambda r: r["samples"]["piqa"][0]["resps"][0].__setitem__(0, (float("nan"), False)), "nan"),
        ("piqa", lambda r: r["samples"]["piqa"].pop(), "2 answers, hf has 4"),
        ("piqa", lambda r: r["results"]["piqa"].update({"acc,none": 0.50001}), "acc,none: 0.50001, hf 0.5"),
        ("piqa", lambda r: r["results"]["piqa"].update({"perplexity,none": 100.1}), "perplexity,none: 100.1"),
        ("triviaqa", lambda r: r["samples"]["triviaqa"][0].update(resps=[["a text "]]), "'a text ', hf 'a text'"),
    ],
)  # fmt: skip
def test_what_is_not_the_same_is_named(task, change, message):
    ours = copy.deepcopy(results())
    change(ours)
    _, wrong = zero_shot.compare(task, 1, ours, results())
    assert len(wrong) == 1
    assert message in wrong[0]


@pytest.mark.exhaustive  # starts both evaluations; tests/evaluation compares them in one process
def test_it_compares_and_writes(tmp_path, capsys):
    shape = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, init_method_std=0.2)
    saved = saved_model.save_model(tmp_path, shape=shape)
    words = ["--load", saved.folder, "--data-dir", write_data(tmp_path / "data"), "--tasks", "piqa,triviaqa"]
    words += ["--device", "cpu", "--max-gen-toks", 12, "--processes", 1, 2, "--json", tmp_path / "out.json"]
    assert zero_shot.main([str(word) for word in words]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert [(row["task"], row["processes"]) for row in out["rows"]] == [
        ("piqa", 1), ("triviaqa", 1), ("piqa", 2), ("triviaqa", 2),
    ]  # fmt: skip
    assert out["rows"][0]["log_likelihoods"] == 4
    assert 0 <= out["rows"][0]["difference"] < 1e-4
    assert (out["rows"][1]["texts"], out["rows"][1]["equal_texts"]) == (2, 2)
    assert out["seconds"].keys() == {"hf", "ours, 1", "ours, 2"}
    assert "Nothing differs" in capsys.readouterr().out
