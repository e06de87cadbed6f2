"""Layers with different degrees of expert parallelism in one model, beyond the layouts of ``test_layouts.py``."""

from pathlib import Path

import pytest
from distributed.spawn import run_distributed
from distributed.test_layout_resume import compare_ended, resume, save_then_go_on
from distributed.test_layouts import EP, ETP, PP, SP, TP, marked
from distributed.tiny_training import DROPLESS, LOUD, TOP2, compare, reference, run_config, train

from megatron.config import MoEConfig

PYRAMID = MoEConfig(num_experts=(4, 8), moe_min_capacity=1, **LOUD)
CASES: dict[str, tuple[int, dict[str, tuple[MoEConfig, dict]]]] = {
    "4 processes": (
        4,
        {
            "8 experts on 4 and 8 on 2 processes": (DROPLESS, {EP: (4, 2)}),
            "TP2 SP, EP 1 and 2": (PYRAMID, {EP: (1, 2), TP: 2, SP: True}),
            "PP2, one stage of degree 2, the other of 1": (PYRAMID, {EP: (2, 1), PP: 2}),
        },
    ),
    "4 processes, more": (
        4,
        {
            "EP 4 and 1": (PYRAMID, {EP: (4, 1)}),
            "top-2, EP 1 and 2": (TOP2, {EP: (1, 2)}),
            "ETP2, EP 2 and 1": (PYRAMID, {EP: (2, 1), TP: 2, ETP: True}),
        },
    ),
    "8 processes": (8, {"EP 2 and 4, expert-data 4 and 2": (PYRAMID, {EP: (2, 4)})}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", [marked(name, ("4 processes",)) for name in CASES])
def test_layers_of_different_degrees_train_as_plain_torch(name: str):
    size, cases = CASES[name]
    results = run_distributed(train, size, [run_config(moe, **options) for moe, options in cases.values()])[0]
    for (case, (moe, _)), found in zip(cases.items(), results, strict=True):
        compare(found, reference(moe), case)


@pytest.mark.distributed
def test_bf16_has_one_gradient_norm_over_all_degrees_and_stages():
    options = [{EP: (2, 4)}, {EP: (2, 1), PP: 2}]
    for found in run_distributed(train, 4, [run_config(PYRAMID, "bf16", **o) for o in options])[0]:
        expected = reference(PYRAMID)
        assert found.norms[0] == pytest.approx(expected.norms[0], rel=2e-2)  # later ones drift apart
        assert found.losses == pytest.approx(expected.losses, rel=2e-2)


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_a_checkpoint_of_several_degrees_resumes_as_one_degree_and_back(tmp_path: Path):
    for saver, loaders in (((2, 4), [(1,), (4,)]), ((1,), [(2, 4)]), ((4,), [(2, 4)])):
        folder = str(tmp_path / str(saver))
        expected = run_distributed(save_then_go_on, 4, folder, run_config(PYRAMID, **{EP: saver}), True)[0]
        for loader in loaders:
            found = run_distributed(resume, 4, folder, run_config(PYRAMID, **{EP: loader}))[0]
            compare_ended(found, expected, f"saved {saver}, resumed {loader}")
