import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import saved_model
import torch

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model.save_model(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, saved, capsys):
    """Runs the tool on the CPU; returns its exit status, standard output and standard error."""

    def run(*flags: str, load: str | None = None) -> tuple[int, str, str]:
        try:
            status = tool.main(["--load", load or str(saved.folder), "--device", "cpu", *flags])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@torch.no_grad()
def continued(saved: saved_model.SavedModel, prompt: list[int], count: int) -> list[int]:
    model = saved_model.GPTModel(saved.config.model, saved_model.MoEConfig(num_experts=(4,)), 128).eval()
    model.load_state_dict(saved.model.state_dict())
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, :122].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text(run, saved):
    expected = continued(saved, [1, 2, 3], 8)
    assert 121 not in expected
    status, out, err = run("--prompt", "w1 w2 w3", "--greedy", "--max-new-tokens", "8")
    assert (status, err) == (0, "")
    assert out == "w1 w2 w3" + "".join(f" w{token}" for token in expected) + "\n\n"


def test_json_lines_for_many_prompts(run, saved, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w4\n\nw5 w6 w7 w8\n", encoding="utf-8-sig")  # as editors of Windows save it
    arguments = ("--prompt", "w1 w2", "--prompt-file", str(prompts), "--num-samples", "2", "--seed", "70")
    arguments += ("--max-new-tokens", "6", "--json", "--top-k", "20", "--top-p", "0.95", "--temperature", "0.8")
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    order = [(prompt, sample) for prompt in ("w1 w2", "w4", "w5 w6 w7 w8") for sample in (0, 1)]
    assert [(line["prompt"], line["sample"]) for line in lines] == order
    assert [line["seed"] for line in lines] == [70, 71, 72, 73, 74, 75]
    for line in lines:
        assert line["ended"] == ("length" if len(line["tokens"]) == 6 else "eod")
        assert max(line["tokens"], default=0) < 122
    assert lines[0]["tokens"] != lines[1]["tokens"]
    assert run(*arguments, "--batch-size", "1")[1] == out
    alone = json.loads(run("--prompt", "w4", "--seed", "73", *arguments[8:])[1])
    assert alone["text"] == lines[3]["text"]


def test_many_texts_have_headings_and_keep_their_order(run):
    status, out, _ = run("--prompt", "w1", "--prompt", "w2", "--max-new-tokens", "3", "--num-samples", "2")
    assert status == 0
    heads = [line for line in out.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {p}, sample {s} ---" for p in (1, 2) for s in (1, 2)]
    prompts = [line.split()[0] for line in out.splitlines() if line.startswith("w")]
    assert prompts == ["w1", "w1", "w2", "w2"]


def test_the_default_length_is_what_the_positions_leave(run):
    status, out, _ = run("--prompt", "w1 w2", "--greedy", "--json")
    result = json.loads(out)
    assert status == 0
    assert len(result["tokens"]) == 46 or result["ended"] == "eod"


def test_an_empty_prompt_begins_a_document(run, saved):
    status, out, _ = run("--prompt", "", "--greedy", "--json", "--max-new-tokens", "4")
    assert status == 0
    assert json.loads(out)["tokens"] == continued(saved, [121], 4)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "nothing to continue"),
        (
            ["--prompt", "w1", "--num-samples", "0"],
            2,
            "argument --num-samples: got 0; expected a whole number, at least 1",
        ),
        (["--prompt", "w1", "--max-new-tokens", "-1"], 2, "argument --max-new-tokens: got -1; expected"),
        (["--prompt", "w1", "--top-p", "2"], 2, "top-p is 2.0"),
        (["--prompt", "w1", "--wrong"], 2, "--wrong"),
        (["--prompt", "w1", "--max-new-tokens", "48"], 1, "--max-new-tokens 47 or less"),
        (["--prompt", "w1 " * 48], 1, "48 tokens leaves nothing of the model's 48 positions"),
        (["--prompt-file", "/nowhere"], 1, "/nowhere"),
        (["--prompt-file", sys.executable], 1, "is not UTF-8"),
        (["--prompt", "\udcff"], 1, "is not UTF-8"),
        (["--prompt", "w1", "--tokenizer-model", "/nowhere.json"], 1, "--tokenizer-model /nowhere.json"),
        (["--prompt", "w1", "--device", "gpu"], 1, "--device gpu is not known"),
        (
            ["--prompt", "w1", "--seed", str(2**63)],
            2,
            f"argument --seed: got {2**63}; expected a whole number, at least 0 and at most {2**63 - 1}",
        ),
    ],
    ids=str,
)
def test_errors_say_what_to_do(run, flags, status, message):
    actual, out, err = run(*flags)
    assert (actual, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


def test_a_missing_and_a_damaged_checkpoint(run, saved, tmp_path):
    status, _, err = run("--prompt", "w1", load=str(tmp_path / "nowhere"))
    assert (status, "nowhere does not exist" in err) == (1, True)
    copy = saved_model.save_model(tmp_path).folder
    data = next(copy.glob("step_*/data-*"))
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    status, out, err = run("--prompt", "w1", load=str(copy))
    assert (status, out) == (1, "")
    assert data.name in err


def test_it_runs_as_a_command_and_stops_quietly_when_nobody_reads(saved):
    command = [sys.executable, str(TOOL), "--load", str(saved.folder), "--prompt", "w1", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--greedy"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=saved.folder
    )
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr.read() == ""
