"""Other layouts of a run: which fit, which is fastest, and which is nearest to one that does not fit.

Varied are tensor, pipeline and expert parallelism, micro-batch and activation checkpointing. Tensor parallelism stays
inside a node and comes with sequence parallelism; experts stay replicated or sharded over it as the run says.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator

from megatron.config import RunConfig
from megatron.config.errors import ConfigError, divisors
from megatron.config.validation import validate_numbers
from megatron.planning.memory import memory
from megatron.planning.plan import Machine, Plan, make_plan

LARGEST_MICRO_BATCH = 64
SECONDS = 30.0  # after which no further layout is looked at


def layouts(config: RunConfig, world: int, node: int) -> Iterator[RunConfig]:
    """The run in every layout that ``world`` processes can have.

    A batch ramp-up or a placement of pipeline layers that does not fit a layout is left out of it.
    """
    model, moe = config.model, config.moe
    batch = config.training.global_batch_size
    counts = [experts for experts in moe.experts_per_layer(model.num_layers) if experts > 1]
    for tensor in divisors(math.gcd(model.num_attention_heads, model.ffn_size, world)):
        if node % tensor:
            continue
        for stages in divisors(world // tensor):
            replicas = world // tensor // stages
            if stages > model.num_layers or batch % replicas:
                continue
            degrees = divisors(math.gcd(replicas, *counts)) if counts else [1]
            sizes = [n for n in divisors(batch // replicas) if n <= LARGEST_MICRO_BATCH and n & (n - 1) == 0]
            for degree, micro, recompute in itertools.product(degrees, sizes, (False, True)):
                if stages > 1 and batch // replicas // micro < stages:  # most of such a pipeline waits
                    continue
                yield from _valid(_changed(config, tensor, stages, degree, micro, recompute), world)


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Plans of the layouts that fit, the fastest first; how many layouts there are, and how many there was time for."""

    plans: list[Plan]
    layouts: int
    tried: int

    @property
    def in_words(self) -> str:
        """Whose plans these are."""
        if self.tried == self.layouts:
            return f"{self.layouts} layouts"
        return f"{self.tried} layouts, taken at random from {self.layouts} because there was no time for more"


def fitting(config: RunConfig, machine: Machine, vocab_size: int) -> SearchResult:
    """Plans of all layouts that fit into the machine's GPUs, or of those that there is time for.

    The layout that ``config`` itself has does not matter.

    Args:
        config: the run.
        machine: what it is to run on.
        vocab_size: padded here to what each layout needs.

    Raises:
        ConfigError: the machine's device is not known, or no layout of this run is valid.
    """
    device, latest = machine.device, time.monotonic() + SECONDS
    if device is None:
        raise ConfigError("nothing is known of this GPU, so layouts cannot be ranked; name one with --gpu")
    _check_all_else(config)
    found = list(layouts(config, machine.world, machine.node))
    if not found:
        validate_numbers(config, machine.world)  # tells why its own is not
        raise ConfigError(f"no layout of this run is valid on {machine.world} processes; take another number of them")
    random.Random(0).shuffle(found)  # similar ones are adjacent
    plans, tried = [], 0
    for other in found:
        padded = other.model.padded_vocab_size(vocab_size, other.parallel.tensor_model_parallel_size)
        if memory(other, machine.world, padded, kernels=machine.kernels).peak <= device.usable:
            plans.append(make_plan(other, machine, padded))
        tried += 1
        if time.monotonic() > latest:
            break
    return SearchResult(sorted(plans, key=_seconds), len(found), tried)


def nearest(config: RunConfig, found: SearchResult) -> Plan | None:
    """The layout that changes least in a run; the fastest of equally near ones. None if none fits."""
    return min(found.plans, key=lambda other: (_distance(config, other.config), _seconds(other)), default=None)


def _seconds(plan: Plan) -> float:
    """Of an update."""
    assert plan.step is not None  # plans are made for known devices only
    return plan.step.seconds


def flags_of(config: RunConfig) -> str:
    """The flags that give a run this layout."""
    parallel, training = config.parallel, config.training
    words = [
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
        "--sequence-parallel" if parallel.sequence_parallel else "--no-sequence-parallel",
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
        f"--micro-batch-size {training.micro_batch_size}",
        "--checkpoint-activations" if training.checkpoint_activations else "--no-checkpoint-activations",
    ]
    if config.moe.enabled:
        words.append(f"--moe-expert-parallel-size {' '.join(map(str, parallel.moe_expert_parallel_size))}")
    if training.rampup_batch_size is None:
        words.append("--rampup-batch-size none")
    return " ".join(words)


def _check_all_else(config: RunConfig) -> None:
    """Raises ConfigError for what is wrong in every layout, as it shows on one process."""
    alone = _changed(config, 1, 1, 1, 1, False)
    parallel = dataclasses.replace(alone.parallel, moe_hierarchical_all_to_all=False, moe_overlap_chunks=1)
    training = dataclasses.replace(alone.training, rampup_batch_size=None)
    validate_numbers(dataclasses.replace(alone, parallel=parallel, training=training), 1)


def _changed(config: RunConfig, tensor: int, stages: int, degree: int, micro: int, recompute: bool) -> RunConfig:
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        pipeline_layer_split=None,
        moe_expert_parallel_size=(degree,),
        sequence_parallel=tensor > 1,
        enable_expert_tensor_parallelism=config.parallel.enable_expert_tensor_parallelism and tensor > 1,
    )
    training = dataclasses.replace(config.training, micro_batch_size=micro, checkpoint_activations=recompute)
    return dataclasses.replace(config, parallel=parallel, training=training)


def _valid(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """The configuration, if need be without its batch ramp-up; nothing if it is wrong in another way."""
    for ramp in dict.fromkeys((config.training.rampup_batch_size, None)):
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, rampup_batch_size=ramp))
        try:
            validate_numbers(config, world)
        except ConfigError:
            continue
        yield config
        return


def _distance(one: RunConfig, other: RunConfig) -> float:
    """How much a layout differs: doublings of each size, those that change more of a run's numbers counted more."""

    def doublings(first: int, second: int) -> float:
        return abs(math.log2(first / second))

    ours, theirs = one.parallel, other.parallel
    return (
        doublings(one.training.micro_batch_size, other.training.micro_batch_size)
        + (one.training.checkpoint_activations != other.training.checkpoint_activations)
        + doublings(max(ours.moe_expert_parallel_size), max(theirs.moe_expert_parallel_size))
        + 2 * doublings(ours.tensor_model_parallel_size, theirs.tensor_model_parallel_size)
        + 3 * doublings(ours.pipeline_model_parallel_size, theirs.pipeline_model_parallel_size)
        + (one.training.rampup_batch_size != other.training.rampup_batch_size)
    )
