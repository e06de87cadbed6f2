"""A model that came from another format is trained further, as a user does it."""

from pathlib import Path

import tiny_run
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.checkpoint import read_meta
from megatron.checkpoint.formats.convert import Conversion, convert


def test_weights_alone_are_trained_further(corpus, tmp_path):
    """An imported GPT-2 has no optimizer state: Adam starts anew, on two processes."""
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=121, eos_token_id=121)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    list(convert(Conversion(str(tmp_path / "hf"), str(tmp_path / "native"), "native")))
    save = tmp_path / "run"
    flags = tiny_run.flags(corpus, save=save, load=tmp_path / "native")
    done = tiny_run.train(2, flags)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [loss for loss, _ in tiny_run.curve(save).values()]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
    assert read_meta(save)["optimizer"]["adam_step"] == 8
    assert Path(save / "latest").is_file()
