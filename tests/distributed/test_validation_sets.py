"""Validation and test sets of one's own, each with a loss in all logs; and the third share of --split."""

import json

import pytest
import tiny_run

pytestmark = pytest.mark.distributed
BATCH_TOKENS = 16 * tiny_run.SEQ
RUN = {"train_tokens": 8 * BATCH_TOKENS, "save_interval": 0}


def losses(folder, kind: str) -> list[tuple[int, str | None, float]]:
    return [(record["step"], record.get("set"), record["loss"]) for record in tiny_run.records(folder, kind)]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Another dataset, of documents that end early."""
    return tiny_run.make_dataset(tmp_path_factory.mktemp("held_out"), 150)


def test_each_set_has_a_loss_of_its_own_in_all_logs(server, corpus, held_out, tmp_path):
    text = corpus / "text"
    data = {"data_path": None, "split": None, "train_data_path": text, "test_data_path": (held_out, f"again={text}")}
    flags = tiny_run.flags(
        corpus, save=tmp_path, tensorboard_dir=tmp_path / "board", **RUN, **data,
        valid_data_path=(f"one={held_out}", f"two={text}", f"three={held_out}"),
    )  # fmt: skip
    job = server.start(2, flags)
    assert job.wait() == [0, 0], job.output()
    valid, test = losses(tmp_path, "valid"), losses(tmp_path, "test")
    assert [(step, name) for step, name, _ in valid] == [(n, name) for n in (4, 8) for name in ("one", "two", "three")]
    assert [(step, name) for step, name, _ in test] == [(8, "text"), (8, "again")]
    for first, second, third in (valid[:3], valid[3:]):
        assert first[2] == third[2] != second[2]
    assert test[0][2] == valid[3][2]  # once, with the last weights
    assert test[1][2] == valid[4][2]
    output = job.output(0)
    assert f"validation loss of two {valid[1][2]:.4f} | perplexity" in output
    assert f"test loss of again {test[1][2]:.4f} | perplexity" in output
    assert [line.split()[0] for line in output.splitlines() if str(held_out) in line and line.startswith("  ")] == [
        "one:", "three:", f"{held_out.name}:",
    ]  # fmt: skip

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board")).Reload()
    curve = {event.step: event.value for event in board.Scalars("valid/two/loss")}
    assert curve == pytest.approx({step * BATCH_TOKENS: loss for step, name, loss in valid if name == "two"})
    (event,) = board.Scalars("test/again/loss")
    assert event.value == pytest.approx(test[1][2])


def test_the_third_share_of_split_is_read_at_the_end_and_logged_as_before(server, corpus, tmp_path):
    flags = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, split="80,10,10", eval_interval=0, **RUN)
    job = server.start(1, [*flags, "--exit-tokens", str(4 * BATCH_TOKENS)])
    assert job.wait() == [0], job.output()
    assert losses(tmp_path, "test") == []
    for _ in range(2):  # the second time there is nothing left to train
        job = server.start(1, flags)
        assert job.wait() == [0], job.output()
    ((step, name, _),) = losses(tmp_path, "test")
    assert (step, name) == (8, None)
    assert losses(tmp_path, "valid") == []


def test_training_data_alone(server, corpus, tmp_path):
    flags = tiny_run.flags(corpus, save=tmp_path, data_path=None, split=None, train_data_path=corpus / "text", **RUN)
    job = server.start(1, flags)
    assert job.wait() == [0], job.output()
    assert {record["kind"] for record in map(json.loads, (tmp_path / "metrics.jsonl").open())} == {
        "run", "train", "save", "stop",
    }  # fmt: skip
