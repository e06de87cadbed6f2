"""A run that goes wrong keeps its good checkpoints, says which they are, and goes on from them."""

from pathlib import Path

import pytest
import tiny_run
from distributed.trainers import Death

from megatron.checkpoint.folder import checkpoint_status

pytestmark = pytest.mark.distributed
BATCH_TOKENS = 16 * tiny_run.SEQ
RUN = {
    "num_experts": 4, "save_interval": 1, "keep_last": 2, "eval_interval": 0, "max_skipped_updates": 4,
    "lr_decay_style": "constant", "train_tokens": 24 * BATCH_TOKENS,
}  # fmt: skip


def found(folder: Path) -> dict[int, str]:
    return {int(path.name[5:]): checkpoint_status(path).value for path in sorted(folder.glob("step_*"))}


def marked(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


@pytest.fixture(scope="module")
def undisturbed(server, corpus, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("undisturbed")
    job = server.start(1, tiny_run.flags(corpus, save=save, **RUN))
    assert job.wait() == [0], job.output()
    return save


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"moe_expert_parallel_size": 2, "async_save": True}),
        pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.exhaustive),
        pytest.param(2, {"pipeline_model_parallel_size": 2, "async_save": True}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_ruinous_learning_rate_costs_no_good_checkpoint(server, corpus, undisturbed, tmp_path, ranks, layout):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, **RUN, **layout)
    job = server.start(ranks, [*arguments, "--exit-tokens", str(12 * BATCH_TOKENS)])
    assert job.wait() == [0] * ranks, job.output()
    assert found(tmp_path) == {11: "confirmed", 12: "ended"}

    job = server.start(ranks, [*arguments, "--lr", "1e6"], Death(rank=0, phase="step", call=4))
    assert 0 not in job.wait(), job.output()  # killed among updates that are not finite: 13 ruined the weights
    assert found(tmp_path) == {11: "confirmed", 12: "confirmed", 13: "doubted"}
    assert marked(tmp_path) == "step_00000012"

    job = server.start(ranks, [*arguments, "--lr", "1e6"])
    assert job.wait() == [1] * ranks, job.output()
    assert f"Last good checkpoint: {tmp_path / 'step_00000012'}. Resume from it with a lower --lr" in job.output(0)
    assert found(tmp_path) == {11: "confirmed", 12: "confirmed", 13: "doubted"}
    assert marked(tmp_path) == "step_00000012"

    job = server.start(ranks, arguments)
    assert job.wait() == [0] * ranks, job.output()
    assert found(tmp_path) == {23: "confirmed", 24: "ended"}
    if not layout:
        assert tiny_run.curve(tmp_path) == tiny_run.curve(undisturbed)


def test_saves_wait_until_updates_are_good_again(server, corpus, tmp_path):
    """The data of updates 6 to 8 is bad; the checkpoint of update 6 is saved after update 9."""
    bad = ["samples_not_finite 80 128"]
    run = RUN | {"save_interval": 2, "train_tokens": 12 * BATCH_TOKENS}
    job = server.start(1, tiny_run.flags(corpus, save=tmp_path, **run), faults={0: bad})
    assert job.wait() == [0], job.output()
    saved = [record["step"] for record in tiny_run.records(tmp_path, "save")]
    assert saved == [2, 4, 9, 10, 12]
    (postponed,) = tiny_run.records(tmp_path, "not_saved")
    assert (postponed["step"], "saving waits for a good one" in postponed["reason"]) == (6, True)


def test_a_run_that_ends_among_bad_updates_saves_nothing_and_fails(server, corpus, tmp_path):
    bad = ["samples_not_finite 80 1000"]
    arguments = tiny_run.flags(
        corpus, save=tmp_path, load=tmp_path, **RUN | {"train_tokens": 8 * BATCH_TOKENS, "save_interval": 4}
    )
    job = server.start(1, arguments, faults={0: bad})
    assert job.wait() == [1], job.output()
    words = "the checkpoint of step 8 would follow an update with a loss or gradient not finite, and was not saved."
    assert f"error on rank 0: {words}" in job.output()
    assert f"Last good checkpoint: {tmp_path / 'step_00000004'}." in job.output()
    assert found(tmp_path) == {4: "confirmed"}


def test_where_no_checkpoint_is_good_this_is_said(server, corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, **RUN)
    job = server.start(1, [*arguments, "--lr", "1e6", "--lr-warmup-tokens", "0"])
    assert job.wait() == [1], job.output()
    assert "No checkpoint is known to be good. Start anew" in job.output()
    assert found(tmp_path) == {1: "doubted"}
    job = server.start(1, arguments)
    assert job.wait() == [1], job.output()
    assert "warning: step_00000001 is in doubt" in job.output()
