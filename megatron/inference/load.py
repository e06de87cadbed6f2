"""A model and its tokenizer out of a training checkpoint, for one process."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import Box, CheckpointError, ShardedTensor, latest, load, read_meta
from megatron.config import RunConfig
from megatron.config.flags import from_dict
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.model.gpt import GPTModel


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on disk, and the run that wrote it."""

    path: Path
    config: RunConfig
    meta: dict[str, Any]


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default the GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or this machine does not have it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name} is not known; expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs; use another, or cpu")
    return device


def find_checkpoint(folder: str | Path) -> Source:
    """The latest checkpoint in ``folder``, or ``folder`` itself where it is one.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = latest(folder) if Path(folder).is_dir() else None
    if path is None:
        what = "holds no finished checkpoint" if Path(folder).exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; expected the --save folder of a training run or one checkpoint in it")
    meta = read_meta(path)
    return Source(Path(path), from_dict(meta["config"]), meta)


def load_tokenizer(source: Source, **files: str | None) -> Tokenizer:
    """The tokenizer that the model was trained with.

    Args:
        source: the checkpoint; the files are where the training run found them.
        **files: ``vocab_file``, ``merge_file``, ``tokenizer_model``: where they are now, if they have moved.

    Raises:
        ValueError: a file is missing, or is not the one of the training run.
    """
    moved = {name: path for name, path in files.items() if path is not None}
    tokenizer = build_tokenizer(dataclasses.replace(source.config.data, **moved))
    expected = source.meta["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != expected:
        raise ValueError(
            f"the tokenizer's files have fingerprint {tokenizer.fingerprint[:12]}, but {source.path} was trained with "
            f"{expected[:12]}; give the original ones by --vocab-file and --merge-file, or --tokenizer-model"
        )
    return tokenizer


def load_model(source: Source, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPTModel:
    """The model with the checkpoint's weights, whole, in evaluation mode, its experts dropping no token.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks a weight.
    """
    device = torch.device(device)
    moe = dataclasses.replace(source.config.moe, moe_eval_capacity_factor=None)
    with torch.device("meta"):  # no initial values: they would be overwritten
        model = GPTModel(source.config.model, moe, source.meta["vocab_size"])
    model.to(dtype).to_empty(device=device)
    tensors = [
        ShardedTensor("model." + name, tuple(p.shape), torch.float32, [Box((0,) * p.dim(), p.data)])
        for name, p in model.named_parameters()
    ]
    load(source.path, tensors, strict=False)  # the optimizer's state stays where it is
    return model.eval()
