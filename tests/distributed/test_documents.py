"""Documents kept apart in every kind of layout: as plain torch does it on one process."""

import itertools

import pytest
import tiny_run
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, LAYOUTS, marked
from distributed.tiny_training import (
    COUNT,
    DENSE,
    DOCUMENTS,
    DROPLESS,
    EOD,
    MODEL,
    TOP1,
    VOCAB,
    build,
    compare,
    micro_batch,
    reference,
    run_config,
    share,
    train,
)

from megatron.config import DataConfig
from megatron.model.gpt import GPTModel

pytestmark = pytest.mark.distributed
CORE = ("PP2",)
OTHERS = ("1 process", "DP2", "EP2", "TP2", "TP2 SP", "PP2 x TP2 SP x EP2")


@pytest.mark.parametrize("layout", [marked(name, CORE) for name in (*CORE, *OTHERS)])
def test_every_layout_trains_as_plain_torch(layout: str):
    """With recomputed activations, too."""
    size, options = LAYOUTS[layout]
    models = (DROPLESS if EP in options else DENSE, TOP1)
    runs = [run_config(moe, data=DOCUMENTS, recompute=moe is TOP1, **options) for moe in models]
    for moe, trained in zip(models, run_distributed(train, size, runs, timeout=300)[0], strict=True):
        compare(trained, reference(moe, DOCUMENTS), layout)


def test_the_options_change_what_is_trained():
    """Without this the comparison above could be of options that do nothing."""
    losses = []
    model = GPTModel(MODEL, DENSE, VOCAB, seed=1)
    for positions, attention, loss in itertools.product([False, True], repeat=3):
        data = DataConfig(reset_position_ids=positions, reset_attention_mask=attention, eod_mask_loss=loss)
        batch = micro_batch(0, data=data)
        documents = {name: batch[name] for name in ("position_ids", "cu_seqlens") if name in batch}
        losses.append(model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], **documents)[0].item())
    for one, other in itertools.combinations(losses, 2):
        assert abs(one - other) > 1e-4


def test_micro_batches_differ_in_how_many_tokens_count():
    counts = {float(micro_batch(number, data=DOCUMENTS)["loss_mask"].sum()) for number in range(COUNT)}
    assert len(counts) > 3
    assert any((micro_batch(number, data=DOCUMENTS)["labels"][:, -1] == EOD).any() for number in range(COUNT))


@pytest.mark.parametrize("layout", ["1 process", "PP2"])
def test_micro_batches_of_other_options_are_refused(layout: str):
    size, options = LAYOUTS[layout]
    assert run_distributed(_refusals, size, options, timeout=300)[0] == [
        "reset_position_ids is True, but the micro-batch has",
        "reset_position_ids is False, but the micro-batch has",
        "reset_attention_mask is True, but the micro-batch has",
    ]


def _refusals(options: dict) -> list[str]:
    told = []
    positions, attention = DataConfig(reset_position_ids=True), DataConfig(reset_attention_mask=True)
    for asked, made in ((positions, DataConfig()), (DataConfig(), positions), (attention, DataConfig())):
        engine = build(run_config(DENSE, data=asked, **options))
        engine._config.data = asked
        count = len(share(engine, 0, COUNT))
        with pytest.raises(ValueError, match="make micro-batches by") as error:
            engine.train_step([micro_batch(number, data=made) for number in range(count)], 1)
        told.append(str(error.value).partition(" has")[0] + " has")
    return told


OPTIONS = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}


def test_the_trainer_keeps_documents_apart_in_training_and_validation(server, corpus, tmp_path):
    """One process, and two stages with processes that load data; and a run without the options."""
    setups = {"one": OPTIONS, "stages": OPTIONS | {"pipeline_model_parallel_size": 2, "num_workers": 1}, "plain": {}}
    jobs = {
        name: server.start(2 if name == "stages" else 1, tiny_run.flags(corpus, save=tmp_path / name, **options))
        for name, options in setups.items()
    }
    for job in jobs.values():
        assert set(job.wait(120)) == {0}, job.output()
    one, stages, plain = (
        [[record["loss"] for record in tiny_run.records(tmp_path / name, kind)] for kind in ("train", "valid")]
        for name in jobs
    )
    for found, expected, other in zip(stages, one, plain, strict=True):
        assert len(found) == len(expected) == len(other) > 1
        assert found == pytest.approx(expected, abs=1e-4)
        assert all(abs(x - y) > 1e-3 for x, y in zip(expected, other, strict=True))
    (run,) = tiny_run.records(tmp_path / "one", "run")
    assert OPTIONS.items() <= run["config"]["data"].items()


def test_the_trainer_refuses_a_corpus_whose_documents_do_not_end(server, corpus, tmp_path):
    text = (corpus / "tokenizer.json").read_text()
    other = tmp_path / "tokenizer.json"  # in which documents of the corpus end with <unk>
    other.write_text(text.replace("<unk>", "<>").replace("<|endoftext|>", "<unk>").replace("<>", "<|endoftext|>"))
    job = server.start(1, tiny_run.flags(corpus, tokenizer_model=other, eod_mask_loss=True))
    assert job.wait(60) == [1]
    assert "none of 64 documents looked at ends with the end-of-document token 120" in job.output()
