"""The plan of a run: what it is, what it needs, how long it will take and what it will cost."""

import dataclasses

from megatron.config import MoEConfig, RunConfig
from megatron.config.training import cuda_graphs
from megatron.engine.optim import OPTIMIZERS
from megatron.planning.devices import USABLE, Device
from megatron.planning.flops import model_flops_per_token
from megatron.planning.memory import Memory, memory
from megatron.planning.parameters import ParameterCount, count_parameters
from megatron.planning.time import StepEstimate, expected_step

GB = 1e9
WAITS_LONG = 0.05  # of an update


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run takes place. Prices are in whatever currency the price is in."""

    world: int
    node: int = 8  # GPUs of a node
    device: Device | None = None  # None: not known, or no GPU
    storage: float = 5 * GB  # bytes a second that all processes together write
    price: float | None = None  # of one GPU for an hour

    @property
    def kernels(self) -> bool:
        """Whether the Triton kernels can be used: on GPUs from Ampere on."""
        return self.device is not None and self.device.kernels


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a machine, and what follows from the two."""

    config: RunConfig
    machine: Machine
    vocab_size: int  # padded
    parameters: ParameterCount
    memory: Memory
    step: StepEstimate | None  # None where nothing is known of the device

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough; true where it is not known."""
        device = self.machine.device
        return device is None or self.memory.peak <= device.usable

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: fp32 weights and the optimizer's states."""
        optimizer = self.config.optimizer
        states = OPTIMIZERS[optimizer.optimizer_name].checkpoint_bytes(optimizer)
        return self.parameters.total * (4 + states)


def make_plan(config: RunConfig, machine: Machine, vocab_size: int) -> Plan:
    """Plan a run.

    Args:
        config: must have passed :func:`megatron.config.validation.validate_numbers` for ``machine.world`` processes.
        vocab_size: padded.

    Raises:
        ConfigError: the peak of the machine's device is not known for the run's precision.
    """
    device = machine.device
    return Plan(
        config,
        machine,
        vocab_size,
        count_parameters(config.model, config.moe, vocab_size),
        memory(config, machine.world, vocab_size, kernels=machine.kernels),
        None if device is None else expected_step(config, machine.world, vocab_size, device, machine.node),
    )


# ---------------------------------------------------------------------------------------------------------- in words


