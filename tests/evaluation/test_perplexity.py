"""Perplexity against its definition, token by token, and against Hugging Face's GPT-2."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import saved_model
import torch
from distributed.spawn import run_distributed
from test_docs import tool

from megatron.config import ModelConfig, MoEConfig, ParallelConfig
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion
from megatron.evaluation.perplexity import Document, Perplexity, measure, windows
from megatron.evaluation.processes import Processes, load_share
from megatron.inference.load import find_checkpoint, load_model, load_tokenizer

SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, init_method_std=0.3)
TEXTS = ["w1 w2 w3", "", " ".join(f"w{i * 7 % 120}" for i in range(60)), "w9 " * 16]


def documents(tokenizer) -> list[Document]:
    return [Document(tokenizer.encode(text), len(text.split()), len(text.encode())) for text in TEXTS]


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 30])
def test_each_token_is_scored_once_with_as_much_context_as_promised(count, stride):
    tokens, scored = list(range(count + 1)), []
    for window, number in windows(tokens, 8, stride):
        assert len(window) <= 9
        assert window == tokens[window[0] : window[-1] + 1]
        scored += window[-number:]
        if window[0] > 0:
            assert len(window) - number >= 8 - stride + 1
    assert scored == tokens[1:]


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_it_is_the_definition_and_hugging_faces(tmp_path, stride):
    transformers = pytest.importorskip("transformers")
    saved = saved_model.save_model(tmp_path, MoEConfig(), SHAPE)
    source = find_checkpoint(saved.folder)
    tokenizer = load_tokenizer(source)
    found = measure(load_model(source), documents(tokenizer), tokenizer.eod, stride=stride, batch_size=3)
    list(convert(Conversion(str(saved.folder), str(tmp_path / "hf"), "hf")))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    nll = 0.0
    for document in documents(tokenizer):
        tokens = [tokenizer.eod, *document.tokens]
        for at in range(1, len(tokens)):  # one token at a time, each with the context that its window gives it
            past = at <= 16
            begin = 0 if past else min(16 + math.ceil((at - 16) / stride) * stride, len(tokens) - 1) - 16
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens[begin:at]])).logits[0, -1].double()
            nll -= float(logits.log_softmax(-1)[tokens[at]])
    count = sum(len(document.tokens) for document in documents(tokenizer))
    assert found.loss == pytest.approx(nll / count, abs=1e-5)
    report = found.report()
    assert (report["documents"], report["tokens"], report["words"]) == (4, count, 3 + 60 + 16)
    assert report["token_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert report["word_perplexity"] == pytest.approx(math.exp(nll / (3 + 60 + 16)), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(nll / math.log(2) / sum(len(t) for t in TEXTS), rel=1e-4)


def test_words_of_many_tokens_have_no_perplexity_and_no_words_none():
    """As text without white space, whose words are whole paragraphs."""
    report = Perplexity(documents=1, tokens=1000, words=1, bytes=3000, nll=9000.0).report()
    assert (report["word_perplexity"], report["token_perplexity"]) == (None, math.exp(9))
    assert Perplexity(documents=1, tokens=2, words=0, bytes=0, nll=1.0).report()["bits_per_byte"] is None


def shared(folder: Path) -> float:
    import torch.distributed as dist

    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    launch = Launch(dist.get_rank(), 2, dist.get_rank(), "127.0.0.1", 0, "test")
    topology = build_groups(ParallelConfig(moe_expert_parallel_size=(2,)), launch, torch.device("cpu"))
    processes = Processes(launch.rank, 2, topology, expert_parallel=2)
    source = find_checkpoint(folder)
    model = load_share(source, processes, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(source)
    return measure(model, documents(tokenizer), tokenizer.eod, stride=8, longest=16, processes=processes).nll


@pytest.mark.exhaustive  # tests/distributed compares validation losses of expert parallelism
def test_two_processes_that_share_the_experts_find_what_one_does(tmp_path):
    moe = dataclasses.replace(saved_model.EXPERTS, **saved_model.BALANCING["quantile_balancing"])
    source = find_checkpoint(saved_model.save_model(tmp_path, moe).folder)
    tokenizer = load_tokenizer(source)
    alone = measure(load_model(source), documents(tokenizer), tokenizer.eod, stride=8, longest=16).nll
    assert run_distributed(shared, 2, source.path) == pytest.approx([alone, alone], abs=1e-3)


@pytest.fixture
def run(capsys):
    perplexity = tool("tools/perplexity.py")

    def run(*flags: object) -> tuple[int, str, str]:
        status = perplexity.main([str(flag) for flag in flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_tool_and_what_it_refuses(run, tmp_path):
    saved = saved_model.save_model(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("")
    load = ("--load", saved.folder)
    status, out, err = run(*load, "--input", tmp_path / "a.jsonl", "--max-length", 16, "--output", tmp_path / "p.json")
    assert status == 0, err
    assert json.loads(out) == json.loads((tmp_path / "p.json").read_text())
    assert json.loads(out)["setting"]["stride"] == 8
    for flags, message in (
        ((*load, "--input", tmp_path / "no.jsonl"), "there is no such file"),
        ((*load, "--input", tmp_path / "broken.jsonl"), "broken.jsonl, record 2"),
        ((*load, "--data-path", tmp_path / "no"), "no file"),
        ((*load, "--input", tmp_path / "a.jsonl", "--max-length", 10**6), "the model has"),
        ((*load, "--input", tmp_path / "a.jsonl", "--max-length", 8, "--stride", 9), "expected 1 to 8"),
        (("--load", tmp_path / "nowhere", "--input", tmp_path / "a.jsonl"), "nowhere"),
    ):
        status, out, err = run(*flags)
        assert (status, out) == (1, ""), flags
        assert message in err
