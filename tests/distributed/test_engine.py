"""The engine on several processes against a plain torch loop on one: loss, gradient norm and every parameter."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron.model.gpt import GPTModel

VOCAB, SEQ, MICRO, STEPS, BATCH = 64, 16, 2, 4, 16
EPS = 1e-5  # the gradient of key biases is 0 in theory; a smaller epsilon would let Adam blow its rounding errors up
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=SEQ,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.1,
)
DENSE = MoEConfig()
MOE = MoEConfig(num_experts=(4,), moe_rts=True, moe_train_capacity_factor=1.0, moe_min_capacity=1)
MOE_TOP2 = MoEConfig(num_experts=(4, 8), topk=2, moe_train_capacity_factor=1.0, moe_z_loss_coeff=0.1)
DROPLESS = MoEConfig(num_experts=(8,), moe_token_dropping=False, mlp_type="residual")


def config(
    moe: MoEConfig, expert_parallel: int = 1, precision: str = "fp32", layout: dict | None = None, **training
) -> RunConfig:
    return RunConfig(
        model=MODEL,
        moe=moe,
        parallel=ParallelConfig(moe_expert_parallel_size=expert_parallel, **(layout or {})),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, clip_grad=0.5, adam_eps=EPS, precision=precision),
        training=TrainingConfig(
            train_tokens=STEPS * BATCH * SEQ, micro_batch_size=MICRO, global_batch_size=BATCH, device="cpu", **training
        ),
    )


def micro_batch(number: int, poison: bool = False) -> dict:
    """Micro-batch ``number`` of the run: text in which the next token mostly follows from the last."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, VOCAB, (MICRO, 1), generator=generator)
    text = (start + torch.arange(SEQ + 1) * (1 + number % 3)) % VOCAB
    mask = torch.full((MICRO, SEQ), float("nan") if poison else 1.0)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "sample_index": number * MICRO}


def reference(moe: MoEConfig, steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same training in twenty lines of torch: one process, no DeepSpeed, no sharding."""
    from megatron.engine.engine import micro_batch_seed
    from megatron.engine.schedule import learning_rate

    run = config(moe)
    model = GPTModel(MODEL, moe, VOCAB, seed=run.training.seed)
    named = list(model.named_parameters())
    matrices = [p for _, p in named if p.dim() - getattr(p, "is_expert", False) >= 2]
    vectors = [p for _, p in named if p.dim() - getattr(p, "is_expert", False) < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
    history, count = [], BATCH // MICRO
    for step in range(steps):
        total = 0.0
        for number in range(step * count, (step + 1) * count):
            batch = micro_batch(number)
            torch.manual_seed(micro_batch_seed(run.training.seed, batch["sample_index"]))
            out = model(batch["tokens"], batch["labels"], batch["loss_mask"])
            loss = out.lm_loss + moe.moe_loss_coeff * out.aux_loss + moe.moe_z_loss_coeff * out.z_loss
            (loss / count).backward()
            total += out.lm_loss.item() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = learning_rate(run.optimizer, (step + 1) * BATCH * SEQ, STEPS * BATCH * SEQ)
        adam.step()
        adam.zero_grad()
        history.append((total, norm.item()))
    return history, {name: p.detach() for name, p in named}


def build(run: RunConfig):
    """Topology and engine of this process; all processes have met already."""
    from megatron.engine.engine import Engine
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    rank = dist.get_rank()
    launch = Launch(rank, dist.get_world_size(), rank, "127.0.0.1", 0, "test", node=rank // 2)
    topology = build_groups(run.parallel, launch, torch.device("cpu"))
    assert (topology.expert_node_groups is not None) == run.parallel.moe_hierarchical_all_to_all
    model = GPTModel(
        run.model,
        run.moe,
        VOCAB,
        topology.expert_group,
        topology.tensor_group,
        seed=run.training.seed,
        checkpoint_activations=run.training.checkpoint_activations,
    )
    return Engine(model, run, topology)


def my_micro_batches(step: int, poison: int | None = None, model_parallel: int = 1) -> list[dict]:
    """This process's micro-batches, where ``model_parallel`` neighbours hold one copy of the model."""
    count, rank, size = BATCH // MICRO, dist.get_rank() // model_parallel, dist.get_world_size() // model_parallel
    return [micro_batch(n, poison=n == poison) for n in range(step * count, (step + 1) * count) if n % size == rank]


def whole(engine, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """All global tensors, gathered from the boxes that each rank would save."""
    pieces: list = [None] * dist.get_world_size()
    mine = [(t.name, t.global_shape, b.offsets, b.tensor.clone()) for t in engine.saved_tensors() for b in t.boxes]
    dist.all_gather_object(pieces, mine)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, offsets, tensor in (piece for rank in pieces for piece in rank):
        if name.startswith(prefix):
            into = tensors.setdefault(name[len(prefix) :], torch.full(shape, float("nan")))
            into[tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))] = tensor
    return tensors


