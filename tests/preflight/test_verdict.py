"""The verdict on the facts of all ranks."""

import dataclasses
import itertools

import pytest

from megatron.preflight.check import rounds
from megatron.preflight.facts import Facts, code_version, versions
from megatron.preflight.speed import LinkSpeeds
from megatron.preflight.verdict import Need, find_verdict

GB = 1e9


def facts(rank: int, per_node: int = 1, **changes: object) -> Facts:
    node = rank // per_node
    found = Facts(rank, node, rank % per_node, f"gpu{node}", "NVIDIA H100", {"torch": "2.13.0"}, tflops=700.0)
    return dataclasses.replace(found, **changes)


def links_of(nodes: int, slow: int | None) -> list[Facts]:
    """One rank a node; a pair with the slow one has a tenth of the bandwidth."""
    found = [facts(rank) for rank in range(nodes)]
    for pair in itertools.chain(*rounds(nodes)):
        speed = 5.0 if slow in pair else 50.0
        for mine, other in (pair, pair[::-1]):
            found[mine].pairs[other] = LinkSpeeds(speed, speed)
    return found


@pytest.mark.parametrize("nodes", range(1, 10))
def test_each_node_is_in_two_pairs_of_different_rounds(nodes):
    for pairs in rounds(nodes):
        members = list(itertools.chain(*pairs))
        assert len(members) == len(set(members)), "a node is in one pair of a round"
    times = [sum(node in pair for pair in itertools.chain(*rounds(nodes))) for node in range(nodes)]
    assert times == [min(nodes - 1, 2)] * nodes


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_a_slow_node_is_found_and_its_neighbours_are_not_blamed(nodes):
    for slow in range(nodes):
        reported = find_verdict(links_of(nodes, slow), None, on_gpu=True).slow
        assert [line.split(":")[0] for line in reported] == [f"node {slow} (host gpu{slow})"] * 2
    assert find_verdict(links_of(nodes, None), None, on_gpu=True).slow == []


def test_a_slow_gpu_is_named_by_its_rank_and_the_node_by_its_row():
    everyone = [facts(rank, per_node=4, tflops=550.0 if rank == 5 else 700.0) for rank in range(8)]
    verdict = find_verdict(everyone, None, on_gpu=True)
    assert verdict.slow == [
        "rank 5 (host gpu1, GPU 1): matrix products at 550 TFLOP/s, less than 80% of the median 700"
    ]
    rows = [line.split() for line in verdict.table.splitlines()]
    assert [row[-1] for row in rows[1:]] == ["ok", "SLOW"]
    assert find_verdict(everyone, None, on_gpu=False).slow == [], "a CPU's cores serve others too"


def test_a_difference_from_the_other_nodes_is_broken():
    everyone = [facts(rank) for rank in range(3)]
    everyone[1] = facts(1, versions={"torch": "2.12.0", "driver": "1"}, device="NVIDIA A100", clock=-3.0)
    reported = find_verdict(everyone, None, on_gpu=True).broken
    assert [line.split(": ", 1)[1] for line in reported] == [
        "torch 2.12.0, others have 2.13.0",
        "driver 1, others have none",
        "device NVIDIA A100, others have NVIDIA H100",
        "its clock is 3 s behind the others'",
    ]
    assert all("1 (host gpu1" in line for line in reported)


@pytest.mark.parametrize(
    ("free", "need", "broken", "notes"),
    [
        (100, Need(10 * GB, 3, True), 0, 0),
        (25, Need(10 * GB, 3, True), 1, 0),
        (25, Need(10 * GB, 3, False), 0, 1),
        (5, Need(10 * GB, 3, False), 1, 0),
    ],
)
def test_the_disk_must_hold_the_necessary_checkpoints(free, need, broken, notes):
    verdict = find_verdict([facts(0, disk_free=free * GB)], need, on_gpu=True)
    assert (len(verdict.broken), len(verdict.notes)) == (broken, notes), verdict.words


def test_versions_that_must_be_equal():
    assert {"python", "torch", "deepspeed", "megatron-core", "this code"} <= versions().keys()
    assert len(code_version()) == 12
