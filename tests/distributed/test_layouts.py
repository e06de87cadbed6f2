"""The matrix: every layout trains as plain torch on one process does.

Loss, global gradient norm, MoE losses, expert counts and every parameter after several updates with clipping and
gradient accumulation, in fp32 to 1e-5, in bf16 and fp16 to stated tolerances.

``python tests/distributed/test_layouts.py`` prints the table of docs/results.md.
"""

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.tiny_training import (
    BALANCED,
    DENSE,
    DROPLESS,
    FP16_ON_CPU,
    MODEL,
    TOP1,
    TOP2,
    compare,
    differences,
    reference,
    run_config,
    strayed,
    train,
    with_dropout,
)

from megatron.config import RunConfig

MODELS = {"dense": DENSE, "top-1, capacity": TOP1, "top-2, capacity": TOP2, "top-1, dropless, residual": DROPLESS}
TP, SP, PP, EP = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "moe_expert_parallel_size",
)
ETP = "enable_expert_tensor_parallelism"

# name -> processes, options; the processes that tensor and pipeline parallelism leave are data parallel
LAYOUTS: dict[str, tuple[int, dict]] = {
    "1 process": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {EP: (2,)}),
    "TP2": (2, {TP: 2}),
    "TP2 SP": (2, {TP: 2, SP: True}),
    "ETP2": (2, {TP: 2, ETP: True}),
    "PP2": (2, {PP: 2}),
    "DP3": (3, {}),
    "PP3, layers 2,1,1": (3, {PP: 3, "pipeline_layer_split": "2,1,1"}),
    "DP4": (4, {}),
    "EP2 x DP2 (expert-DP 2)": (4, {EP: (2,)}),
    "EP4": (4, {EP: (4,)}),
    "TP2 x DP2": (4, {TP: 2}),
    "TP2 x EP2": (4, {TP: 2, EP: (2,)}),
    "TP2 SP x EP2": (4, {TP: 2, SP: True, EP: (2,)}),
    "TP4 SP": (4, {TP: 4, SP: True}),
    "ETP2 SP x EP2": (4, {TP: 2, SP: True, ETP: True, EP: (2,)}),
    "ETP4": (4, {TP: 4, ETP: True}),
    "PP4": (4, {PP: 4}),
    "PP2 x DP2": (4, {PP: 2}),
    "PP2 x EP2": (4, {PP: 2, EP: (2,)}),
    "PP2 x TP2": (4, {PP: 2, TP: 2}),
    "PP2 x TP2 SP": (4, {PP: 2, TP: 2, SP: True}),
    "PP2 x ETP2": (4, {PP: 2, TP: 2, ETP: True}),
    "EP2, EP4 by layer": (4, {EP: (2, 4)}),
    "EP4 by way of 2 nodes": (4, {EP: (4,), "moe_hierarchical_all_to_all": True}),
    "TP2 x DP3": (6, {TP: 2}),
    "DP8": (8, {}),
    "EP2 x DP4 (expert-DP 4)": (8, {EP: (2,)}),
    "EP4 x DP2 (expert-DP 2)": (8, {EP: (4,)}),
    "TP2 SP x EP2 x DP2": (8, {TP: 2, SP: True, EP: (2,)}),
    "PP2 x EP2 x DP2": (8, {PP: 2, EP: (2,)}),
    "PP4 x EP2": (8, {PP: 4, EP: (2,)}),
    "PP2 x TP2 x EP2": (8, {PP: 2, TP: 2, EP: (2,)}),
    "PP2 x TP2 SP x EP2": (8, {PP: 2, TP: 2, SP: True, EP: (2,)}),
    "PP2 x TP2 x EP1, EP2 by layer": (8, {PP: 2, TP: 2, EP: (1, 2)}),
    "PP2 x ETP2 SP x EP2": (8, {PP: 2, TP: 2, SP: True, ETP: True, EP: (2,)}),
}  # fmt: skip


# every kind of parallelism once, for each run of the tests; `bash tests/run.sh --distributed` runs the whole matrix
CORE = {
    "1 process": tuple(MODELS),
    "DP2": ("dense", "top-1, capacity"),
    "EP2 x DP2 (expert-DP 2)": ("top-2, capacity", "top-1, dropless, residual"),
    "ETP2": ("top-1, dropless, residual",),
    "PP4": ("dense", "top-2, capacity"),
    "EP2, EP4 by layer": ("top-1, capacity",),
    "PP2 x TP2 SP x EP2": ("top-1, capacity",),
}


def marked(name: str, core: Collection[str]):
    """``name`` as a parameter of a test, which is left to the exhaustive runs if it is not in ``core``."""
    return pytest.param(name, marks=() if name in core else pytest.mark.exhaustive)


def cases(layout: str) -> dict[str, RunConfig]:
    """Name -> run of every model that the layout can hold; a dense one has no experts to spread."""
    options = LAYOUTS[layout][1]
    models = {n: m for n, m in MODELS.items() if m.enabled or not (options.get(ETP) or EP in options)}
    return {name: run_config(moe, **options) for name, moe in models.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "models"),
    [
        *(pytest.param(layout, models, id=layout) for layout, models in CORE.items()),
        *(
            pytest.param(layout, tuple(MODELS), id=f"{layout}, all models", marks=pytest.mark.exhaustive)
            for layout in LAYOUTS
        ),
    ],
)
def test_every_layout_trains_as_plain_torch(layout: str, models: tuple[str, ...]):
    runs = {name: run for name, run in cases(layout).items() if name in models}
    for (name, run), found in zip(runs.items(), _train(layout, runs), strict=True):
        compare(found, reference(run.moe), f"{layout}, {name}")


