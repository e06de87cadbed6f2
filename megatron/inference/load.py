"""A model and its tokenizer out of a training checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint import Box, CheckpointError, ShardedTensor, latest, load, read_meta
from megatron.config import RunConfig
from megatron.config.run import from_dict
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.inference.special_tokens import splits_special_tokens
from megatron.model.gpt import GPTModel
from megatron.moe.balancing import learned_buffers
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.sharding import collect_layouts, global_boxes, global_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class ModelCheckpoint:
    """A checkpoint on disk, and the run that wrote it."""

    path: Path
    config: RunConfig
    meta: dict[str, Any]


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default the GPU if there is one.

    Raises:
        ValueError: it is no CPU or GPU, or this machine does not have it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not known; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs; use another, or cpu")
    return device


def choose_dtype(name: str | None, device: torch.device, source: ModelCheckpoint) -> str:
    """The number format called ``name``, of ``DTYPES``; by default fp32 on a CPU, that of the training run on a GPU."""
    return name or ("fp32" if device.type == "cpu" else source.config.optimizer.precision)


def find_checkpoint(folder: str | Path) -> ModelCheckpoint:
    """The latest checkpoint in ``folder``, or ``folder`` itself where it is one.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = latest(folder) if Path(folder).is_dir() else None
    if path is None:
        what = "holds no finished checkpoint" if Path(folder).exists() else "does not exist"
        if (Path(folder) / "config.json").is_file():
            what = "is a Hugging Face folder, which tools/convert_checkpoint.py --to native converts"
        raise CheckpointError(f"{folder} {what}; expected the --save folder of a training run or one checkpoint in it")
    meta = read_meta(path)
    return ModelCheckpoint(Path(path), from_dict(meta["config"]), meta)


def load_tokenizer(source: ModelCheckpoint, **files: str | None) -> Tokenizer:
    """The tokenizer that the model was trained with; of a model from Hugging Face, with special tokens as there.

    Args:
        source: the checkpoint; the files are where the training run found them.
        **files: ``vocab_file``, ``merge_file``, ``tokenizer_model``: where they are now, if they have moved.

    Raises:
        ValueError: a file is missing, or is not the one of the training run.
    """
    moved = {name: path for name, path in files.items() if path is not None}
    data = dataclasses.replace(source.config.data, **moved)
    tokenizer = build_tokenizer(data, split_special_tokens=splits_special_tokens(source.meta))
    expected = source.meta["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != expected:
        raise ValueError(
            f"the tokenizer's files have fingerprint {tokenizer.fingerprint[:12]}, but {source.path} was trained with "
            f"{expected[:12]}; give the original ones by --vocab-file and --merge-file, or --tokenizer-model"
        )
    return tokenizer


def load_model(
    source: ModelCheckpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    expert_group: Callable[[int], ExpertGroup] | None = None,
    group: dist.ProcessGroup | None = None,
) -> GPTModel:
    """The model with the checkpoint's weights, in evaluation mode, its experts dropping no token.

    Args:
        source: the checkpoint.
        device: where to.
        dtype: number format of all weights.
        expert_group: the processes that share an MoE layer's experts, as :class:`GPTModel` takes them; by default the
            model is whole.
        group: all processes that load, on a CPU backend.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks a weight.
    """
    device = torch.device(device)
    moe = dataclasses.replace(source.config.moe, moe_eval_capacity_factor=None)
    with torch.device("meta"):  # no initial values: they would be overwritten
        model = GPTModel(source.config.model, moe, source.meta["vocab_size"], expert_group)
    model.to(dtype).to_empty(device=device)
    layouts, tensors = collect_layouts(model), []
    for name, p in model.named_parameters():
        shards = layouts[name].shards
        boxes = [Box(*placed) for placed in global_boxes((0,) * p.dim(), p.data, p.shape, shards)]
        tensors.append(ShardedTensor("model." + name, global_shape(p.shape, shards), torch.float32, boxes))
    for name, buffer in learned_buffers(model).items():
        tensors.append(ShardedTensor("model." + name, tuple(buffer.shape), torch.float32, [Box((0,), buffer)]))
    load(source.path, tensors, group, strict=False)  # the optimizer's state stays where it is
    return model.eval()
