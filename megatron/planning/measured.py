"""What was measured on GPUs, as far as plans rest on it: speeds, efficiencies and peaks of memory.

All on NVIDIA H200s, one at a time, torch 2.11, bf16, sequences of 2 048 tokens, vocabulary 50 304, compiled, without
dropout, where nothing else is said. Sources, with the commands and dates: docs/performance.md, and docs/results.md for
dropout and the published run.
"""

import bisect
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from megatron.config import RunConfig
from megatron.config.presets import PRESETS
from megatron.config.run import OPTIONS, build, read_mapping

DEVICE = "H200"
VOCAB = 50304

# python -m benchmarks.train_step: run -> ms of a step. Plans rest on the dense ones; the others show how far they hold.
STEPS = {"350M:16": 170.8, "350M+8:16": 174.3, "350M+32:16": 195.4, "1.3B:8": 255.6, "1.3B+8:8": 271.4}

# python -m benchmarks.moe_layer: rows of an expert's buffer -> time of the dense feed-forward of the same FLOPs over
# that of the MoE layer, forward and backward; 16 384 tokens of hidden size 2 048, 32 768 of 1 024
EXPERTS_OF_DENSE = {128: 0.58, 256: 0.76, 512: 0.86, 1024: 0.88, 2048: 0.93, 4096: 0.91}
# the same without a capacity (--mode dropless), of tokens that choose all experts equally often
DROPLESS_OF_DENSE = {128: 0.48, 256: 0.65, 512: 0.80, 1024: 0.78, 2048: 0.88, 4096: 0.82}

# Seconds that dropout adds for each element: of attention probabilities, in a forward and in a backward pass, and of
# hidden states, in any pass (350M+MoE-64, micro-batches of 8, profiles with dropout and without)
DROPOUT_OF_ATTENTION = (0.97e-12, 0.59e-12)
DROPOUT_OF_HIDDEN = 1.9e-12

# Milliseconds in which the host launches a layer's kernels for a micro-batch, forward and backward: of a dense layer
# and of one with experts, by whether it is recomputed. From 350M:1:8 and 350M+8:1:8 with sequences of 128 tokens, for
# which the GPU waits all the time. Other hosts are faster or slower.
HOST_MS = {False: (2.15, 4.63), True: (3.86, 7.55)}

# AdamW: bytes a second that its kernel moves, of the GPU's 4.8e12
UPDATE_OF_BANDWIDTH = 4.1 / 4.8

# Seconds a weight that an update takes beyond that: by --optimizer, and in CPU memory, by four threads of a host with
# one process (docs/memory.md: 1.3B:8, 1.3B+8:8; 1.3B:8, 350M+8:16)
UPDATE_OF_OPTIMIZER = {"adamw8bit": 17e-12}
UPDATE_ON_HOST = 0.89e-9

# Share of a link's data-sheet bandwidth that collectives reach. Not measured between nodes: an assumption.
LINK_REACHED = 0.7


@dataclasses.dataclass(frozen=True)
class Peak:
    """A measured peak of memory in GB (10^9 bytes): a run as ``benchmarks.train_step`` names it, and options beside."""

    run: str
    gb: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PUBLISHED = {"checkpoint_activations": True, "hidden_dropout": 0.1, "attention_dropout": 0.1}
BF16_MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}

