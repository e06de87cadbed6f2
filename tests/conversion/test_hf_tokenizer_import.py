"""Tokenizers and special tokens of Hugging Face folders: imports give the same ids, and exports the same folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from megatron.checkpoint import CheckpointError
from megatron.conversion.convert import convert
from megatron.conversion.hf_extras import replace_unknown_ids
from megatron.conversion.job import Conversion
from megatron.conversion.native import read_native
from megatron.data.errors import DataError
from megatron.data.tokenizer import HFTokenizer, build_tokenizer
from megatron.inference.load import find_checkpoint, load_model, load_tokenizer
from megatron.inference.sampling import Sampling
from megatron.inference.special_tokens import special_tokens
from megatron.inference.text import stream_text

LINES = Path(__file__).read_text().splitlines() * 2
TEXTS = [
    "", " ", "Hello World, it's 3.14  of\n\n\tthe city", " leading", "naïve 你好 🙂", "a <b>bold</b> wörld, wörldly",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>", "[CLS]ACD[HUMAN][SEP] ACDX", "<pad><unk>",
]  # fmt: skip
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def bpe(prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(LINES, trainer)
    return backend


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[HUMAN]"]
        trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=names, show_progress=False)
        backend.train_from_iterator(LINES, trainer)
        around = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
        special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if kind == "wordlevel":  # amino acids, as IgLM has them
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"ACDEFGHIKLMNPQRSTVWY"]
        backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        made.add_special_tokens({"additional_special_tokens": ["[HUMAN]"]})
        return made
    backend = bpe(prefix_space=kind == "prefix")
    if kind == "normalized":
        backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        add_prefix_space=kind == "prefix",
    )  # fmt: skip
    if kind == "chat":
        made.add_tokens(["<b>", AddedToken("wörld", single_word=True, lstrip=True)])
        made.add_special_tokens(
            {
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "pad_token": "<pad>",
                "eos_token": "<|im_end|>",
            }
        )
        made.chat_template = CHAT
    return made


KINDS = ("plain", "chat", "prefix", "normalized", "wordpiece", "wordlevel")


def save_hf(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: object) -> GPT2LMHeadModel:
    """Save a small GPT-2 and its tokenizer with save_pretrained; returns the model."""
    torch.manual_seed(1)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4} | ids | changes
    model = GPT2LMHeadModel(GPT2Config(pad_token_id=tokenizer.pad_token_id, **values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    # With tied embeddings and small position embeddings the model would repeat one token.
    torch.nn.init.normal_(model.transformer.wpe.weight, std=3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def add_transformers_4_files(folder: Path) -> None:
    """Add the files that transformers 4 writes beside tokenizer.json for a GPT-2 tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in content["added_tokens"]}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": added, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = content["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    new = {name["content"]: int(number) for number, name in added.items() if name["content"] not in model["vocab"]}
    if new:
        (folder / "added_tokens.json").write_text(json.dumps(new))


def run(load: Path, save: Path, target: str = "native", **options: str) -> list[str]:
    return list(convert(Conversion(str(load), str(save), target, **options)))


