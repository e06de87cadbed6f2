"""Graphed micro-batches train as those without graphs do, in whatever order they come.

On a CPU a stand-in for the recorder calls the function again where a graph would be replayed. It shows that buffers,
gradients, seeds and counts are right; what a GPU records is for tests/gpu.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron.model.monitors import LayerSamples

VOCAB, SEQ, MICRO, COUNT, STEPS = 64, 16, 2, 2, 4
MODELS = {
    "dense": MoEConfig(),
    "top-1": MoEConfig(num_experts=(4,), moe_min_capacity=1, moe_loss_coeff=0.5, moe_z_loss_coeff=0.1),
    "top-2, residual": MoEConfig(num_experts=(4,), topk=2, mlp_type="residual", moe_noise_policy="RSample"),
}


class FakeRecorder:
    """Does what :class:`megatron.engine.cuda_graphs.CudaRecorder` does, without a graph, and takes notes."""

    def __init__(self, device: torch.device, generators: int) -> None:
        self.calls: list[str] = []
        self._seeds: Sequence[int] = ()
        self._generators = generators
        self._function: Callable[[], None]

    def seed(self, seeds: Sequence[int]) -> None:
        assert len(seeds) == self._generators
        self._seeds = seeds

    def draw_from(self, number: int) -> None:
        torch.manual_seed(self._seeds[number])

    def run(self, function: Callable[[], None]) -> None:
        self.calls.append("run")
        function()

    def record(self, function: Callable[[], None]) -> None:
        self.calls.append("record")
        seeds, self._seeds = self._seeds, [0] * self._generators  # nothing of this may be in a result
        function()
        self._function, self._seeds = function, seeds

    def replay(self) -> None:
        self.calls.append("replay")
        self._function()


def batch(number: int, length: int = SEQ) -> dict:
    text = torch.randint(0, VOCAB, (MICRO, length + 1), generator=torch.Generator().manual_seed(number))
    mask = (torch.arange(length) < length - number % 3).float().expand(MICRO, -1)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "sample_index": number * MICRO}


def build(moe: MoEConfig, graphs: bool, recompute: bool):
    from megatron.engine import cuda_graphs
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import build_groups
    from megatron.parallel.launch import Launch

    rank, size = dist.get_rank(), dist.get_world_size()
    run = RunConfig(
        model=ModelConfig(num_layers=3, hidden_size=16, num_attention_heads=2, seq_length=SEQ),
        moe=moe,
        parallel=ParallelConfig(moe_expert_parallel_size=(size,)) if moe.enabled else ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        training=TrainingConfig(
            train_tokens=10_000,
            micro_batch_size=MICRO,
            global_batch_size=MICRO * size,
            cuda_graphs=graphs,
            checkpoint_activations=recompute,
        ),
    )
    cuda_graphs.CudaRecorder = FakeRecorder
    topology = build_groups(run.parallel, Launch(rank, size, rank, "127.0.0.1", 0, "test"), torch.device("cpu"))
    return build_engine(run, topology, VOCAB)


def train(moe: MoEConfig, graphs: bool, recompute: bool) -> tuple:
    """Updates of two micro-batches, in the third a short one; then an evaluation, and an update of one micro-batch."""
    from megatron.parallel.initialize import forget_groups

    engine = build(moe, graphs, recompute)
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for step in range(STEPS):
        numbers = [(step * COUNT + i) * size + rank for i in range(COUNT)]
        lengths = [SEQ, SEQ // 2 if step == 2 else SEQ]
        micro_batches = [batch(*made) for made in zip(numbers, lengths, strict=True)]
        results.append(engine.train_step(micro_batches, 1000 * step, monitored=True))
    valid = engine.evaluate([batch(100 + rank)])
    results.append(engine.train_step([batch(50 + rank)], 5000, monitored=True))
    calls = engine._graphs._recorder.calls if graphs else []
    sums = [(r.sums.losses, *r.sums.counts, r.sums.dropped) for r in results]
    forget_groups()
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    return sums, [(r.grad_norm, r.monitors) for r in results], (valid.losses, *valid.counts), weights, calls


def both(moe: MoEConfig, recompute: bool) -> tuple:
    return train(moe, graphs=False, recompute=False), train(moe, graphs=True, recompute=recompute)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_losses_norms_monitors_and_weights_are_those_without_graphs_bit_for_bit(name: str, size: int):
    """On two processes each has half of the experts, and layers run again in the backward pass."""
    for plain, graphed in run_distributed(both, size, MODELS[name], size > 1):
        for mine, theirs in zip(graphed[0], plain[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert graphed[1] == plain[1]
        assert all(0 < norm < float("inf") for norm, _ in plain[1])
        assert all(torch.equal(a, b) for a, b in zip(graphed[2], plain[2], strict=True))
        assert graphed[3].keys() == plain[3].keys()
        assert all(torch.equal(weight, plain[3][key]) for key, weight in graphed[3].items())
        # 9 micro-batches, of which one is short and not the graph's
        assert graphed[4] == ["run"] * 3 + ["record"] + ["replay"] * 5


class Toy(torch.nn.Module):
    """A module with what :class:`GraphedMicroBatches` needs; one parameter has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [None, None]
        self.checkpoint_activations = False
        self.weight, self.unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        self.seed_layer = None

    def forward(self, batch: dict):
        from megatron.model.loss import LossSums

        loss = (self.weight * batch["loss_mask"]).sum()
        return loss, LossSums(loss.detach()[None], [batch["tokens"].clone()], batch["labels"][:1])


