"""Files that torch.save wrote, read without running anything that they name."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron.checkpoint.errors import CheckpointError

_reconstruct = numpy.empty(0).__reduce__()[0]
# beyond tensors and plain containers: Megatron's arguments, and states of random generators
ALLOWED = [
    argparse.Namespace,
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype(numpy.uint32)),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # its name before and since numpy 2
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file, by torch's restricted unpickler and :data:`ALLOWED`; tensors stay on the disk.

    Raises:
        CheckpointError: the file is damaged, names anything else, which is told, or holds no dictionary.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises whatever it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {forbidden[1]}, which is not allowed" if forbidden else lines[0]
        raise CheckpointError(
            f"{path} is damaged or holds something else than tensors and arguments: {why}. Nothing of it was run. "
            "Copy the file again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dictionary")
    return content
