"""All checks of a run's nodes, in the order in which one needs the other."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.checkpoint.folder import complete_checkpoints
from megatron.config import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.parallel.failure_monitor import FailureMonitor
from megatron.parallel.groups import member_group
from megatron.parallel.initialize import Topology
from megatron.parallel.watchdog import Watchdog
from megatron.planning.plan import Machine, make_plan
from megatron.preflight.facts import Facts, check_shared, compare_clocks, look
from megatron.preflight.speed import LinkSpeeds, measure_links, measure_products
from megatron.preflight.verdict import Need, Verdict, find_verdict

LIMIT = 60.0  # s for each check; then the ranks that are behind are named, and the run ends


def preflight(config: RunConfig, topology: Topology, monitor: FailureMonitor | None) -> Verdict:
    """Check all nodes of a run. All ranks call it together; the verdict is the same on all.

    Args:
        config: of the run, its numbers valid.
        topology: of this rank.
        monitor: this rank's failure monitor, which finds a rank that hangs in a check.
    """
    watchdog = Watchdog(None, LIMIT, None, topology, monitor, always=True)
    try:
        nodes = _nodes(topology)
        first_of_node = topology.launch.rank == nodes[topology.launch.node][0]
        watchdog.begin(1, "preflight: versions, data, disk")
        facts = look(config, topology, first_of_node)
        check_shared(config, facts, topology, first_of_node)
        need = _need(config, topology, facts) if topology.is_first else None
        watchdog.begin(2, "preflight: clocks")
        compare_clocks(facts, topology)
        watchdog.begin(3, "preflight: matrix products")
        try:
            facts.tflops, facts.computes = measure_products(topology.device)
            if not facts.computes:
                facts.problems.append("a matrix product came out wrong: the device miscomputes; take it out of service")
        except RuntimeError as error:
            facts.computes = False
            facts.problems.append(f"the device computes nothing: {next(iter(str(error).splitlines()), '')}")
        everyone = _gather(facts, topology)
        if all(each.computes and not each.crowded for each in everyone):  # NCCL hangs where it finds no memory
            _measure_links(facts, topology, nodes, watchdog)
            everyone = _gather(facts, topology)
        needs: list[Need | None] = [need]
        if topology.launch.world_size > 1:
            dist.broadcast_object_list(needs, src=0, group=topology.control_group)
        return find_verdict(everyone, needs[0], on_gpu=topology.device.type == "cuda")
    finally:
        watchdog.close()
        if topology.device.type == "cuda":  # as if it had not been
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(topology.device)


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours among so many nodes in a ring, in rounds in which each node is in one pair at most.

    With three nodes or more, each is in two pairs: a slow node is slow in both, its neighbours in one.
    """
    if nodes < 2:
        return []
    if nodes == 2:
        return [[(0, 1)]]
    found = [[(n, n + 1) for n in range(first, nodes - 1, 2)] for first in (0, 1)]
    last = (nodes - 1, 0)
    if nodes % 2:
        return [*found, [last]]
    found[1].append(last)
    return found


def _nodes(topology: Topology) -> dict[int, list[int]]:
    """The ranks of each node, nodes in the order of their first ranks."""
    gathered = _gather(topology.launch.node, topology)
    nodes: dict[int, list[int]] = {}
    for rank, node in enumerate(gathered):
        nodes.setdefault(node, []).append(rank)
    return nodes


def _gather(mine: object, topology: Topology) -> list:
    gathered: list = [mine] * topology.launch.world_size
    if len(gathered) > 1:
        dist.all_gather_object(gathered, mine, group=topology.control_group)
    return gathered


def _need(config: RunConfig, topology: Topology, facts: Facts) -> Need | None:
    """What the run will write; None if that is nothing, or not known because the tokenizer cannot be read."""
    if config.checkpoint.save is None:
        return None
    try:
        there = len(complete_checkpoints(Path(config.checkpoint.save)))
        vocab_size = config.model.padded_vocab_size(
            build_tokenizer(config.data).vocab_size, topology.tensor_parallel_size
        )
    except (ValueError, OSError) as error:
        facts.problems.append(str(error))
        return None
    size = make_plan(config, Machine(topology.launch.world_size), vocab_size).checkpoint_bytes
    training, checkpoint = config.training, config.checkpoint
    every = checkpoint.save_interval * training.global_batch_size * config.model.seq_length
    saves = 1 + ((training.train_tokens or 0) // every if every else 0)
    kept = min(checkpoint.keep_last + 1, saves) if checkpoint.keep_last else saves
    return Need(size, max(kept - there, 1), checkpoint.keep_last > 0)


def _measure_links(facts: Facts, topology: Topology, nodes: dict[int, list[int]], watchdog: Watchdog) -> None:
    """Inside each node, between pairs of nodes, and all together."""
    mine, order = topology.launch.node, list(nodes)
    position = order.index(mine)
    watchdog.begin(4, f"preflight: links of {facts.host}")
    facts.inside = _links_of(nodes[mine], topology)
    for number, pairs in enumerate(rounds(len(nodes))):
        watchdog.begin(5 + number, f"preflight: links between nodes, round {number + 1}")
        for pair in pairs:
            if position in pair:
                other = order[sum(pair) - position]
                links = _links_of(sorted(nodes[mine] + nodes[other]), topology)
                if links is not None:
                    facts.pairs[other] = links
    watchdog.begin(9, "preflight: links of all nodes")
    if len(nodes) > 2:
        facts.everywhere = measure_links(member_group(dist.group.WORLD), topology.device)


def _links_of(ranks: Sequence[int], topology: Topology) -> LinkSpeeds | None:
    if len(ranks) < 2:
        return None
    group = member_group(dist.new_group(list(ranks), use_local_synchronization=True, group_desc="preflight"))
    try:
        return measure_links(group, topology.device)
    finally:
        if topology.device.type == "cuda":
            torch.cuda.synchronize(topology.device)
        dist.destroy_process_group(group)