@pytest.fixture
def graphed(monkeypatch):
    from megatron.engine import cuda_graphs

    monkeypatch.setattr(cuda_graphs, "CudaRecorder", FakeRecorder)
    toy = Toy()
    samples = LayerSamples(SimpleNamespace(layers={}))
    return toy, cuda_graphs.GraphedMicroBatches(toy, toy, torch.device("cpu"), samples)


def toy_batch(number: int) -> dict:
    whole = torch.full((3,), number)
    return {"tokens": whole, "labels": whole, "loss_mask": torch.full((3,), float(number))}


def test_results_are_not_overwritten_by_the_next_micro_batch(graphed):
    toy, micro_batches = graphed
    results = [micro_batches.run(toy_batch(number), seed=0, count=1) for number in range(1, 7)]
    for number, sums in enumerate(results, start=1):
        assert sums.losses.tolist() == [3.0 * number]
        assert [x.tolist() for x in sums.counts] == [[number] * 3]
        assert sums.dropped.tolist() == [number]
    assert toy.weight.grad.tolist() == [6.0] * 3
    assert toy.unused.grad is None


def test_gradients_are_of_the_mean_over_the_micro_batches_of_the_update(graphed):
    toy, micro_batches = graphed
    for count in (1, 2, 4, 3, 1, 8):  # some of them replayed
        micro_batches.run(toy_batch(2), seed=0, count=count)
        assert toy.weight.grad.tolist() == pytest.approx([2 / count] * 3)


def test_a_gradient_that_somebody_took_away_is_there_again_and_hooks_see_each_once_and_whole(graphed):
    toy, micro_batches = graphed
    seen = []

    def take(parameter: torch.nn.Parameter) -> None:
        seen.append(parameter.grad.clone())
        parameter.grad = None

    toy.weight.register_post_accumulate_grad_hook(take)
    for number in range(1, 7):
        micro_batches.run(toy_batch(number), seed=0, count=1)
        assert toy.weight.grad is None
    assert [x.tolist() for x in seen] == [[float(number)] * 3 for number in range(1, 7)]
    (toy.weight * 2).sum().backward()  # the hook is registered as before
    assert len(seen) == 7


def test_only_micro_batches_like_the_first_are_served(graphed):
    _, micro_batches = graphed
    first = toy_batch(1)
    assert micro_batches.accepts(first)
    micro_batches.run(first, seed=0, count=1)
    assert micro_batches.accepts(toy_batch(5) | {"sample_index": 3})
    assert not micro_batches.accepts(first | {"tokens": torch.ones(4, dtype=torch.int64)})
    assert not micro_batches.accepts(first | {"loss_mask": torch.ones(3, dtype=torch.float64)})
    assert not micro_batches.accepts(first | {"cu_seqlens": torch.tensor([0, 3])})


def test_positions_are_replayed_with_the_tokens(graphed):
    toy, micro_batches = graphed
    toy.forward, forward = (lambda batch: forward(batch | {"tokens": batch["position_ids"]})), toy.forward
    for number in range(1, 7):
        given = toy_batch(number) | {"position_ids": torch.full((3,), 10 * number)}
        assert micro_batches.accepts(given)
        (counts,) = micro_batches.run(given, seed=0, count=1).counts
        assert counts.tolist() == [10 * number] * 3


def test_the_model_seeds_its_layers_as_before_afterwards(graphed):
    toy, micro_batches = graphed
    toy.seed_layer = before = object()
    micro_batches.run(toy_batch(1), seed=0, count=1)
    assert toy.seed_layer is before
