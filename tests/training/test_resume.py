"""What a run may go on from: a checkpoint of another tokenizer only if that is asked for."""

import dataclasses

import pytest
from corpus import byte_level, gpt2

from megatron.checkpoint import CheckpointError
from megatron.config import RunConfig
from megatron.config.flags import parse_args
from megatron.config.run import OPTIONS, to_dict
from megatron.data.tokenizer import build_tokenizer
from megatron.training.metadata import carried
from megatron.training.resume import check, check_base


def test_another_tokenizer_is_refused_unless_allowed(tmp_path):
    config, mine, other = RunConfig(), build_tokenizer(gpt2(tmp_path)), build_tokenizer(byte_level(tmp_path))
    identity = {"vocab_size": mine.vocab_size, "fingerprint": mine.fingerprint}
    meta = {"config": to_dict(config), "vocab_size": 1024, "tokenizer": identity}
    assert check(meta, config, 1024, mine) == []
    with pytest.raises(CheckpointError, match=r"tokenizer fingerprint: checkpoint .*--allow-tokenizer-mismatch"):
        check(meta, config, 1024, other)
    named = build_tokenizer(dataclasses.replace(gpt2(tmp_path), eod_token="a"))
    again = dataclasses.replace(config, data=dataclasses.replace(config.data, eod_token="a"))
    with pytest.raises(CheckpointError, match=r"tokenizer fingerprint: .*, --eod-token None and 'a' \("):
        check(meta, again, 1024, named)
    config.data.allow_tokenizer_mismatch = True
    (warning,) = check(meta, config, 1024, other)
    assert mine.fingerprint[:12] in warning
    assert other.fingerprint[:12] in warning


def test_a_new_run_from_old_weights_may_differ_in_all_that_weights_do_not_depend_on(tmp_path):
    old, tokenizer = RunConfig(), build_tokenizer(gpt2(tmp_path))
    identity = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    meta = {"config": to_dict(old), "vocab_size": 1024, "tokenizer": identity, "optimizer": None}
    new = RunConfig()
    new.model.seq_length, new.model.max_position_embeddings, new.model.hidden_dropout = 1024, 2048, 0.0
    new.optimizer.lr, new.training.seed, new.data.split = 1e-5, 7, "90,10,0"
    assert check_base(meta, new, 1024, tokenizer) == []
    new.moe.topk = 2
    assert check_base(meta, new, 1024, tokenizer) == ["--topk: checkpoint 1, this run 2"]
    new.checkpoint.finetune_load_optim = True
    with pytest.raises(CheckpointError, match=r"--finetune-load-optim: .* holds no optimizer state"):
        check_base(meta, new, 1024, tokenizer)
    new.model.max_position_embeddings = None
    with pytest.raises(CheckpointError, match="--max-position-embeddings: checkpoint 2048, this run 1024"):
        check_base(meta, new, 1024, tokenizer)


def test_any_option_that_is_not_resumable_is_compared(tmp_path, monkeypatch):
    old, new, tokenizer = RunConfig(), RunConfig(), build_tokenizer(byte_level(tmp_path))
    identity = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    meta = {"config": to_dict(old), "vocab_size": 1024, "tokenizer": identity, "optimizer": None}
    new.model.layernorm_epsilon = 1e-6
    assert check(meta, new, 1024, tokenizer) == ["--layernorm-epsilon: checkpoint 1e-05, this run 1e-06"]
    option = dataclasses.replace(OPTIONS["layernorm_epsilon"], resumable=False)
    monkeypatch.setitem(OPTIONS, "layernorm_epsilon", option)
    for compare in (check, check_base):
        with pytest.raises(CheckpointError, match="--layernorm-epsilon: checkpoint 1e-05, this run 1e-06"):
            compare(meta, new, 1024, tokenizer)


def test_another_method_of_balancing_is_told_and_refused_where_biases_were_learned(tmp_path):
    tokenizer = build_tokenizer(byte_level(tmp_path))
    identity = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}

    def resumed(then: list[str], now: list[str]) -> list[str]:
        old, new = (parse_args(["--num-experts", "4", *words]) for words in (then, now))
        meta = {"config": to_dict(old), "vocab_size": 1024, "tokenizer": identity, "optimizer": None}
        assert check_base(meta, new, 1024, tokenizer) == check(meta, new, 1024, tokenizer)
        return check(meta, new, 1024, tokenizer)

    kind = "--moe-router-load-balancing-type"
    bias = [kind, "none", "--moe-router-enable-expert-bias"]
    assert resumed([], ["--moe-loss-coeff", "0.01"]) == []
    assert resumed([kind, "quantile_balancing"], [kind, "quantile_balancing"]) == []
    assert resumed([], [kind, "quantile_balancing"]) == [
        f"{kind}: checkpoint 'aux_loss', this run 'quantile_balancing'"
    ]
    assert resumed([], [kind, "none"]) == [
        f"{kind}: checkpoint 'aux_loss', this run 'none'",
        "--moe-loss-coeff: checkpoint 0.01, this run 0.0",
    ]
    for then, now in (([kind, "quantile_balancing"], []), ([kind, "quantile_balancing"], bias), (bias, [])):
        with pytest.raises(
            CheckpointError, match=r"balancing of experts: checkpoint '.*the weights depend on the biases"
        ):
            resumed(then, now)


def test_another_recipe_is_named_where_its_options_prevent_a_resume(tmp_path):
    tokenizer = build_tokenizer(byte_level(tmp_path))
    meta = {"vocab_size": 1024, "optimizer": None}
    meta["tokenizer"] = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    old, new = (parse_args(["--num-experts", "4", "--recipe", name]) for name in ("published", "recommended"))
    meta["config"] = to_dict(old)
    del meta["config"]["training"]["recipe"]  # as in checkpoints from before there were recipes
    for compare in (check, check_base):
        with pytest.raises(CheckpointError, match=r"RECIPE\): checkpoint 'published', this run 'recommended'"):
            compare(meta, new, 1024, tokenizer)
    old.training.recipe = "recommended"  # the name alone
    assert check(meta, old, 1024, tokenizer) == check_base(meta, old, 1024, tokenizer) == []


def test_documents_kept_apart_from_here_on_are_told(tmp_path):
    before, tokenizer = to_dict(RunConfig()), build_tokenizer(byte_level(tmp_path))
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        del before["data"][name]  # as in checkpoints from before there were these options
    meta = {"config": before, "vocab_size": 1024}
    meta["tokenizer"] = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    now = RunConfig()
    assert check(meta, now, 1024, tokenizer) == []
    now.data.reset_attention_mask = now.data.eod_mask_loss = True
    assert check(meta, now, 1024, tokenizer) == [
        "--reset-attention-mask: checkpoint False, this run True",
        "--eod-mask-loss: checkpoint False, this run True",
    ]


def test_what_came_from_hugging_face_is_kept_with_its_tokenizer(tmp_path):
    mine, other = build_tokenizer(gpt2(tmp_path)), build_tokenizer(byte_level(tmp_path))
    meta = {"tokenizer": {"fingerprint": mine.fingerprint}, "clock": {}}
    assert carried(meta, mine) == {}
    meta["huggingface"] = {"chat_template": "{{ messages }}"}
    assert carried(meta, mine) == {"huggingface": {"chat_template": "{{ messages }}"}}
    assert carried(meta, other) == {}
