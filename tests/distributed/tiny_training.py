"""A tiny training for the engine in any layout, and the same in plain torch on one process to compare it with.

from distributed.spawn import run_distributed
from distributed.tiny_training import TOP1, compare, reference, run_config, train

results = run_distributed(train, 4, [run_config(TOP1, tensor_model_parallel_size=2)])[0]
compare(results[0], reference(TOP1))
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.checkpoint import data_of
from megatron.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron.data.documents import uses_documents, with_documents
from megatron.model.gpt import GPTModel
from megatron.moe.balancing import learn, learned_buffers, learners
from megatron.parallel.groups import ALONE

VOCAB, SEQ, MICRO, STEPS, BATCH = 64, 8, 2, 3, 48
COUNT = BATCH // MICRO  # micro-batches of an update: every number of replicas up to 8 but 5 and 7 divides it
EPS = 1e-5  # the gradient of key biases is 0 in theory; a smaller epsilon would let Adam blow its rounding errors up
CLIP = 0.5
# DeepSpeed refuses fp16 on a processor that has no instructions for it
FP16_ON_CPU = torch.ops.mkldnn._is_mkldnn_fp16_supported()
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=SEQ,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.1,
)
# MoE losses large enough that leaving one out, or scaling it wrongly, changes everything
LOUD = {"moe_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
DENSE = MoEConfig()
TOP1 = MoEConfig(num_experts=(8,), moe_min_capacity=1, **LOUD)  # with random token selection
TOP2 = MoEConfig(num_experts=(4, 8), topk=2, **LOUD)
PLAIN, DOCUMENTS = DataConfig(), DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
EOD = 0
DROPLESS = MoEConfig(num_experts=(8,), moe_token_dropping=False, mlp_type="residual", **LOUD)
BALANCED = {
    "global aux loss": dataclasses.replace(DROPLESS, moe_router_load_balancing_type="global_aux_loss"),
    "quantile balancing": MoEConfig(
        num_experts=(8,),
        moe_min_capacity=1,
        moe_router_load_balancing_type="quantile_balancing",
        moe_router_center_input=True,
    ),
    "expert bias": MoEConfig(
        num_experts=(4, 8),
        topk=2,
        moe_router_load_balancing_type="none",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.1,
        moe_z_loss_coeff=0.1,
    ),
}


def run_config(
    moe: MoEConfig,
    precision: str = "fp32",
    recompute: bool = False,
    device: str = "cpu",
    data: DataConfig = PLAIN,
    model: ModelConfig = MODEL,
    **parallel,
) -> RunConfig:
    """A run of ``STEPS`` updates in the layout that ``parallel``, options of :class:`ParallelConfig`, says."""
    return RunConfig(
        model=model,
        moe=moe,
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(
            lr=1e-2, min_lr=1e-3, clip_grad=CLIP, adam_eps=EPS, precision=precision, initial_loss_scale_power=8
        ),
        data=data,
        training=TrainingConfig(
            train_tokens=STEPS * BATCH * SEQ,
            micro_batch_size=MICRO,
            global_batch_size=BATCH,
            checkpoint_activations=recompute,
            compile=False,
            device=device,
        ),
    )


def micro_batch(number: int, poison: bool = False, data: DataConfig = PLAIN) -> dict:
    """Micro-batch ``number`` of the run: text in which the next token mostly follows from the last; with ``data`` that
    tells documents apart, a few of them."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, VOCAB, (MICRO, 1), generator=generator)
    text = (start + torch.arange(SEQ + 1) * (1 + number % 3)) % VOCAB
    if uses_documents(data):
        text[torch.rand(text.shape, generator=generator) < 0.25] = EOD
    mask = torch.full((MICRO, SEQ), float("nan") if poison else 1.0)
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "sample_index": number * MICRO}
    return with_documents(batch, data, EOD)


class Trained(NamedTuple):
    """What a training did: figures of each update, and what it ended with."""

    losses: list[float]  # the LM loss, mean over the global batch
    norms: list[float]  # of the gradient, before clipping
    weights: dict[str, torch.Tensor]  # all parameters of the model, whole, in fp32
    moe: list[tuple]  # aux loss, z-loss, tokens of each expert, dropped assignments


_REFERENCES: dict[str, Trained] = {}


def reference(moe: MoEConfig, data: DataConfig = PLAIN, model: ModelConfig = MODEL) -> Trained:
    """The same training in thirty lines of torch: one process, no DeepSpeed, no sharding."""
    if repr((moe, data, model)) not in _REFERENCES:
        _REFERENCES[repr((moe, data, model))] = _train_plainly(moe, data, model)
    return _REFERENCES[repr((moe, data, model))]


def _train_plainly(moe: MoEConfig, data: DataConfig, shape: ModelConfig) -> Trained:
    from megatron.engine.engine import micro_batch_seed
    from megatron.engine.schedule import learning_rate

    run = run_config(moe)
    model = GPTModel(shape, moe, VOCAB, seed=run.training.seed)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() - (".experts." in name) >= 2]
    vectors = [p for name, p in named if p.dim() - (".experts." in name) < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
    losses, norms, figures = [], [], []
    for step in range(STEPS):
        outs = []
        for number in range(step * COUNT, (step + 1) * COUNT):
            batch = micro_batch(number, data=data)
            torch.manual_seed(micro_batch_seed(run.training.seed, batch["sample_index"]))
            documents = {name: batch[name] for name in ("position_ids", "cu_seqlens") if name in batch}
            loss, sums = model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], **documents)
            (loss / COUNT).backward()
            outs.append(sums)
        losses.append(sum(out.losses[0].item() for out in outs) / COUNT)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in adam.param_groups:
            group["lr"] = learning_rate(run.optimizer, (step + 1) * BATCH * SEQ, STEPS * BATCH * SEQ)
        adam.step()
        adam.zero_grad()
        learn(learners(model), None, ALONE, finite=True)
        figures.append(
            (
                sum(out.losses[1].item() for out in outs) / COUNT,
                sum(out.losses[2].item() for out in outs) / COUNT,
                [sum(counts).tolist() for counts in zip(*(out.counts for out in outs), strict=True)],
                sum(out.dropped for out in outs).tolist(),
            )
        )
    weights = {name: p.detach() for name, p in named} | learned_buffers(model)
    return Trained(losses, norms, weights, figures)