@pytest.mark.parametrize("transformers_4", [False, True], ids=["transformers5", "transformers4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_tokenizer_gives_the_same_ids(tmp_path, kind, transformers_4):
    if transformers_4 and kind.startswith("word"):
        pytest.skip("transformers 4 writes no other files for it")
    hf_tokenizer = make_tokenizer(kind)
    save_hf(tmp_path / "hf", hf_tokenizer)
    if transformers_4:
        add_transformers_4_files(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "native")
    source = find_checkpoint(tmp_path / "native")
    tokenizer = load_tokenizer(source)
    assert tokenizer.kind == ("GPT2BPETokenizer" if transformers_4 and kind == "plain" else "HFTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod) == (len(hf_tokenizer), hf_tokenizer.eos_token_id)
    for text in TEXTS:
        ids = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == ids, text
    special = special_tokens(source.meta, tokenizer)
    assert (special.begin, special.ends) == (hf_tokenizer.bos_token_id, {hf_tokenizer.eos_token_id})


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_tokenizer_that_was_imported(tmp_path, kind):
    hf_tokenizer = make_tokenizer(kind)
    save_hf(tmp_path / "hf", hf_tokenizer)
    several = [hf_tokenizer.eos_token_id, hf_tokenizer.bos_token_id]
    GenerationConfig(eos_token_id=several, pad_token_id=3, temperature=0.7, do_sample=True).save_pretrained(
        tmp_path / "hf"
    )
    run(tmp_path / "hf", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "out", "hf")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        for around in (False, True):
            ids = hf_tokenizer(text, add_special_tokens=around)["input_ids"]
            found = again(text, add_special_tokens=around)
            assert found["input_ids"] == ids, text
            assert set(found) == {"input_ids", "attention_mask"}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(again, name) == getattr(hf_tokenizer, name), name
    if kind == "chat":
        chat = [{"role": "user", "content": "hi"}]
        text = again.apply_chat_template(chat, tokenize=False)
        assert text == "<|im_start|>hi<|im_end|>"
        assert again(text)["input_ids"][0] == hf_tokenizer.convert_tokens_to_ids("<|im_start|>")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id, generation.temperature) == (several, 3, 0.7)
    before, after = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("hf", "out"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after.get(key) == before.get(key), key
    # imported again, with megatron_moe.json and without it
    run(tmp_path / "out", tmp_path / "back")
    assert read_native(tmp_path / "back").meta["huggingface"] == read_native(tmp_path / "native").meta["huggingface"]
    (tmp_path / "out" / "megatron_moe.json").unlink()
    run(tmp_path / "out", tmp_path / "back2")
    source, other = find_checkpoint(tmp_path / "native"), find_checkpoint(tmp_path / "back2")
    assert load_tokenizer(other).encode(TEXTS[5]) == load_tokenizer(source).encode(TEXTS[5])
    assert special_tokens(other.meta, load_tokenizer(other)) == special_tokens(source.meta, load_tokenizer(source))


@torch.no_grad()
def test_generation_stops_at_every_eos_token_of_the_model(tmp_path):
    hf_tokenizer = make_tokenizer("chat")
    model = save_hf(tmp_path / "hf", hf_tokenizer)
    prompt = hf_tokenizer("the city", return_tensors="pt", return_token_type_ids=False)
    free = model.generate(**prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[0].tolist()
    new = free[prompt["input_ids"].shape[1] :]
    at = max(number for number in range(12) if new[number] not in new[:number])
    assert at > 0
    GenerationConfig(eos_token_id=[hf_tokenizer.eos_token_id, new[at]]).save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "native")
    source = find_checkpoint(tmp_path / "native")
    tokenizer = load_tokenizer(source)
    greedy, ids = Sampling(0.0, 0, 1.0), [prompt["input_ids"][0].tolist()]
    special = special_tokens(source.meta, tokenizer)
    pieces = list(stream_text(load_model(source), tokenizer, ids, 12, greedy, [0], special.ends))
    assert [token for piece in pieces for token in piece.tokens] == new[:at]
    assert pieces[-1].ended == "eod"


def test_token_ids_outside_the_vocabulary_are_replaced_and_reported(tmp_path):
    hf_tokenizer = make_tokenizer("wordlevel")
    save_hf(tmp_path / "hf", hf_tokenizer, bos_token_id=50256, eos_token_id=50256)
    messages = run(tmp_path / "hf", tmp_path / "native")
    assert any("eos_token_id 50256 is none of the tokenizer's; 3 is taken" in line for line in messages)
    source = find_checkpoint(tmp_path / "native")
    assert load_tokenizer(source).eod == hf_tokenizer.eos_token_id == 3
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(about | {"eos_token_id": -1}))
    run(tmp_path / "hf", tmp_path / "again")
    assert load_tokenizer(find_checkpoint(tmp_path / "again")).eod == 3
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"has no end-of-document token: .* Name its own by --eod-token"):
        run(tmp_path / "hf", tmp_path / "other")
    run(tmp_path / "hf", tmp_path / "other", eod_token="[SEP]")
    assert load_tokenizer(find_checkpoint(tmp_path / "other")).eod == 3
    with pytest.raises(DataError, match=r"--eod-token \[END\] is no token of"):
        run(tmp_path / "hf", tmp_path / "third", eod_token="[END]")


@pytest.mark.parametrize(
    ("given", "ends"),
    [([3, 50256], {3}), ([50256], {0}), ("3", {0}), ([], {5}), ([0, 4], {0, 4}), (None, {5})],
    ids=str,
)
def test_eos_token_ids_of_generation_config_and_config(tmp_path, given, ends):
    extras = {"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": given}}
    make_tokenizer("wordlevel").save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"), "[PAD]")
    replace_unknown_ids(extras, tokenizer, lambda token: "token" if token < 25 else None)
    assert special_tokens({"huggingface": extras}, tokenizer).ends == ends


def test_eos_token_id_may_be_in_the_model_config_only(tmp_path):
    """As with BERT's tokenizers, which have a sep_token but no eos_token."""
    hf_tokenizer = make_tokenizer("wordpiece")
    hf_tokenizer.bos_token = hf_tokenizer.eos_token = None
    save_hf(tmp_path / "hf", hf_tokenizer, bos_token_id=2, eos_token_id=3)
    run(tmp_path / "hf", tmp_path / "native")
    source = find_checkpoint(tmp_path / "native")
    assert (load_tokenizer(source).eod, special_tokens(source.meta, load_tokenizer(source)).begin) == (3, 2)
    run(tmp_path / "native", tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)


