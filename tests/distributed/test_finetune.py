"""A second stage: --finetune starts a new run from the weights of an old one, and goes on with it after a stop."""

import json

import pytest
import tiny_run
from distributed.trainers import Death

pytestmark = pytest.mark.distributed
MOE = {"num_experts": 4, "moe_expert_parallel_size": 2}
BATCH_TOKENS = 16 * tiny_run.SEQ
STILL = {"lr": 1e-30, "lr_warmup_tokens": 0, "weight_decay": 0}  # no update changes a weight


@pytest.fixture(scope="module")
def old(server, corpus, tmp_path_factory):
    """A finished run of 8 updates on 2 processes."""
    save = tmp_path_factory.mktemp("old")
    job = server.start(2, tiny_run.flags(corpus, save=save, **MOE))
    assert job.wait() == [0, 0], job.output()
    return save


@pytest.fixture(scope="module")
def other_corpus(corpus, tmp_path_factory):
    """Other documents of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    tiny_run.make_dataset(folder, 120)
    return folder


def run(server, processes: int, arguments: list[str], dies: Death | None = None) -> str:
    """Train to the end, or to the death of one; the output."""
    job = server.start(processes, arguments, dies)
    assert any(job.wait()) == (dies is not None), job.output()
    return job.output()


def meta_of(folder) -> dict:
    return json.loads((folder / (folder / "latest").read_text().strip() / "meta.json").read_text())


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {"moe_expert_parallel_size": 1}),
        pytest.param(2, {"tensor_model_parallel_size": 2, "moe_expert_parallel_size": 1}, marks=pytest.mark.exhaustive),
        (2, {"pipeline_model_parallel_size": 2, "moe_expert_parallel_size": 1}),
    ],
    ids=["1", "TP2", "PP2"],
)
def test_weights_are_the_old_ones_in_any_layout(server, corpus, old, tmp_path, processes, layout):
    """Trained on at a learning rate of nothing, the model has the validation loss that the old run ended with."""
    flags = tiny_run.flags(corpus, finetune=True, load=old, save=tmp_path, **(MOE | layout | STILL))
    output = run(server, processes, flags)
    assert f"starting from the weights of {old / 'step_00000008'}" in output
    (first, *_), expected = tiny_run.records(tmp_path, "valid"), tiny_run.records(old, "valid")[-1]
    assert first["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert first["step"] == 4  # the clock is a new one
    assert [record["step"] for record in tiny_run.records(tmp_path, "train")] == list(range(1, 9))


@pytest.mark.parametrize("keep", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_killed_and_started_again_it_goes_on_with_itself(server, other_corpus, old, tmp_path, keep):
    """The new run is one run however often it is interrupted, also before its first checkpoint."""
    options = MOE | {"lr": 1e-3, "train_tokens": 6 * BATCH_TOKENS, "finetune": True, "finetune_load_optim": keep}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(server, 2, tiny_run.flags(other_corpus, load=old, save=whole, **options))
    arguments = tiny_run.flags(other_corpus, load=old, save=cut, **options)
    run(server, 2, arguments, Death(rank=1, phase="step", call=2))
    run(server, 2, arguments, Death(rank=1, phase="step", call=5))
    run(server, 2, arguments)
    assert tiny_run.curve(cut) == tiny_run.curve(whole)
    starts = tiny_run.records(cut, "run")
    assert [start["resumed_at_tokens"] for start in starts] == [None, None, 3 * BATCH_TOKENS]
    assert [bool(start["started_from"]) for start in starts] == [True, True, False]
    assert min(tiny_run.curve(whole)) == BATCH_TOKENS
    meta = meta_of(cut)
    assert meta["clock"]["samples"] == 6 * 16
    assert meta["optimizer"]["adam_step"] == (14 if keep else 6)
    expected = {"load": str(old.resolve()), "checkpoint": "step_00000008", "tokens": 8 * BATCH_TOKENS}
    assert meta["finetuned_from"] == expected


def test_a_third_stage_and_a_plain_resume_keep_to_their_own(server, other_corpus, old, tmp_path):
    second, third = tmp_path / "second", tmp_path / "third"
    short = MOE | {"train_tokens": 4 * BATCH_TOKENS}
    run(server, 2, tiny_run.flags(other_corpus, finetune=True, load=old, save=second, **short))
    longer = MOE | {"train_tokens": 5 * BATCH_TOKENS}
    run(server, 2, tiny_run.flags(other_corpus, load=second, save=second, **longer))  # resumed without the flag
    assert tiny_run.records(second, "run")[-1]["resumed_at_tokens"] == 4 * BATCH_TOKENS
    run(server, 2, tiny_run.flags(other_corpus, finetune=True, load=old, save=second, **longer))  # nothing left to do
    assert tiny_run.records(second, "run")[-1]["resumed_at_tokens"] == 5 * BATCH_TOKENS
    run(server, 2, tiny_run.flags(other_corpus, finetune=True, load=second, save=third, **short))
    assert meta_of(third)["finetuned_from"]["load"] == str(second.resolve())


def test_what_does_not_fit_is_refused(server, corpus, old, tmp_path):
    def refused(**changes) -> str:
        job = server.start(1, tiny_run.flags(corpus, **({"finetune": True, "num_experts": 4} | changes)))
        assert job.wait() != [0]
        return job.output()

    elsewhere, plain = tmp_path / "elsewhere", tmp_path / "plain"
    short = {"moe_expert_parallel_size": 2, "num_experts": 4, "train_tokens": 2 * BATCH_TOKENS}
    run(server, 2, tiny_run.flags(corpus, save=plain, **short))
    run(server, 2, tiny_run.flags(corpus, save=elsewhere, load=plain, finetune=True, **short))
    assert "did not start with --finetune); choose another folder" in refused(load=old, save=plain)
    words = f"that started from --load {plain.resolve()}, and this one has --load {old}"
    assert words in refused(load=old, save=elsewhere)
    assert f"--load {tmp_path}/none: there is no checkpoint" in refused(load=tmp_path / "none", save=tmp_path / "new")
    assert "--hidden-size: checkpoint 32, this run 64" in refused(load=old, save=tmp_path / "new", hidden_size=64)
    shorter = {"load": old, "save": tmp_path / "new", "seq_length": 16}
    assert "--max-position-embeddings: checkpoint 32, this run 16" in refused(**shorter)
    run(server, 1, tiny_run.flags(corpus, finetune=True, num_experts=4, max_position_embeddings=32, **shorter))
