"""Preflight in real processes, each a node of its own, with something wrong with one of them."""

import pytest
import tiny_run

pytestmark = pytest.mark.distributed
PREFLIGHT = {"num_experts": 4, "moe_expert_parallel_size": 2, "preflight_only": True}


def table(output: str) -> dict[str, str]:
    """Node -> its last column."""
    lines = output.split("preflight:\n")[1].splitlines()
    return {line.split()[0]: line.split("  ")[-1].strip() for line in lines if line.split()[0].isdigit()}


def test_all_is_well_and_nothing_is_trained(server, corpus, tmp_path):
    job = server.start(2, tiny_run.flags(corpus, save=tmp_path, **PREFLIGHT))
    assert job.wait() == [0, 0], job.output()
    output = job.output(0)
    assert table(output) == {"0": "ok"}, output
    assert output.rstrip().endswith("all is well")
    assert "preflight" not in job.output(1)
    assert list(tmp_path.iterdir()) == []


def test_nodes_are_named_for_what_is_wrong_with_them(server, corpus, tmp_path):
    faults = {
        1: ("other_version deepspeed", "clock_ahead 5", "other_data", "own_disk"),
        2: ("slow_links 0.05", "slow_device 0.05"),
    }
    arguments = tiny_run.flags(corpus, save=tmp_path, **PREFLIGHT)
    job = server.start(4, arguments, faults=faults, one_node_each=True)
    assert job.wait() == [1] * 4, job.output()
    output = job.output(0)
    assert table(output) == {"0": "ok", "1": "BROKEN", "2": "SLOW", "3": "ok"}, output
    lines = output.splitlines()
    broken = [line for line in lines if line.startswith("broken: ")]
    assert len(broken) == 5, output
    assert all("rank 1 (host" in line or "node 1 (host" in line for line in broken)
    for said in (
        *("deepspeed 0.0.1, others have", "5 s ahead of", "text.bin of bytes", "text.idx of bytes"),
        "does not hold here what rank 0 has written there",
    ):
        assert sum(said in line for line in broken) == 1, said
    slow = [line for line in lines if line.startswith("slow: ")]
    assert len(slow) == 3, output
    assert all("rank 2 (host" in line or "node 2 (host" in line for line in slow)
    assert ["TFLOP/s" in slow[0], "all-reduce" in slow[1], "all-to-all" in slow[2]] == [True] * 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hides text.bin", "error on rank 1 ("),
        ("truncated text.bin", "broken: rank 1 (host"),
        ("wrong_products", "broken: rank 1 (host"),
        ("full_disk", "and a checkpoint of"),
        ("hangs_in_products", "process {pid}) is behind, at "),
    ],
)
def test_what_would_end_a_run_ends_it_before_it_trains(server, corpus, tmp_path, fault, said):
    arguments = tiny_run.flags(corpus, save=tmp_path, **PREFLIGHT | {"preflight_only": None, "preflight": True})
    job = server.start(2, arguments, faults={1: [fault]}, one_node_each=True)
    assert job.wait() == ([2, 2] if fault == "hides text.bin" else [1, 1]), job.output()
    assert said.format(pid=job.pids[1]) in job.output(0), job.output()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_is_well_goes_on_to_train(server, corpus, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, preflight=True, train_tokens=2 * 16 * tiny_run.SEQ)
    job = server.start(2, arguments, faults={1: ["slow_device 0.05"]}, one_node_each=True)
    assert job.wait() == [0, 0], job.output()
    assert "slow: rank 1 (host" in job.output(0)
    assert len(tiny_run.records(tmp_path, "train")) == 2
