"""The figures of a step in every layout, against plain torch that looks into attention and routers itself."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, PP, SP, TP
from distributed.tiny_training import (
    BALANCED,
    BATCH,
    COUNT,
    DENSE,
    DOCUMENTS,
    DROPLESS,
    FP16_ON_CPU,
    MODEL,
    SEQ,
    STEPS,
    TOP1,
    VOCAB,
    build,
    micro_batch,
    run_config,
    share,
    update,
    whole,
    with_dropout,
)

from megatron.config import RunConfig
from megatron.engine.engine import micro_batch_seed
from megatron.model.gpt import GPTModel

QK_NORM = dataclasses.replace(MODEL, qk_layernorm=True)
KINDS = ("attention", "router", "experts", "embedding", "rest")


def step(engine, number: int, monitored: bool):
    batches = share(engine, number * COUNT, (number + 1) * COUNT)
    return engine.train_step(batches, (number + 1) * BATCH * SEQ, monitored)


def first_steps(runs: list[RunConfig]) -> list[tuple]:
    """Of each run, what the first step says of itself: its figures and its gradient norm."""
    from megatron.parallel.initialize import forget_groups

    said = []
    for run in runs:
        result = step(build(run), 0, monitored=True)
        said.append((result.monitors, result.grad_norm))
        forget_groups()
    return said


def kind_of(name: str) -> str:
    return next((kind for kind in KINDS if kind in name.split(".")), "rest")


def expected(run: RunConfig, replicas: int) -> dict:
    """The figures of the first step of a run: the whole model on one process, in fp32."""
    model = GPTModel(run.model, run.moe, VOCAB, seed=run.training.seed)
    largest, inputs = [], {}

    def attention(q, k, v, attn_mask=None, is_causal=False, **_):
        S = q.size(2)
        mask = torch.ones(S, S, dtype=torch.bool).tril() if attn_mask is None else attn_mask[0, 0]
        logits = q[0].detach() @ k[0].detach().mT / math.sqrt(q.size(-1))
        largest.append(float(logits.masked_fill(~mask, -math.inf).max()))
        return true_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    true_attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    for layer, block in model.layers.items():
        if hasattr(block.mlp, "router"):
            block.mlp.register_forward_pre_hook(lambda _, x, layer=layer: inputs.setdefault(layer, []).append(x[0][0]))
    try:
        for number in range(COUNT):
            batch = micro_batch(number, data=run.data)
            torch.manual_seed(micro_batch_seed(run.training.seed, batch["sample_index"]))
            documents = {name: batch[name] for name in ("position_ids", "cu_seqlens") if name in batch}
            loss, _ = model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], **documents)
            (loss / COUNT).backward()
    finally:
        F.scaled_dot_product_attention = true_attention
    by_micro_batch = torch.tensor(largest).view(COUNT, run.model.num_layers)
    figures = {"max_attention_logit": by_micro_batch[-replicas:].amax(0).tolist()}
    if inputs:
        logits = [torch.cat(x[-replicas:]) @ model.layers[n].mlp.router.weight.T for n, x in inputs.items()]
        entropy = [torch.distributions.Categorical(logits=x).entropy().mean().item() for x in logits]
        spread = [(x - x.mean(-1, keepdim=True)).square().mean().sqrt().item() for x in logits]
        figures |= {"max_router_logit": [x.abs().max().item() for x in logits]}
        figures |= {"router_logit_std": spread, "router_entropy": entropy}
    squares = {kind: 0.0 for kind in KINDS if inputs or kind not in ("router", "experts")}
    for name, parameter in model.named_parameters():
        squares[kind_of(name)] += float(parameter.grad.double().square().sum())
    return figures | {"grad_norm": {kind: math.sqrt(value) for kind, value in squares.items()}}


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, check_dtype=False, msg=name)


RUNS = [
    (TOP1, {"model": QK_NORM}),
    (DROPLESS, {"recompute": True}),
    (DENSE, {"data": DOCUMENTS}),
]
HALF = ["bf16", *(["fp16"] if FP16_ON_CPU else [])]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {EP: (2,)}),
        (2, {PP: 2}),
        (2, {TP: 2}),
        pytest.param(4, {PP: 2, TP: 2, SP: True}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_figures_are_those_of_plain_torch_in_every_layout(size: int, layout: dict):
    runs = [run_config(moe, **options, **(layout if moe.enabled else without_experts(layout))) for moe, options in RUNS]
    replicas = 2 if EP in layout else 1
    runs += [run_config(TOP1, precision, **layout) for precision in HALF]
    wanted = [expected(run, replicas) for run in runs]
    for said in run_distributed(first_steps, size, runs):
        for (found, norm), figures, run in zip(said, wanted, runs, strict=True):
            half = run.optimizer.precision != "fp32"
            assert_close(found, figures, 5e-2 if half else 1e-5)
            assert math.hypot(*found["grad_norm"].values()) == pytest.approx(norm, rel=1e-5)
    assert max(wanted[1]["max_attention_logit"]) > 0.05, "attention logits that are nothing show nothing"


def without_experts(layout: dict) -> dict:
    return {name: value for name, value in layout.items() if name != EP}


def both(run: RunConfig) -> list[tuple]:
    """Three updates that are not monitored, and three that are."""
    from megatron.parallel.initialize import forget_groups

    made = []
    for monitored in (False, True):
        engine = build(run)
        results = [step(engine, number, monitored) for number in range(STEPS)]
        assert all((result.monitors is not None) == monitored for result in results)
        assert engine._monitors.samples.kept == {}, "memory is given back"
        made.append(([(r.grad_norm, r.sums.losses.tolist()) for r in results], whole(engine)))
        forget_groups()
    return made


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_bit_for_bit(precision: str):
    noisy = dataclasses.replace(BALANCED["quantile balancing"], moe_noise_policy="Jitter")  # all that keeps count
    for without, with_ in run_distributed(both, 2, with_dropout(run_config(noisy, precision, **{EP: (2,)}))):
        assert with_[0] == without[0]
        assert all(torch.equal(value, without[1][name]) for name, value in with_[1].items())


def with_planted_runaway() -> tuple[list[int], list[dict]]:
    """Updates of a warm-up, then with the queries of one layer scaled up; when warnings came, and which."""
    from megatron.training.clock import Step
    from megatron.training.hooks.hook import Outcome
    from megatron.training.hooks.instability import LEAST, InstabilityWarnings

    run = run_config(TOP1)
    engine, hook, came, logged = build(run), InstabilityWarnings(run), [], []
    hook.run = SimpleNamespace(log=lambda kind, **values: logged.append(values))
    for number in range(LEAST + 6):
        if number >= LEAST + 2:
            with torch.no_grad():  # the update takes it back
                engine.model.layers["2"].attention.qkv.weight[: MODEL.hidden_size] *= 3e4
        batches = share(engine, number * COUNT, number * COUNT + 2)
        result = engine.train_step(batches, (number + 1) * 10, monitored=True)
        hook.on_outcome(Outcome(Step(number, 0, 1), result, 1.0))
        came += [number - LEAST] * (len(logged) - len(came))
    return came, logged


@pytest.mark.distributed
def test_attention_that_runs_away_is_named_once_and_warm_up_is_not():
    ((came, logged),) = run_distributed(with_planted_runaway, 1)
    assert [(record["figure"], record["place"]) for record in logged] == [("max_attention_logit", "layer 2")]
    assert came == [3], "at the second of the updates that are too large"
    assert logged[0]["value"] > 50


def around_an_evaluation() -> tuple:
    engine = build(run_config(TOP1))
    engine.evaluate([micro_batch(100)])
    nothing = update(engine, 0)
    return nothing.monitors, len(engine._monitors.samples.kept), list(step(engine, 1, monitored=True).monitors)


@pytest.mark.distributed
def test_only_the_steps_that_ask_for_it_are_measured():
    ((nothing, kept, names),) = run_distributed(around_an_evaluation, 1)
    assert nothing is None
    assert kept == 0
    assert set(names) == {
        "max_attention_logit", "max_router_logit", "router_logit_std", "router_entropy", "grad_norm",
    }  # fmt: skip
