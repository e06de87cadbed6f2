"""Checkpoints of Megatron-DeepSpeed: tensor-parallel pieces, and a file for each expert.

They are pickles. torch's restricted unpickler reads them, which knows tensors and plain containers; beyond these, only
``argparse.Namespace`` (Megatron's arguments) and numpy's arrays (states of random generators) are allowed.
"""

import os
from pathlib import Path

from megatron.checkpoint.formats.megatron_deepspeed.arguments import no_place
from megatron.checkpoint.formats.megatron_deepspeed.layouts import has_files
from megatron.checkpoint.formats.megatron_deepspeed.reading import read_megatron_deepspeed
from megatron.checkpoint.formats.megatron_deepspeed.writing import write_megatron_deepspeed

__all__ = ["is_megatron_deepspeed", "no_place", "read_megatron_deepspeed", "write_megatron_deepspeed"]


def is_megatron_deepspeed(folder: str | os.PathLike) -> bool:
    """Whether the folder looks like one of these, with or without the tag."""
    return has_files(Path(folder))
