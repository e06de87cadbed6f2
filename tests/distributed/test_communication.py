"""The planned bytes of an update are those that the ranks hand to torch.distributed."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, ETP, PP, SP, TP
from distributed.tiny_training import BATCH, COUNT, DENSE, DROPLESS, SEQ, VOCAB, build, run_config, share
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import MoEConfig, RunConfig
from megatron.planning.communication import PURPOSES, communication

PYRAMID = MoEConfig(num_experts=(4, 8), moe_min_capacity=1)
NORMS = 64  # bytes; the plan leaves reductions of a few numbers out


class Count(TorchDispatchMode):
    """Adds up what each rank sends as the plan counts it, by purpose."""

    def __init__(self, topology) -> None:
        super().__init__()
        self.sent = dict.fromkeys(PURPOSES, 0.0)
        self._calls = {"alltoall": "all-to-all", "send": "pipeline"}
        ours = {"dense": topology.data_parallel_group, "tensor": topology.tensor_parallel_group}
        self._groups = {group.group_name: what for what, group in ours.items() if group is not None}
        for group in topology.expert_data_groups.values():
            self._groups.setdefault(group.group_name, "experts")
        # a pipeline reduces over groups that DeepSpeed has made: those that are not like our data group join two stages
        self._data = dist.get_process_group_ranks(topology.data_parallel_group)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_").split("_")[0]
            if name not in ("recv", "barrier"):
                self._add(name, args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: tuple) -> None:
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        size = group.size()
        whole = max(_bytes(args[0]), _bytes(args[1]))  # of an all-gather the output, of a reduce-scatter the input
        shapes = name == "send" and not args[0][0].is_floating_point()  # once, of the activations to come
        if whole <= NORMS or shapes:
            return
        factor = {"send": 1.0, "allreduce": 2 * (size - 1) / size}.get(name, (size - 1) / size)
        theirs = "dense" if dist.get_process_group_ranks(group) == self._data else "pipeline"
        purpose = self._calls.get(name) or self._groups.get(group.group_name, theirs)
        self.sent[purpose] += factor * whole


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def count(runs: list[RunConfig]) -> list[dict[str, float]]:
    from megatron.parallel.initialize import forget_groups

    counted = []
    for run in runs:
        engine = build(run)
        micro_batches = share(engine, 0, COUNT)
        with Count(engine._topology) as mode:
            engine.train_step(micro_batches, BATCH * SEQ)
        counted.append(mode.sent)
        forget_groups()
    return counted


def run(moe: MoEConfig, precision: str = "bf16", **parallel) -> RunConfig:
    made = run_config(moe, precision, recompute=True, **parallel)
    # as in the published runs; without dropout torch stops a layer's recomputation before its last exchange
    return dataclasses.replace(made, model=dataclasses.replace(made.model, hidden_dropout=0.1))


def in_bf16(made: RunConfig) -> RunConfig:
    return dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer, grad_reduce_in_bf16=True))


CASES = {
    "dense, fp32": run(DENSE, "fp32"),
    "two degrees, bf16 gradients": in_bf16(run(PYRAMID, **{EP: (2, 4)})),
    "two degrees": run(PYRAMID, **{EP: (2, 4)}),
    "TP2": run(PYRAMID, **{EP: (1, 2), TP: 2}),
    "TP2 SP": run(PYRAMID, **{EP: (2,), TP: 2, SP: True}),
    "TP2 SP ETP": run(PYRAMID, **{EP: (2,), TP: 2, SP: True, ETP: True}),
    "TP2 SP, dropless residual": run(DROPLESS, **{TP: 2, SP: True}),
    "PP2": run(PYRAMID, **{EP: (2,), PP: 2}),
    "PP2 x TP2 SP": run(PYRAMID, **{PP: 2, TP: 2, SP: True}),
}


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_planned_bytes_are_those_sent():
    ranks = run_distributed(count, 4, list(CASES.values()))
    for number, (name, made) in enumerate(CASES.items()):
        planned = communication(made, 4, VOCAB, node=4)
        counted = {what: sum(rank[number][what] for rank in ranks) / 4 for what in PURPOSES}
        for what in PURPOSES:  # ZeRO pads a little
            assert counted[what] == pytest.approx(planned[what].total, rel=0.01), f"{name}, {what}"
