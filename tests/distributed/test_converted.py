"""A model that was converted is trained further, as a user does it."""

from pathlib import Path

import pytest
import tiny_run
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.checkpoint import read_meta
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion


def test_weights_alone_are_trained_further(corpus, tmp_path):
    """An imported GPT-2 has no optimizer state: Adam starts anew, on two processes."""
    shape = {"vocab_size": 128, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**shape, bos_token_id=121, eos_token_id=121)
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
    assert read_meta(save)["huggingface"]["config"]["eos_token_id"] == 121  # for an export of what was trained


@pytest.mark.exhaustive  # tests/conversion/test_upcycle.py compares the losses too
def test_an_upcycled_model_trains_on_from_the_dense_ones_loss(corpus, tmp_path):
    """Dense for 4 updates, then 4 experts on two processes, with the dense run's moments."""
    still = {"hidden_dropout": 0, "attention_dropout": 0, "exit_tokens": 4 * 16 * tiny_run.SEQ}
    dense, experts = tmp_path / "dense", tmp_path / "experts"
    assert tiny_run.train(1, tiny_run.flags(corpus, save=dense, **still)).returncode == 0
    job = Conversion(str(dense), str(tmp_path / "upcycled"), "native", upcycle=True, num_experts=[4])
    list(convert(job))
    still.pop("exit_tokens")
    further = tiny_run.train(1, tiny_run.flags(corpus, save=dense, load=dense, **still))
    assert further.returncode == 0, further.stdout + further.stderr
    new = {"num_experts": 4, "moe_expert_parallel_size": 2, "disable_moe_token_dropping": True}
    done = tiny_run.train(2, tiny_run.flags(corpus, save=experts, load=tmp_path / "upcycled", **new, **still))
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = tiny_run.curve(dense), tiny_run.curve(experts)
    assert sorted(after) == sorted(before)[4:]
    first, *_, last = after
    assert after[first][0] == pytest.approx(before[first][0], abs=1e-5)
    assert after[last][0] < after[first][0]
    assert read_meta(experts)["optimizer"]["adam_step"] == 8
