"""Tensor parallelism under the engine against a plain torch loop on one process."""

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_engine import CASES, config, reference, train


def tensor(size: int, sequence: bool = False, shard_experts: bool = False) -> dict:
    return {
        "tensor_model_parallel_size": size,
        "sequence_parallel": sequence,
        "enable_expert_tensor_parallelism": shard_experts,
    }


# (processes, layout, expert-parallel size): what is left of the processes is data parallel
LAYOUTS = {
    "TP2": (2, tensor(2), 1),
    "TP2 SP": (2, tensor(2, True), 1),
    "TP2 DP2": (4, tensor(2), 1),
    "TP2 SP DP2": (4, tensor(2, True), 1),
    "TP2 EP2": (4, tensor(2), 2),
    "TP2 SP EP2": (4, tensor(2, True), 2),
    "TP4": (4, tensor(4), 1),
    "TP4 SP": (4, tensor(4, True), 1),
    "ETP2": (2, tensor(2, False, True), 1),
    "ETP2 SP EP2": (4, tensor(2, True, True), 2),
    "ETP4": (4, tensor(4, False, True), 1),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_trains_as_plain_torch(layout):
    size, flags, expert_parallel = LAYOUTS[layout]
    cases = {n: moe for n, (moe, _) in CASES.items() if moe.enabled or not flags["enable_expert_tensor_parallelism"]}
    runs = [config(moe, expert_parallel if moe.enabled else 1, layout=flags) for moe in cases.values()]
    results = run_distributed(train, size, runs, timeout=240)[0]
    for (name, moe), (history, parameters) in zip(cases.items(), results, strict=True):
        expected, weights = reference(moe)
        where = f"{name}, {layout}: {history} against {expected}"
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=where)
        assert parameters.keys() == weights.keys()
        for key, value in weights.items():
            error = (parameters[key] - value).abs().max()
            assert error <= 1e-5, f"{key}: {error}; {where}"  # NaN fails too
        assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"