def _train(layout: str, runs: dict) -> list:
    return run_distributed(train, LAYOUTS[layout][0], list(runs.values()), timeout=300)[0]


@pytest.mark.distributed
@pytest.mark.exhaustive  # tests/distributed/test_expert_parallel.py does both for one layer
@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_that_travel_in_chunks_and_by_way_of_nodes_change_nothing(recompute: bool):
    options = {EP: (4,), "moe_overlap_chunks": 3, "moe_hierarchical_all_to_all": True}
    runs = [run_config(moe, recompute=recompute, **options) for moe in (TOP1, TOP2)]
    for moe, found in zip((TOP1, TOP2), run_distributed(train, 4, runs)[0], strict=True):
        compare(found, reference(moe))


RECOMPUTED = ("EP2", "TP2 SP x EP2", "PP2 x TP2 SP x EP2")


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [marked(layout, ("EP2",)) for layout in RECOMPUTED])
def test_recomputed_activations_change_nothing(layout: str):
    size, options = LAYOUTS[layout]
    (found,) = run_distributed(train, size, [run_config(TOP1, recompute=True, **options)], timeout=300)[0]
    compare(found, reference(TOP1), layout)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [marked(layout, ("TP2",)) for layout in ("TP2", "PP2 x TP2 SP x EP2")])
def test_norms_of_queries_and_keys_train_as_plain_torch(layout: str):
    size, options = LAYOUTS[layout]
    model = dataclasses.replace(MODEL, qk_layernorm=True)
    run = run_config(TOP1, recompute=True, model=model, **options)
    (found,) = run_distributed(train, size, [run], timeout=300)[0]
    compare(found, reference(TOP1, model=model), layout)
    assert abs(found.losses[-1] - reference(TOP1).losses[-1]) > 1e-4, "the norms do nothing here"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [marked(layout, ("EP4", "TP2")) for layout in LAYOUTS])
def test_balancers_learn_the_same_in_every_layout(layout: str):
    runs = {name: run_config(moe, recompute=True, **LAYOUTS[layout][1]) for name, moe in BALANCED.items()}
    for (name, run), found in zip(runs.items(), _train(layout, runs), strict=True):
        compare(found, reference(run.moe), f"{layout}, {name}")
        learned = [weight for weight_name, weight in found.weights.items() if ".balancer." in weight_name]
        assert len(learned) in (2, 4)
        assert all(weight.std() > 0.01 for weight in learned), "nothing was learned"


# What half precision may differ by after three updates: in the loss, relative to fp32; and in the weights, as a share
# of the way that they have gone (a learning rate of half or double the size is 0.5 or 1 away).
TOLERANCES = {"bf16": (2e-3, 0.3)} | ({"fp16": (1e-3, 0.15)} if FP16_ON_CPU else {})


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [marked(layout, ("EP2", "PP2")) for layout in ("1 process", *RECOMPUTED, "PP2")])
def test_half_precision_follows_fp32(layout: str):
    size, options = LAYOUTS[layout]
    runs = [run_config(TOP2, precision, **options) for precision in TOLERANCES]
    expected = torch.tensor(reference(TOP2).losses)
    trained = run_distributed(train, size, runs, timeout=300)[0]
    for (of_loss, of_weights), found in zip(TOLERANCES.values(), trained, strict=True):
        torch.testing.assert_close(torch.tensor(found.losses), expected, rtol=of_loss, atol=0.0)
        assert strayed(found, TOP2) < of_weights


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [marked(layout, ("DP2", "PP2 x EP2")) for layout in ("DP2", "EP2 x DP2 (expert-DP 2)", "PP2", "PP2 x EP2")],
)
def test_dropout_and_random_token_selection_are_those_of_one_process(layout: str):
    (one,) = run_distributed(train, 1, [with_dropout(run_config(TOP1))])[0]
    size, options = LAYOUTS[layout]
    (found,) = run_distributed(train, size, [with_dropout(run_config(TOP1, **options))])[0]
    compare(found, one, layout)
    assert abs(found.losses[0] - reference(TOP1).losses[0]) > 1e-3, "dropout does nothing here"


def table() -> None:
    """Print the measured errors as Markdown."""
    print("| layout | processes | " + " | ".join(MODELS) + " |\n|---|---:|" + "---|" * len(MODELS))
    worst = 0.0
    for layout, (size, _) in LAYOUTS.items():
        runs, cells = cases(layout), dict.fromkeys(MODELS, "")
        for name, found in zip(runs, _train(layout, runs), strict=True):
            errors = differences(found, reference(MODELS[name]))
            worst = max(worst, *errors)
            cells[name] = " / ".join(f"{error:.0e}" for error in errors[:3])
        print(f"| {layout} | {size} | " + " | ".join(cells.values()) + " |", flush=True)
    print(f"\nThe largest difference of all is {worst:.1e}.")


if __name__ == "__main__":
    table()
