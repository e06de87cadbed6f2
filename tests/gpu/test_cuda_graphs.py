"""Micro-batches as CUDA graphs train as those without, to the last bit where kernels repeat themselves."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from distributed.test_deterministic import assert_same_bits
from gpu import small_training
from gpu.processes import needs_two_gpus
from gpu.small_training import STEPS, batch, build, load, state, updates

from megatron.config import MoEConfig

pytestmark = pytest.mark.gpu
MODELS = {
    "dense": (MoEConfig(), {}),
    "MoE-8": (MoEConfig(num_experts=(8,)), {}),
    "MoE-8, not compiled": (MoEConfig(num_experts=(8,)), {"compile": False}),
    "MoE-8, recomputed": (MoEConfig(num_experts=(8,)), {"checkpoint_activations": True}),
    "MoE-8, top-2, residual": (MoEConfig(num_experts=(8,), topk=2, mlp_type="residual"), {}),
    "MoE-8, norms of Q and K": (MoEConfig(num_experts=(8,)), {"qk_layernorm": True}),
    "MoE-8, noise": (MoEConfig(num_experts=(8,), moe_rts=False, moe_noise_policy="Jitter"), {}),
}
MODEL = pytest.mark.parametrize("model", MODELS)


def strictly(function, *arguments):
    """Call it where attention's backward pass and all else repeats itself."""
    from megatron.parallel.determinism import make_deterministic

    make_deterministic()
    return function(*arguments)


def graphs_of(engine) -> int:
    """Micro-batches that ran as a graph; the engine must have recorded one."""
    from megatron.engine.cuda_graphs import WARM_UP

    assert engine._graphs._recorder._graph is not None
    return engine._graphs._runs - WARM_UP


def train(model: str, count: int):
    """Updates of ``count`` micro-batches with dropout, without graphs and with them."""
    moe, options = (MODELS | MODELS_OF_TWO)[model]
    plain = updates(build(moe, **options), 0, STEPS, count)
    engine = build(moe, cuda_graphs=True, **options)
    graphed = updates(engine, 0, STEPS, count)
    assert graphs_of(engine) == STEPS * count - 3
    return plain, graphed


@MODEL
def test_losses_norms_and_weights_are_the_same_bit_for_bit(model: str):
    """Two micro-batches an update, and an evaluation between them."""
    ((plain, graphed),) = run_distributed(strictly, 1, train, model, 2, timeout=400, backend="nccl")
    assert plain.losses[-1] < plain.losses[0]
    assert_same_bits([graphed], [plain])


def test_one_micro_batch_an_update_is_the_same_bit_for_bit():
    ((plain, graphed),) = run_distributed(strictly, 1, train, "MoE-8", 1, timeout=400, backend="nccl")
    assert_same_bits([graphed], [plain])


SHARED = {"expert_parallel": 2}  # experts of two processes
MODELS_OF_TWO = {
    "dense": MODELS["dense"],
    "MoE-8": MODELS["MoE-8"],
    "MoE-8, shared": (MoEConfig(num_experts=(8,)), SHARED),
    "MoE-8, shared, recomputed": (MoEConfig(num_experts=(8,)), SHARED | {"checkpoint_activations": True}),
    "MoE-8, shared, top-2": (MoEConfig(num_experts=(8,), topk=2), SHARED),
}


@needs_two_gpus
@pytest.mark.parametrize("model", MODELS_OF_TWO)
def test_two_processes_are_the_same_bit_for_bit(model: str):
    for plain, graphed in run_distributed(strictly, 2, train, model, 2, timeout=400, backend="nccl"):
        assert_same_bits([graphed], [plain])


def train_as_usual(model: str):
    return train(model, 2)


def test_with_kernels_that_do_not_repeat_themselves_losses_stay_close():
    """The backward pass of attention adds in any order, here and there."""
    ((plain, graphed),) = run_distributed(train_as_usual, 1, "MoE-8", timeout=400, backend="nccl")
    torch.testing.assert_close(torch.tensor(graphed.losses), torch.tensor(plain.losses), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(graphed.norms), torch.tensor(plain.norms), rtol=5e-2, atol=0)