def build(run: RunConfig):
    """The engine of this process; all processes have met already."""
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups, choose_device
    from megatron.parallel.launch import Launch

    rank = dist.get_rank()
    launch = Launch(rank, dist.get_world_size(), rank, "127.0.0.1", 0, "test", node=rank // 2)
    topology = build_groups(run.parallel, launch, choose_device(run.training.device, rank))
    assert any(topology.expert_node_groups.values()) == run.parallel.moe_hierarchical_all_to_all
    return build_engine(run, topology, VOCAB)


def share(engine, first: int, end: int, poison: int | None = None) -> list[dict]:
    """This process's of the run's micro-batches from ``first`` to ``end``; ``poison`` has a loss that is not finite."""
    size, rank = engine._topology.data_parallel_size, engine._topology.data_parallel_rank
    data = engine._config.data
    return [micro_batch(n, poison=n == poison, data=data) for n in range(first, end) if n % size == rank]


def update(engine, step: int, poison: int | None = None):
    """Update number ``step`` of the run."""
    return engine.train_step(share(engine, step * COUNT, (step + 1) * COUNT, poison), (step + 1) * BATCH * SEQ)


def updates(engine, first: int, end: int) -> Trained:
    """Updates from number ``first`` to ``end``."""
    from megatron.training.metrics import mean_losses, reduce_sums

    losses, norms, figures = [], [], []
    for step in range(first, end):
        outcome = update(engine, step)
        assert not outcome.skipped
        sums = reduce_sums(outcome.sums)
        means = mean_losses(sums)
        losses.append(means["loss"])
        norms.append(outcome.grad_norm)
        copies = engine._topology.tensor_parallel_size  # each of these processes counts its micro-batches
        counts = [(counts // copies).tolist() for counts in sums.counts]
        figures.append((means["aux_loss"], means["z_loss"], counts, (sums.dropped // copies).tolist()))
    return Trained(losses, norms, whole(engine), figures)


def whole(engine, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """All global tensors, gathered from the boxes that each process would save; NaN where no process has a piece."""
    pieces: list = [None] * dist.get_world_size()
    mine = [
        (t.name, t.global_shape, b.offsets, data_of(b.tensor).cpu().clone())
        for t in engine.saved_tensors()
        for b in t.boxes
    ]
    dist.all_gather_object(pieces, mine)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, offsets, tensor in (piece for rank in pieces for piece in rank):
        if name.startswith(prefix):
            into = tensors.setdefault(name[len(prefix) :], torch.full(shape, float("nan")))
            into[tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))] = tensor
    return tensors


def train(runs: list[RunConfig]) -> list[Trained]:
    """Train each configuration, one after another in the same processes; the first one returns what they did."""
    from megatron.parallel.initialize import forget_groups

    results = []
    for run in runs:
        results.append(updates(build(run), 0, STEPS))
        forget_groups()
    return results if dist.get_rank() == 0 else []


class Errors(NamedTuple):
    """Largest absolute differences."""

    loss: float
    norm: float
    weights: float
    moe: float  # of aux loss and z-loss


def differences(found: Trained, expected: Trained) -> Errors:
    """How far two trainings are apart; NaN where one is. Tensors and counts must be of the same kind and number."""
    assert found.weights.keys() == expected.weights.keys()
    for mine, theirs in zip(found.moe, expected.moe, strict=True):
        assert mine[2:] == theirs[2:], f"tokens of each expert, and dropped ones: {mine[2:]} against {theirs[2:]}"

    def largest(mine, theirs) -> float:
        return float((torch.tensor(mine, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)).abs().max())

    weights = torch.stack([(found.weights[name] - value).abs().max() for name, value in expected.weights.items()])
    return Errors(
        loss=largest(found.losses, expected.losses),
        norm=largest(found.norms, expected.norms),
        weights=float(weights.max()),
        moe=largest([f[:2] for f in found.moe], [f[:2] for f in expected.moe]),
    )


def compare(found: Trained, expected: Trained, where: str = "", tolerance: float = 1e-5) -> None:
    """Assert that two trainings are the same up to ``tolerance``; NaN never is."""
    errors = differences(found, expected)
    assert all(error <= tolerance for error in errors), f"{where}: {errors}; {found[:2]} against {expected[:2]}"
    assert min(expected.norms) > CLIP, "clipping must be active for this test to mean anything"


def strayed(found: Trained, moe: MoEConfig) -> float:
    """How far a training's weights ended from the reference's, as a share of how far that came from the start."""
    expected, model = reference(moe), GPTModel(MODEL, moe, VOCAB, seed=run_config(moe).training.seed)
    start = {name: p.detach() for name, p in model.named_parameters()}

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[name] - value).square().sum() for name, value in b.items())) ** 0.5

    return distance(found.weights, expected.weights) / distance(expected.weights, start)


def with_dropout(run: RunConfig) -> RunConfig:
    """The same run with dropout."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_dropout=0.2, attention_dropout=0.2))
