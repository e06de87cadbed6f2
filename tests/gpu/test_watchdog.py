"""A rank that stops in the middle of NCCL's collectives is named, and the run ends."""

import os
import signal

import pytest
import tiny_run
from distributed.started import children, output_until_the_end, start, wait_for
from gpu.processes import needs_two_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    needs_two_gpus,
]


# no saves and no validation, which are not watched
ONLY_UPDATES = {"save_interval": 0, "eval_interval": 0, "split": "1,0,0"}


def test_a_stopped_rank_is_named_and_the_others_stacks_are_written(tmp_path):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    save = tmp_path / "save"
    arguments = tiny_run.flags(
        tmp_path, save=save, device="cuda", fp32=False, bf16=True, no_compile=True, num_experts=4,
        moe_expert_parallel_size=2, train_tokens="1M", watchdog_factor=5.0, watchdog_min_seconds=5.0,
        **ONLY_UPDATES,
    )  # fmt: skip
    process = start(2, arguments)
    wait_for("step     30", process)
    stopped = children(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    output = output_until_the_end(process, 90)  # torchrun kills what does not heed SIGTERM after 30 s
    assert process.returncode != 0
    assert f"process {stopped}): stopped, or stuck outside Python" in output, output
    assert len(list(save.glob("stacks/*/rank_00000.txt"))) == 1