def stop_and_go_on(model: str):
    """The second half of a training three times: at once, after its checkpoint is loaded, and in a new engine."""
    moe, options = MODELS[model]
    engine = build(moe, cuda_graphs=True, **options)
    half = STEPS // 2
    updates(engine, 0, half)
    saved = state(engine)
    at_once = updates(engine, half, STEPS)
    load(engine, saved)
    again = updates(engine, half, STEPS)
    graphs_of(engine)
    del engine
    resumed = build(moe, cuda_graphs=True, **options)
    load(resumed, saved)
    return at_once, again, updates(resumed, half, STEPS)


@pytest.mark.parametrize("model", ["dense", "MoE-8"])
def test_a_checkpoint_is_written_and_loaded_between_graphs(model: str):
    ((at_once, again, resumed),) = run_distributed(strictly, 1, stop_and_go_on, model, timeout=400, backend="nccl")
    assert_same_bits([again, resumed], [at_once, at_once])


def mixed(graphs: bool) -> list[tuple]:
    """Micro-batches of two lengths in turn; a skipped update; what each update said."""
    engine = build(MODELS["MoE-8"][0], cuda_graphs=graphs)
    said = []
    for step in range(STEPS):
        micro_batches = [batch(2 * step), batch(2 * step + 1, small_training.SEQ // (1 + step % 2))]
        if step == STEPS - 3:
            micro_batches[0]["loss_mask"].fill_(float("nan"))
        result = engine.train_step(micro_batches, (step + 1) * 4096)
        said.append((result.skipped, result.sums.losses.tolist(), float(result.grad_norm)))
    if graphs:
        graphs_of(engine)
    return said


def both_mixed():
    return mixed(False), mixed(True)


def test_other_shapes_and_skipped_updates_are_as_without_graphs():
    ((plain, graphed),) = run_distributed(strictly, 1, both_mixed, timeout=400, backend="nccl")
    assert [step[0] for step in plain] == [step == STEPS - 3 for step in range(STEPS)]
    finite = [number for number in range(STEPS) if number != STEPS - 3]
    assert [graphed[number] for number in finite] == [plain[number] for number in finite]
    assert graphed[STEPS - 3][0]


def record_a_wait() -> str:
    from megatron.engine.cuda_graphs import CudaRecorder

    device = torch.device("cuda", dist.get_rank())
    x = torch.ones(3, device=device)
    try:
        CudaRecorder(device, 1).record(lambda: float(x.sum()))
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_waits_for_the_gpu_is_refused_by_name():
    (message,) = run_distributed(record_a_wait, 1, backend="nccl")
    assert message.startswith("--cuda-graphs: a micro-batch cannot be recorded (")
    assert message.endswith("drop the flag")


def draw(device: torch.device, graphed: bool) -> list[list[float]]:
    """Numbers of two generators, twice, with other seeds each time."""
    from megatron.engine.cuda_graphs import CudaRecorder

    recorder, made = CudaRecorder(device, 2), []
    x = torch.zeros(4, 5, device=device)

    def function() -> None:
        for number in (0, 1):
            recorder.draw_from(number)
            x[2 * number].uniform_()
            x[2 * number + 1].copy_(torch.rand(5, device=device))

    torch.manual_seed(99)
    torch.rand(1, device=device)
    recorder.seed([1, 2])
    recorder.run(function)
    if graphed:
        recorder.record(function)
    for seeds in ([3, 4], [5, 6]):
        if graphed:
            recorder.seed(seeds)
            recorder.replay()
        else:
            for number, seed in enumerate(seeds):
                torch.manual_seed(seed)
                x[2 * number].uniform_()
                x[2 * number + 1].copy_(torch.rand(5, device=device))
        made.append(x.tolist())
    if graphed:  # the default generator goes on as if nothing had been
        torch.manual_seed(99)
        expected = torch.rand(1, device=device), torch.rand(1, device=device)
        torch.manual_seed(99)
        first = torch.rand(1, device=device)
        recorder.seed([3, 4])
        recorder.replay()
        assert (first, torch.rand(1, device=device)) == expected
    return made


def test_replayed_random_numbers_are_those_of_a_seeded_generator():
    device = torch.device("cuda", 0)
    plain, graphed = (draw(device, graphs) for graphs in (False, True))
    assert graphed == plain
    assert plain[0] != plain[1]
