"""A run whose data has noise in it goes back, and becomes the run that was told to leave that data out."""

import pytest
import tiny_run
from distributed.trainers import Death

pytestmark = pytest.mark.distributed
BATCH_TOKENS = 16 * tiny_run.SEQ
RUN = {"num_experts": 4, "moe_expert_parallel_size": 2, "train_tokens": 32 * BATCH_TOKENS, "save_interval": 4}
SPIKES = {"spike_sigmas": 4.0, "spike_updates": 2, "spike_window": 8}
NOISE = ["poisoned_samples 320 352"]  # the data of updates 21 and 22
LEFT_OUT = "288-352"  # and of as many updates before


def losses(folder, kind: str) -> dict[int, float]:
    return {record["tokens"]: record["loss"] for record in tiny_run.records(folder, kind)}


def test_going_back_for_a_spike_equals_having_left_its_data_out(server, corpus, tmp_path):
    told, went_back = tmp_path / "told", tmp_path / "went back"
    faults = {rank: NOISE for rank in range(2)}
    job = server.start(2, tiny_run.flags(corpus, save=told, skip_samples=LEFT_OUT, **RUN), faults=faults)
    assert job.wait() == [0, 0], job.output()

    arguments = tiny_run.flags(
        corpus, save=went_back, load=went_back, async_save=True, keep_last=3, num_workers=1, **RUN, **SPIKES
    )
    job = server.start(2, arguments, Death(rank=1, phase="step", call=24), faults)  # 2 updates after it went back
    assert 0 not in job.wait(), job.output()
    assert "SPIKE: 2 losses in a row above" in job.output(0)
    assert "Going back to step_00000016, 8192 tokens, without samples 288-352" in job.output(0), job.output(0)
    job = server.start(2, arguments, faults=faults)
    assert job.wait() == [0, 0], job.output()
    (spike,) = tiny_run.records(went_back, "spike")
    assert (spike["step"], spike["resumed_at_tokens"], spike["samples"]) == (22, 16 * BATCH_TOKENS, [288, 352])
    assert tiny_run.records(went_back, "run")[1]["resumed_at_tokens"] == 16 * BATCH_TOKENS
    assert tiny_run.curve(went_back) == tiny_run.curve(told)
    assert losses(went_back, "valid") == losses(told, "valid")


def test_restarts_come_to_an_end_and_the_run_trains_through(server, corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, **RUN, **SPIKES, spike_restarts=1)
    job = server.start(1, [*arguments, "--moe-expert-parallel-size", "1"], faults={0: ["poisoned_samples 320 4096"]})
    assert job.wait() == [0], job.output()
    spikes = tiny_run.records(tmp_path, "spike")
    assert [spike["resumed_at_tokens"] for spike in spikes[:2]] == [16 * BATCH_TOKENS, None]
    assert "--spike-restarts 1 are used up" in spikes[1]["reason"]
    assert tiny_run.records(tmp_path, "train")[-1]["step"] == 32
