"""A training in bf16 that is small, and large enough for the kernels of large ones."""

import torch
import torch.distributed as dist
from distributed.tiny_training import Trained, whole

from megatron.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

VOCAB, SEQ, MICRO, COUNT, STEPS = 1024, 512, 4, 2, 10


def build(
    moe: MoEConfig,
    dropout: float = 0.1,
    expert_parallel: int = 1,
    data: DataConfig | None = None,
    qk_layernorm: bool = False,
    **training,
):
    """The engine of this process on its GPU; all processes, which are data parallel, have met already."""
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups, forget_groups
    from megatron.parallel.launch import Launch

    rank, size = dist.get_rank(), dist.get_world_size()
    run = RunConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            seq_length=SEQ,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            qk_layernorm=qk_layernorm,
        ),
        moe=moe,
        parallel=ParallelConfig(moe_expert_parallel_size=(expert_parallel,)),
        optimizer=OptimizerConfig(lr=1e-3),
        data=data or DataConfig(),
        training=TrainingConfig(
            train_tokens=10**9, micro_batch_size=MICRO, global_batch_size=MICRO * COUNT * size, **training
        ),
    )
    forget_groups()
    device = torch.device("cuda", torch.cuda.current_device())
    topology = build_groups(run.parallel, Launch(rank, size, rank, "127.0.0.1", 0, "test"), device)
    return build_engine(run, topology, VOCAB)


def batch(number: int, length: int = SEQ) -> dict:
    """Micro-batch ``number``: text in which the next token mostly follows from the last."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, VOCAB, (MICRO, 1), generator=generator)
    text = (start + torch.arange(length + 1) * (1 + number % 7)) % VOCAB
    mask = (torch.arange(length) < length - number % 3).float().expand(MICRO, -1)
    made = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask}
    return {name: x.contiguous().pin_memory() for name, x in made.items()} | {"sample_index": number * MICRO}


def share(step: int, count: int = COUNT) -> list[dict]:
    """This process's micro-batches of update ``step``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [batch((step * count + i) * size + rank) for i in range(count)]


def updates(engine, first: int, end: int, count: int = COUNT) -> Trained:
    """Updates ``first`` to ``end`` of ``count`` micro-batches on each process, and an evaluation in their middle."""
    losses, norms, moe = [], [], []
    for step in range(first, end):
        result = engine.train_step(share(step, count), (step + 1) * MICRO * count * SEQ)
        assert not result.skipped
        losses.append(float(result.sums.losses[0]))
        norms.append(float(result.grad_norm))
        moe.append((*result.sums.losses.tolist(), [x.tolist() for x in result.sums.counts]))
        moe[-1] += (result.sums.dropped.tolist(),)
        if step == (first + end) // 2:
            moe.append(tuple(engine.evaluate([batch(1000)]).losses.tolist()))
    return Trained(losses, norms, whole(engine), moe)


def train(engine) -> Trained:
    """All updates."""
    return updates(engine, 0, STEPS)


def state(engine) -> dict:
    """A copy of what a checkpoint would hold, for :func:`load`."""
    boxes = {(t.name, tuple(b.offsets)): b.tensor.clone() for t in engine.saved_tensors() for b in t.boxes}
    return {"boxes": boxes, "scalars": engine.scalar_state()}


def load(engine, saved: dict) -> None:
    """Take over what :func:`state` gave, on one process."""
    with engine.loading() as tensors:
        for tensor in tensors:
            for box in tensor.boxes:
                box.tensor.copy_(saved["boxes"][tensor.name, tuple(box.offsets)])
    engine.load_scalar_state(saved["scalars"])