def test_what_an_import_or_export_drops_is_reported(tmp_path):
    save_hf(tmp_path / "hf", make_tokenizer("wordpiece"), eos_token_id=2)
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    messages = run(tmp_path / "hf", tmp_path / "native")
    assert "left out: additional_chat_templates" in messages
    assert "tokens that the tokenizer there adds around a text are not added here: [CLS] ... [SEP]" in messages
    assert "a document ends with [CLS], the model's eos_token_id; the tokenizer's eos_token is [SEP]" in messages
    messages = run(tmp_path / "native", tmp_path / "mds", "megatron-deepspeed")
    assert any(line.startswith("left out, of Hugging Face: generation_config, tokenizer_config") for line in messages)
    files = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tmp_path / "hf" / "tokenizer.json")}
    messages = run(tmp_path / "hf", tmp_path / "given", **files)
    assert any(line.startswith("left out, as the tokenizer is another one: tokenizer_config") for line in messages)


def test_files_that_contradict_tokenizer_json_are_an_error(tmp_path):
    save_hf(tmp_path / "hf", make_tokenizer("chat"))
    add_transformers_4_files(tmp_path / "hf")
    config = tmp_path / "hf" / "tokenizer_config.json"
    good = json.loads(config.read_text())

    def fails(message: str, **changes: object) -> None:
        config.write_text(json.dumps(good | changes))
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path / "hf", tmp_path / "native")
        assert not (tmp_path / "native").exists()

    fails("add_prefix_space is True in tokenizer_config.json, False in tokenizer.json", add_prefix_space=True)
    more = good["added_tokens_decoder"] | {"390": {"content": "<new>", "special": False}}
    fails("<new> is 390 in tokenizer_config.json, missing among the added tokens", added_tokens_decoder=more)
    fails("not as transformers writes them: KeyError.'content'", added_tokens_decoder={"390": {}})
    fails("eos_token <stop> is none of the added tokens", eos_token={"content": "<stop>"})
    fails("extra_special_tokens <tool> is none of the added tokens", extra_special_tokens=["<|im_end|>", "<tool>"])
    (tmp_path / "hf" / "tokenizer.json").unlink()
    fails(r"has no tokenizer\.json, and its other files change .*<b> is token 380 in added_tokens\.json")
    (tmp_path / "hf" / "added_tokens.json").unlink()
    fails("add_prefix_space is true", added_tokens_decoder={}, add_prefix_space=True)
    fails("tokenizer_class is CLIPTokenizer", added_tokens_decoder={}, tokenizer_class="CLIPTokenizer")
    fails("pad_token <pad> is not in the vocabulary", added_tokens_decoder={})
    (tmp_path / "hf" / "vocab.json").rename(tmp_path / "hf" / "vocab.txt")
    fails(r"has its tokenizer in vocab.txt, and no tokenizer.json; write one .*save_pretrained")


def test_vocab_json_and_merges_txt_without_tokenizer_json(tmp_path):
    hf_tokenizer = make_tokenizer("plain")
    save_hf(tmp_path / "hf", hf_tokenizer)
    add_transformers_4_files(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "whole")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    run(tmp_path / "hf", tmp_path / "two")
    files = {
        name: str(tmp_path / "hf" / file) for name, file in (("vocab_file", "vocab.json"), ("merge_file", "merges.txt"))
    }
    run(tmp_path / "hf", tmp_path / "given", **files)
    one, other = (find_checkpoint(tmp_path / each).meta["tokenizer"]["fingerprint"] for each in ("whole", "two"))
    assert one == other
    shutil.rmtree(tmp_path / "hf")
    run(tmp_path / "two", tmp_path / "out", "hf")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(text)["input_ids"] for text in TEXTS] == [hf_tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_special_tokens_are_plain_text_in_a_corpus_and_tokens_in_a_prompt(tmp_path, kind):
    hf_tokenizer = make_tokenizer(kind)
    save_hf(tmp_path / "hf", hf_tokenizer)
    add_transformers_4_files(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "native")
    source = find_checkpoint(tmp_path / "native")
    corpus, prompts = build_tokenizer(source.config.data), load_tokenizer(source)
    assert corpus.fingerprint == prompts.fingerprint == source.meta["tokenizer"]["fingerprint"]
    text = f"x{hf_tokenizer.eos_token}y"
    split = hf_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert corpus.encode(text) == [*corpus.encode_arrays([text])[0]] == split
    assert prompts.encode(text) == [*prompts.encode_arrays([text])[0]] == hf_tokenizer(text)["input_ids"] != split


def test_the_fingerprint_depends_on_eod_token(tmp_path):
    make_tokenizer("chat").save_pretrained(tmp_path)
    made = [HFTokenizer(str(tmp_path / "tokenizer.json"), end) for end in (None, "<|endoftext|>", "<|im_end|>")]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert [tokenizer.eod for tokenizer in made] == [0, 0, 383]
