"""How long to train, in what batches, and when to look."""

import dataclasses

from megatron.config.fields import option, parse_count


@dataclasses.dataclass
class TrainingConfig:
    """The clock of a run is consumed tokens; a step is one optimizer update."""

    train_tokens: int | None = option(None, "Tokens to train on, such as 300B.", parse=parse_count)
    micro_batch_size: int = option(4, "Sequences of one forward pass on one process.")
    global_batch_size: int = option(256, "Sequences of one optimizer update over all processes.")
    rampup_batch_size: tuple[int, ...] | None = option(
        None, "START INCREMENT SAMPLES: the global batch grows from START by INCREMENT evenly over SAMPLES sequences.",
        nargs="+", metavar="N", parse=parse_count,
    )  # fmt: skip
    eval_interval: int = option(
        100, "Validate every this many updates of the full global batch (counted in tokens); 0 never."
    )
    eval_iters: int = option(10, "Global batches to read of each validation and test set; always the same ones.")
    checkpoint_activations: bool = option(False, "Recompute each layer in the backward pass to save memory.")
    compile: bool = option(True, "Do not let torch.compile fuse the layers on GPUs.", flag="--no-compile")
    cuda_graphs: bool = option(
        False, "bf16 on GPUs, without tensor and pipeline parallelism: launch a micro-batch as one CUDA graph. For "
        "what the host launches more slowly than the GPU computes: small micro-batches, recomputation.",
    )  # fmt: skip
    deterministic: bool = option(
        False, "Repeat bit for bit on the same machine and layout; slower, for attention's backward pass most of all."
    )
    max_skipped_updates: int = option(
        10, "Updates in a row with a non-finite loss or gradient (they are skipped) after which the run stops."
    )
    check_replicas: int = option(
        0, "Every this many updates, compare the parameters that processes must hold alike and stop if any differ; 0"
        " never.",
    )  # fmt: skip
    seed: int = option(1234, "Seed of initial weights, data order, dropout and routing.")
    device: str | None = option(None, "cuda or cpu (default: cuda where there is a GPU).", choices=("cuda", "cpu"))

    @property
    def eval_samples(self) -> int:
        """Sequences that are read of each validation and test set."""
        return self.eval_iters * self.global_batch_size