def count(number: float) -> str:
    """A count in three digits: ``13.1B``."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def layout(config: RunConfig, world: int) -> str:
    """Sizes of all kinds of parallelism that are above 1, such as ``DP 16 TP 4 EP 8``."""
    parallel = config.parallel
    words = [f"DP {parallel.data_parallel_size(world)}"]
    if parallel.tensor_model_parallel_size > 1:
        words.append(f"TP {parallel.tensor_model_parallel_size}{' SP' if parallel.sequence_parallel else ''}")
    if parallel.pipeline_model_parallel_size > 1:
        words.append(f"PP {parallel.pipeline_model_parallel_size}")
    if config.moe.enabled:
        kind = "ETP, EP" if parallel.enable_expert_tensor_parallelism else "EP"
        words.append(f"{kind} {', '.join(map(str, config.expert_parallel_degrees()))}")
    return " ".join(words)


def micro_batches(config: RunConfig, world: int) -> str:
    """Micro-batches of an update on one replica, such as ``16 of 2``."""
    training = config.training
    number = training.global_batch_size // (training.micro_batch_size * config.parallel.data_parallel_size(world))
    return f"{number} of {training.micro_batch_size}"


def _balancing(moe: MoEConfig) -> str:
    loss = f"{'global ' * (moe.balancing == 'global_aux_loss')}balance loss x {moe.aux_loss_coeff:g}"
    if moe.balancing in ("aux_loss", "global_aux_loss"):
        return loss
    return f"balancing: {moe.balancing}" + (f" + {loss}" if moe.aux_loss_coeff else "")


def experiment(config: RunConfig, world: int) -> list[tuple[str, str]]:
    """What is trained: model, experts, schedule and layout, each in one line of words."""
    model, moe, optimizer, training = config.model, config.moe, config.optimizer, config.training
    lines = [
        (
            "model",
            f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.num_attention_heads} heads, "
            f"sequences of {model.seq_length}, initial std {model.init_method_std:g}",
        )
    ]
    if moe.enabled:
        room = f"capacity factor {moe.moe_train_capacity_factor:g}" if moe.moe_token_dropping else "dropless"
        lines.append(
            (
                "experts",
                f"{' '.join(map(str, moe.num_experts))} in one layer of {moe.expert_interval}, top-{moe.topk}, "
                f"{room}, {_balancing(moe)}{', residual' * (moe.mlp_type == 'residual')}",
            )
        )
    batch = f"{training.global_batch_size} sequences an update"
    if training.rampup_batch_size:
        start, increment, samples = training.rampup_batch_size
        batch += f" (from {start} by {increment} over {count(samples)} sequences)"
    tokens = training.train_tokens or 0
    lines += [
        ("batch", batch),
        (
            "schedule",
            f"{count(tokens)} tokens; learning rate {optimizer.lr:g} to {optimizer.min_lr:g}, "
            f"{optimizer.lr_decay_style} over {count(optimizer.lr_decay_tokens or tokens)}, "
            f"warm-up {count(optimizer.lr_warmup_tokens)}",
        ),
        ("layout", f"{world} processes: {layout(config, world)}, micro-batches {micro_batches(config, world)}"),
    ]
    return lines


def needs(plan: Plan) -> list[tuple[str, str]]:
    """What the run needs and how long it takes, each in one line of words."""
    config, machine, used, step = plan.config, plan.machine, plan.memory, plan.step
    flops = model_flops_per_token(config.model, config.moe, plan.vocab_size)
    tokens = config.training.train_tokens or 0
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in used.parts.items() if size >= 0.05 * GB)
    where = f"stage {used.stage}, " if config.parallel.pipeline_model_parallel_size > 1 else ""
    limit = ""
    if machine.device is not None:
        limit = f" of {machine.device.memory / GB:.0f} ({'fits' if plan.fits else 'DOES NOT FIT'}: {USABLE:.0%} usable)"
    lines = [
        ("parameters", f"{count(plan.parameters.total)}, {count(plan.parameters.active)} active for a token"),
        ("memory", f"{used.peak / GB:.1f} GB a GPU{limit}; {where}{used.moment}: {parts}"),
        ("FLOPs", f"{count(flops)} a token, {flops * tokens:.3g} in all"),
    ]
    if used.cpu:
        node = min(machine.world, machine.node)
        words = f"{used.cpu / GB:.1f} GB or more a process, {used.cpu * node / GB:.0f} for {node} of a node"
        lines.insert(2, ("CPU memory", f"{words}, for the optimizer's state"))
    if step is not None:
        shares = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in step.parts.items() if seconds)
        lines.append(
            (
                "speed",
                f"about {count(step.tokens_per_second)} tokens/s, {step.tflops:.0f} model TFLOP/s a GPU, "
                f"{step.seconds:.3g} s an update: {shares}{_hint(plan, step)}",
            )
        )
        cost = "" if machine.price is None else f", {step.gpu_hours * machine.price:,.0f} at {machine.price:g} an hour"
        lines.append(("time", f"about {step.days:.1f} days, {step.gpu_hours:,.0f} GPU-hours{cost}"))
        inside, between = (sum(getattr(t, link) for t in step.traffic.values()) / GB for link in ("inside", "between"))
        purposes = ", ".join(f"{name} {t.total / GB:.2f}" for name, t in step.traffic.items() if t.total)
        lines.append(
            (
                "sent",
                f"GB a GPU and update: {purposes or 'nothing'}"
                + (f"; {inside:.2f} in the node, {between:.2f} between nodes" if purposes else ""),
            )
        )
    written = plan.checkpoint_bytes
    lines.append(
        (
            "checkpoint",
            f"{written / GB:.1f} GB, {written / machine.storage:.0f} s at {machine.storage / GB:g} GB/s",
        )
    )
    return lines


def _hint(plan: Plan, step: StepEstimate) -> str:
    """How to leave out what the GPU waits for the host, if it is worth it and possible."""
    if step.parts["host"] <= WAITS_LONG * step.seconds:
        return ""
    training = dataclasses.replace(plan.config.training, cuda_graphs=True)
    graphed = dataclasses.replace(plan.config, training=training)
    if any(cuda_graphs(graphed, plan.machine.world)) or not make_plan(graphed, plan.machine, plan.vocab_size).fits:
        return ""
    return "; --cuda-graphs leaves out the host"


def aligned(lines: list[tuple[str, str]], indent: str = "  ") -> str:
    """Lines of a name and words, one below the other."""
    return "\n".join(f"{indent}{name:<11}{words}" for name, words in lines)
