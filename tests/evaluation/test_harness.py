"""Our scores against lm-eval's own ``hf`` backend on the exported model, task by task."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import saved_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from zero_shot_data import write_data

from benchmarks.zero_shot import compare
from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion
from megatron.evaluation.harness import Evaluation, evaluate
from megatron.evaluation.tasks import LOCAL, build_tasks

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, init_method_std=0.2)
NEW = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model.save_model(tmp_path_factory.mktemp("run"), MoEConfig(), SHAPE)


def assert_same(ours: dict, theirs: dict) -> None:
    for task in LOCAL:
        row, wrong = compare(task, 1, ours, theirs)
        assert wrong == []
        assert row.documents == 2


@pytest.fixture(scope="module", params=[MoEConfig(), saved_model.EXPERTS], ids=["dense", "moe"])
def case(request, tmp_path_factory):
    """A saved model, data, and the results of lm-eval's backend on the exported model."""
    folder = tmp_path_factory.mktemp("run")
    saved = saved_model.save_model(folder, request.param, SHAPE)
    data = write_data(folder / "data")
    list(convert(Conversion(str(saved.folder), str(folder / "hf"), "hf")))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=64, device="cpu"),
        tasks=build_tasks(list(LOCAL), data),
        gen_kwargs={"max_gen_toks": NEW},
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    return saved, data, theirs


def test_scores_are_those_of_lm_evals_own_backend(case, tmp_path):
    saved, data, theirs = case
    wanted = Evaluation(
        str(saved.folder), str(tmp_path), tuple(LOCAL), str(data),
        batch_size=3, max_gen_toks=NEW, device="cpu", log_samples=True, name="tiny",
    )  # fmt: skip
    table = evaluate(wanted)
    ours = json.loads((tmp_path / "results.json").read_text())
    assert_same(ours, theirs)
    assert "| 350M+MoE-128 (published) | 0.6270 | 0.7459 | 0.6046 | 0.3560 | 0.1658 | 0.0517 |" in table
    assert (tmp_path / "results.csv").read_text().startswith("model,task,metric,value,stderr\ntiny,lambada_openai,")
    log = tmp_path / "requests.jsonl"
    complete = log.read_bytes()
    log.write_bytes(complete[: len(complete) * 2 // 3])  # as a killed run leaves it
    kept = log.read_bytes().rpartition(b"\n")[0]
    evaluate(wanted)
    again = json.loads((tmp_path / "results.json").read_text())
    assert [again[part] for part in ("samples", "results")] == [ours[part] for part in ("samples", "results")]
    assert log.read_bytes().startswith(kept)
    assert {*log.read_bytes().splitlines()} == {*complete.splitlines()}


def test_files_are_those_of_lm_evals_own_command(case, tmp_path):
    """Field by field; what differs is what the model is called, and the last digits of numbers."""
    saved, data, theirs = case
    theirs = copy.deepcopy(theirs)
    samples, tracker = theirs.pop("samples"), EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.log_experiment_args("hf", {"pretrained": "tiny"}, None, None, True)
    tracker.save_results_aggregated(theirs, samples)
    for task, lines in samples.items():
        tracker.save_results_samples(task, lines)
    wanted = Evaluation(
        str(saved.folder), str(tmp_path / "ours"), tuple(LOCAL), str(data),
        batch_size=3, max_gen_toks=NEW, device="cpu", log_samples=True, name="tiny",
    )  # fmt: skip
    evaluate(wanted)
    found = {}
    for name in ("ours", "theirs"):
        files = {path.name.rsplit("_", 1)[0]: path for path in (tmp_path / name / "tiny").iterdir()}
        assert len(files) == 1 + len(LOCAL)
        found[name] = {key: [json.loads(line) for line in path.open()] for key, path in files.items() if "s_" in key}
        found[name]["results"] = json.loads(files["results"].read_text())
    ours, theirs = found["ours"], found["theirs"]
    assert ours.keys() == theirs.keys()
    named = {"model_name": "tiny", "model_source": "megatron", "max_length": 64, "eot_token_id": 121}
    assert {key: ours["results"][key] for key in named} == named
    assert ours["results"].keys() == theirs["results"].keys()
    for key in ("task_hashes", "versions", "n-shot", "n-samples", "higher_is_better", "max_length", "eot_token_id"):
        assert ours["results"][key] == theirs["results"][key], key
    for key in ("tokenizer_eos_token", "tokenizer_bos_token", "tokenizer_pad_token", "chat_template_sha"):
        assert ours["results"][key] == theirs["results"][key], key
    for part in ("config", "results", "configs"):
        assert ours["results"][part].keys() >= theirs["results"][part].keys(), part
    assert ours["results"]["config"]["model_num_parameters"] == theirs["results"]["config"]["model_num_parameters"]
    for task in LOCAL:
        for one, other in zip(ours[f"samples_{task}"], theirs[f"samples_{task}"], strict=True):
            numbers = {"resps", "filtered_resps", "perplexity"}
            assert one.keys() == other.keys()
            assert {k: v for k, v in one.items() if k not in numbers} == {
                k: v for k, v in other.items() if k not in numbers
            }
    whole = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert {key: value for key, value in whole.items() if key != "samples"} == ours["results"]


@pytest.mark.distributed
@pytest.mark.exhaustive  # starting two processes takes long
def test_two_processes_share_the_experts(case, tmp_path):
    saved, data, theirs = case
    degree = "2" if saved.config.moe.enabled else "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(TOOL)]
    flags = {
        "--load": saved.folder, "--output": tmp_path, "--tasks": ",".join(LOCAL), "--data-dir": data,
        "--batch-size": 3, "--max-gen-toks": NEW, "--device": "cpu", "--expert-parallel": degree,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run([*command, *words, "--log-samples"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(json.loads((tmp_path / "results.json").read_text()), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("nonsense",)}, "no form for the task nonsense"),
        ({"data_dir": "/nowhere"}, "/nowhere holds no piqa_valid.jsonl"),
        ({"load": "/nowhere"}, "/nowhere does not exist"),
        ({"max_gen_toks": 64, "tasks": ("triviaqa",)}, "triviaqa: texts of 64 tokens leave no room for a prompt"),
        ({"tokenizer_files": {"tokenizer_model": "/nowhere"}}, "/nowhere"),
    ],
    ids=str,
)
def test_errors(saved, tmp_path, change, message):
    from megatron.checkpoint import CheckpointError

    data = write_data(tmp_path / "data")
    flags = {"load": str(saved.folder), "tasks": ("piqa",), "data_dir": str(data), "device": "cpu"} | change
    with pytest.raises((ValueError, CheckpointError), match=message):
        evaluate(Evaluation(output=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_a_damaged_line_is_named(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "boolq_val.jsonl").write_text('{"query": "no question"}\n')
    with pytest.raises(ValueError, match=r"boolq_val\.jsonl, line 1, is no line of boolq"):
        build_tasks(["boolq"], data)


def test_without_the_hub_it_is_said_what_to_do(monkeypatch):
    class Unreachable:
        all_tasks = ("piqa",)

        def load(self, names: list[str]) -> None:
            raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("megatron.evaluation.tasks.TaskManager", Unreachable)
    with pytest.raises(ValueError, match=r"Couldn't reach the Hub.*HF_HOME.*--data-dir"):
        build_tasks(["piqa"])