PEAKS = (
    Peak("350M:16", 34.5),
    Peak("350M:16:4", 35.9),
    Peak("350M+8:16", 45.2),
    Peak("350M+8:16:4", 49.4),
    Peak("350M+32:16", 79.0),
    Peak("1.3B:8", 46.4),
    Peak("1.3B+8:8", 86.6),
    Peak("350M+79:16", 145.3),
    Peak("1.3B+18:8", 143.0),
    Peak("350M:1", 7.0),
    Peak("350M+8:1", 17.3),
    Peak("350M+8:1", 17.3, {"cuda_graphs": True}),
    Peak("6.7B:4", 129.1),
    Peak("350M:16", 10.3, {"checkpoint_activations": True}),
    Peak("350M+8:16", 20.1, {"checkpoint_activations": True}),
    Peak("1.3B:8", 22.5, {"checkpoint_activations": True}),
    Peak("1.3B+8:8", 67.7, {"checkpoint_activations": True}),
    Peak("350M+87:16", 146.0, {"checkpoint_activations": True}),
    Peak("1.3B+20:8", 145.1, {"checkpoint_activations": True}),
    Peak("350M+117:16", 146.2, {"checkpoint_activations": True, **BF16_MOMENTS}),
    Peak("350M+64:8:16", 109.1, BF16_MOMENTS),
    Peak("350M+64:8:16", 123.5, PUBLISHED),
    Peak("350M+64:8:16", 134.8, PUBLISHED | {"cuda_graphs": True}),
    Peak("350M:16", 34.5, {"precision": "fp16"}),
    Peak("350M+8:16", 45.2, {"precision": "fp16"}),
    Peak("1.3B:8", 41.1, BF16_MOMENTS),
    Peak("1.3B+8:8", 70.1, BF16_MOMENTS),
    Peak("1.3B+18:8:4", 143.0, BF16_MOMENTS),
    Peak("350M+112:16", 145.7, BF16_MOMENTS),
    Peak("1.3B+24:8", 134.7, BF16_MOMENTS),
    Peak("1.3B+26:8", 142.9, BF16_MOMENTS),
    Peak("6.7B:4:4", 129.1, BF16_MOMENTS),
    Peak("6.7B:8", 137.9, BF16_MOMENTS),
    Peak("1.3B:8", 43.8, {"optimizer_name": "adamw8bit"}),
    Peak("1.3B+8:8", 78.5, {"optimizer_name": "adamw8bit"}),
    Peak("1.3B+22:8", 146.4, {"optimizer_name": "adamw8bit"}),
    Peak("350M+8:16", 32.5, {"optimizer_cpu_offload": True}),
    Peak("1.3B:8", 31.3, {"optimizer_cpu_offload": True}),
)
"""``torch.cuda.max_memory_allocated``, each run in a process of its own."""


def run_of(name: str, **options: Any) -> RunConfig:
    """The configuration of a benchmark's run, PRESET[+EXPERTS]:MICRO_BATCH[:MICRO_BATCHES], on one GPU.

    Args:
        name: such as ``1.3B+8:8``, with 8 experts in every other layer and micro-batches of 8.
        **options: fields of the configuration that are not as in the benchmark without flags.
    """
    shape, *numbers = name.split(":")
    preset, _, experts = shape.partition("+")
    micro, count = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1
    values = PRESETS[preset] | {
        "micro_batch_size": micro,
        "global_batch_size": micro * count,
        "rampup_batch_size": None,
        "tensor_model_parallel_size": 1,
        "checkpoint_activations": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if experts:
        values |= {"num_experts": (int(experts),)}
    return build(values | options)


WRITER = "benchmarks.train_step --json"
_RUN = re.compile(rf"({'|'.join(map(re.escape, PRESETS))})(\+[1-9]\d*)?(:[1-9]\d*){{1,2}}")


def peaks_in(file: Path) -> list[Peak]:
    """Measured peaks from the JSON that ``python -m benchmarks.train_step --json FILE`` writes; of our own runs.

    What else the benchmark notes beside its rows is an option of the run if there is one of that name, and so is what
    its ``--set`` has set.

    Raises:
        ValueError: the file cannot be read, or has no such rows.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; give what {WRITER} writes") from None
    except ValueError as error:
        raise ValueError(f"{file}: got no JSON ({error}); give what {WRITER} writes") from None
    if not isinstance(content, dict) or not all("memory_gb" in row for row in content.get("rows", [{}])):
        raise ValueError(f"{file}: no rows with 'run' and 'memory_gb'; give what {WRITER} writes")
    options = {name: value for name, value in content.items() if name in OPTIONS}
    for word in content.get("options", []):
        name, _, value = word.partition("=")
        options |= read_mapping({name: yaml.safe_load(value)})
    if "dropout" in content:
        options |= {"hidden_dropout": content["dropout"], "attention_dropout": content["dropout"]}
    rows = (row | {"run": row["run"].removesuffix(" ours")} for row in content["rows"])
    peaks = [Peak(row["run"], row["memory_gb"], options) for row in rows if " " not in row["run"]]
    for peak in peaks:
        if not _RUN.fullmatch(peak.run) or not isinstance(peak.gb, int | float):
            raise ValueError(f"{file}: got {peak.gb!r} GB of the run {peak.run!r}; give what {WRITER} writes")
    return peaks


def between(table: dict[int, float], at: float) -> float:
    """A table's value at ``at``: linear in the logarithm between two entries, that of the last one beyond them."""
    known = sorted(table)
    place = bisect.bisect_left(known, at)
    if place in (0, len(known)):
        return table[known[min(place, len(known) - 1)]]
    low, high = known[place - 1], known[place]
    share = math.log(at / low) / math.log(high / low)
    return table[low] * (1 - share) + table[high] * share
