"""Checkpoints of Megatron-DeepSpeed, Megatron-LM and megatron.core, which describe a model by the same arguments.

``layouts``, ``megatron_lm`` and ``torch_dist`` each find the tensors of one kind of files, under one spelling of their
names; ``reading`` makes ours of them, ``writing`` the files of Megatron-DeepSpeed.

The files are pickles. Torch's restricted unpickler reads them, which knows tensors and plain containers; beyond these,
only ``argparse.Namespace`` (Megatron's arguments) and numpy's arrays (states of random generators) are made. What else
Megatron puts there has a stand-in that keeps nothing (:mod:`pickles`).
"""

import os
from pathlib import Path

from megatron.conversion.megatron_deepspeed import megatron_lm
from megatron.conversion.megatron_deepspeed.arguments import unsupported_options
from megatron.conversion.megatron_deepspeed.layouts import has_files
from megatron.conversion.megatron_deepspeed.reading import read_megatron_deepspeed, read_megatron_lm
from megatron.conversion.megatron_deepspeed.writing import write_megatron_deepspeed

__all__ = [
    "is_megatron_deepspeed",
    "is_megatron_lm",
    "read_megatron_deepspeed",
    "read_megatron_lm",
    "unsupported_options",
    "write_megatron_deepspeed",
]


def is_megatron_deepspeed(folder: str | os.PathLike) -> bool:
    """Whether the folder looks like one of Megatron-DeepSpeed's, with or without the tag."""
    return has_files(Path(folder))


def is_megatron_lm(folder: str | os.PathLike) -> bool:
    """Whether the folder looks like one of Megatron-LM's or of one of its iterations, distributed or not."""
    return megatron_lm.is_megatron_lm(Path(folder))
