"""Triton kernels of the MoE layer. Each file has the plain-torch reference beside the kernel that must equal it."""

import functools
import logging

import torch

_LOG = logging.getLogger(__name__)


@functools.cache
def _why_not(device_type: str) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if device_type != "cuda":
        return f"Triton kernels do not run on the device type {device_type!r}"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


@functools.cache
def _say(why: str, level: int) -> None:
    _LOG.log(level, "no fused kernels, plain torch instead: %s", why)


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can work on ``x``; if not, the first call says why in one line of the log."""
    why = _why_not(x.device.type)
    if why is not None:
        _say(why, logging.INFO if x.device.type == "cpu" else logging.WARNING)  # on a CPU nobody expects any
    return why is None and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
