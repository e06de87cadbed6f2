"""Exported tokenizers give the ids of training, special tokens' names and odd spaces included."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron.checkpoint import CheckpointError
from megatron.config import DataConfig
from megatron.conversion.hf_tokenizer import write_tokenizer
from megatron.conversion.hf_tokenizer_import import find_tokenizer
from megatron.data.sentencepiece_training import train
from megatron.data.tokenizer import build_tokenizer

LINES = Path(__file__).read_text().splitlines() * 3
TEXTS = [
    "", " ", "def x(y):\n    return  y", "a <|endoftext|> and </s> <0x41>", "Zażółć 你好 🙂\t\r\n", "don't \u00a0 3",
    "".join(random.Random(1).choices("abc de\n<|>é", k=300)),
]  # fmt: skip


def make(kind: str, folder: Path) -> dict[str, str]:
    """Files of a tokenizer trained on this file's text, by option."""
    if kind in ("unigram", "bpe"):
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
        return {"tokenizer_model": train([str(folder / "text.jsonl")], str(folder / "sp"), 400, model_type=kind)}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "spaced_json")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if kind == "gpt2":
        vocab, merges = backend.model.save(str(folder))
        return {"vocab_file": vocab, "merge_file": merges}
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.enable_truncation(4)
    backend.save(str(folder / "own.json"))
    return {"tokenizer_model": str(folder / "own.json")}


KINDS = {
    "gpt2": "GPT2BPETokenizer",
    "json": "HFTokenizer",
    "spaced_json": "HFTokenizer",
    "unigram": "SentencePieceTokenizer",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_training(tmp_path, kind):
    (tmp_path / "own").mkdir()
    (tmp_path / "hf").mkdir()
    files = make(kind, tmp_path / "own")
    ours = build_tokenizer(DataConfig(tokenizer_type=KINDS[kind], **files))
    copies = write_tokenizer(ours, files, tmp_path / "hf", 64, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eod, 64)
    named = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_input_names"]
    assert list(theirs("w1")) == named == ["input_ids", "attention_mask"]  # GPT-2 adds token_type_ids' embeddings
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
    if "json" not in kind:  # there, what adds tokens was taken out
        assert find_tokenizer(tmp_path / "hf", {}, {})[0].fingerprint == ours.fingerprint
    for field, name in copies.items():
        assert (tmp_path / "hf" / name).read_bytes() == Path(files[field]).read_bytes()


def test_what_cannot_be_exported_is_refused(tmp_path):
    files = make("bpe", tmp_path)
    ours = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer", **files))
    with pytest.raises(CheckpointError, match="it would have to be a unigram model"):
        write_tokenizer(ours, files, tmp_path, 64, {})
    with pytest.raises(CheckpointError, match="--tokenizer-type ByteTokenizer cannot be exported"):
        write_tokenizer(build_tokenizer(DataConfig(tokenizer_type="ByteTokenizer")), {}, tmp_path, 64, {})
