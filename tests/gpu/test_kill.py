"""SIGKILL of a rank in the middle of NCCL's collectives ends the run on all, by name and in time; it resumes."""

import os
import re
import signal
import time

import pytest
import tiny_run
from distributed.started import children, output_until_the_end, start, wait_for
from gpu.processes import needs_two_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    needs_two_gpus,
]
WITHIN = 5.0  # s, as docs/faults.md states


@pytest.mark.parametrize(
    "layout",
    [{"moe_expert_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}],
    ids=str,
)
def test_a_killed_rank_is_named_in_time_and_the_run_goes_on(tmp_path, layout):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    arguments = tiny_run.flags(
        tmp_path, save=tmp_path / "save", load=tmp_path / "save", device="cuda", fp32=False, bf16=True, no_compile=True,
        num_experts=4, train_tokens=16 * tiny_run.SEQ * 400, save_interval=20, **layout,
    )  # fmt: skip
    process = start(2, arguments)
    wait_for("step     30", process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    output = output_until_the_end(process, 60)
    assert time.monotonic() - killed < WITHIN, output
    assert process.returncode != 0
    assert re.search(r"error on rank 0: rank 1 \(host .*\) died; ending", output), output
    again = start(2, [*arguments, "--exit-tokens", str(16 * tiny_run.SEQ * 60)])
    output = output_until_the_end(again, 120)
    assert again.returncode == 0, output
    assert tiny_run.records(tmp_path / "save", "run")[-1]["resumed_at_tokens"] >= 16 * tiny_run.SEQ * 20
