"""Makes a run repeat bit for bit on the same machine, with the same layout and the same versions.

What is not deterministic by default, and the remedy:

    torch's operators       those that add in any order are replaced by others, or raise (strict deterministic mode);
                            attention's backward pass is then flash attention's deterministic one, never cuDNN's
    torch.compile           chooses the shapes of reductions by rule and not by a measurement
    cuBLAS                  a fixed workspace (CUBLAS_WORKSPACE_CONFIG), read when its handle is made
    NCCL                    rings and trees add in a fixed order; NVLink SHARP is left out (NCCL_ALGO)

Triton kernels of this project add nothing atomically and try out no configurations. Uninitialized memory is not filled:
nothing reads it.
"""

import os
from typing import Any

import torch

from megatron.config.errors import ConfigError

WORKSPACES = (":4096:8", ":16:8")
ALGORITHMS = "Ring,Tree"
SWITCH_ALGORITHMS = {"nvls", "nvlstree"}  # NCCL's algorithms in which the switch adds


def make_deterministic() -> None:
    """Configure this process, before its first product on a GPU and before torch.distributed is initialized.

    Environment variables that the user has set to another deterministic value stay as they are.

    Raises:
        ConfigError: one is set to a value that is not deterministic.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ConfigError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace!r}, with which cuBLAS does not repeat results; "
            f"unset it, or use {' or '.join(WORKSPACES)}"
        )
    algorithms = os.environ.setdefault("NCCL_ALGO", ALGORITHMS)
    if not _add_in_order(algorithms):
        raise ConfigError(
            f"--deterministic: NCCL_ALGO is {algorithms!r}, which lets NVLink SHARP add in any order; unset it, or use "
            f"{ALGORITHMS} or ^NVLS,NVLSTree"
        )
    import torch._inductor.config as inductor

    torch.use_deterministic_algorithms(True)
    inductor.deterministic = True
    settings: Any = torch.utils.deterministic  # a module with a property, which checkers of types do not see
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _add_in_order(algorithms: str) -> bool:
    """Whether a value of NCCL_ALGO, ``list`` or ``list;function:list;...``, leaves out what adds in the switch.

    A list that begins with ^ names what is not to be used.
    """
    lists = algorithms.lower().replace(" ", "").split(";")
    if all(":" in words for words in lists):  # other functions may do as they like
        return False
    for words in lists:
        _, _, names = words.rpartition(":")
        named = set(names.removeprefix("^").split(","))
        if not (named >= SWITCH_ALGORITHMS if names.startswith("^") else named.isdisjoint(SWITCH_ALGORITHMS)):
            return False
    return True