def train(runs: list[RunConfig]) -> list:
    """Train each configuration; returns its losses, gradient norms and final parameters."""
    from megatron.parallel.initialize import forget_groups
    from megatron.training.metrics import mean_losses, reduce_sums

    results = []
    for run in runs:
        engine = build(run)
        history = []
        for step in range(STEPS):
            micro_batches = my_micro_batches(step, model_parallel=run.parallel.tensor_model_parallel_size)
            outcome = engine.train_step(micro_batches, (step + 1) * BATCH * SEQ)
            assert not outcome.skipped
            history.append((mean_losses(reduce_sums(outcome.sums))["loss"], outcome.grad_norm))
        results.append((history, whole(engine)))
        forget_groups()
    return results


CASES = {
    "dense": (DENSE, (1,)),
    "top-1 with capacity": (MOE, (1, 2, 4)),
    "top-2, experts per layer": (MOE_TOP2, (1, 2, 4)),
    "dropless residual": (DROPLESS, (1, 2, 4)),
}


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_processes_trains_as_plain_torch(size):
    runs = [(name, moe, ep) for name, (moe, degrees) in CASES.items() for ep in degrees if ep <= size]
    results = run_distributed(train, size, [config(moe, ep) for _, moe, ep in runs])[0]
    for (name, moe, ep), (history, parameters) in zip(runs, results, strict=True):
        expected, weights = reference(moe)
        message = f"{name}, expert parallel {ep} on {size}: {history} against {expected}"
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=message)
        assert parameters.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(
                parameters[key],
                value,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, key=key, where=message: f"{key}: {m}; {where}",
            )
        assert expected[0][1] > 0.5, "clipping must be active for this test to mean anything"


@pytest.mark.distributed
def test_tokens_in_chunks_and_by_way_of_nodes_train_as_plain_torch():
    exchange = {"moe_hierarchical_all_to_all": True, "moe_overlap_chunks": 3}
    chunks = {"moe_overlap_chunks": 2}
    cases = [
        (MOE, config(MOE, 4, layout=exchange, checkpoint_activations=True)),
        (DROPLESS, config(DROPLESS, 4, layout={"moe_hierarchical_all_to_all": True})),
        (MOE_TOP2, config(MOE_TOP2, 2, layout=chunks, checkpoint_activations=True)),
    ]
    results = run_distributed(train, 4, [run for _, run in cases])[0]
    for (moe, _), (history, parameters) in zip(cases, results, strict=True):
        expected, weights = reference(moe)
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(parameters[key], value, rtol=1e-5, atol=1e-5)
    low, plain = run_distributed(train, 2, [config(MOE, 2, "bf16", chunks), config(MOE, 2, "bf16")])[0]
    torch.testing.assert_close(torch.tensor(low[0]), torch.tensor(plain[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.distributed
def test_bf16_and_activation_checkpointing():
    runs = [config(MOE, 2, "bf16"), config(MOE, 2, checkpoint_activations=True)]
    bf16, recomputed = run_distributed(train, 2, runs)[0]
    expected, weights = reference(MOE)
    losses = torch.tensor([loss for loss, _ in expected])
    for (history, _), tolerance in ((bf16, 5e-2), (recomputed, 1e-5)):
        found = torch.tensor([loss for loss, _ in history])
        torch.testing.assert_close(found, losses, rtol=tolerance, atol=tolerance)
    for key, value in weights.items():
        torch.testing.assert_close(recomputed[1][key], value, rtol=1e-5, atol=1e-5)


def not_finite(precision: str) -> tuple:
    engine = build(config(MOE, 2, precision))
    engine.train_step(my_micro_batches(0), BATCH * SEQ)
    before, moments = whole(engine), whole(engine, "exp_avg.")
    bad = engine.train_step(my_micro_batches(1, poison=BATCH // MICRO), 2 * BATCH * SEQ)
    after, moments_after = whole(engine), whole(engine, "exp_avg.")
    good = engine.train_step(my_micro_batches(2), 3 * BATCH * SEQ)
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    changed += [k for k in moments if not torch.equal(moments[k], moments_after[k])]
    return bad.skipped, changed, good.skipped, good.grad_norm, engine.scalar_state()["adam_step"]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(precision):
    for skipped, changed, good_skipped, norm, adam_step in run_distributed(not_finite, 2, precision):
        assert skipped
        assert changed == []
        assert not good_skipped
        assert 0 < norm < float("inf")
        assert adam_step == 2
