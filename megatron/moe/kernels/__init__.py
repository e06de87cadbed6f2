"""Triton kernels of the MoE layer. Each file has the plain-torch reference beside the kernel that must equal it."""

import functools
import logging

import torch

_LOG = logging.getLogger(__name__)


def _why_not(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if device.type != "cuda":
        return f"Triton kernels do not run on the device type {device.type!r}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


@functools.cache
def _usable_on(device: torch.device) -> bool:
    why = _why_not(device)
    if why is not None:
        level = logging.INFO if device.type == "cpu" else logging.WARNING  # on a CPU nobody expects any
        _LOG.log(level, "no fused kernels, plain torch instead: %s", why)
    return why is None


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can work on ``x``; if not, the first call for a device says why in one line of the log."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and _usable_on(x.device)


@functools.cache
def _groups_on(device: torch.device, dtype: torch.dtype) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if device.type != "cuda" or not torch.version.cuda:
        return True
    return dtype == torch.bfloat16 and (9, 0) <= torch.cuda.get_device_capability(device) < (11, 0)


def groupable(x: torch.Tensor, *widths: int) -> bool:
    """Whether torch multiplies rows of ``x`` grouped by expert in one product, with matrices of these widths.

    On NVIDIA GPUs it does for bf16 on Hopper and data-center Blackwell; for others it loops over the groups, with a
    wait for their sizes. Lines of a matrix must begin at multiples of 16 bytes.
    """
    return all(width * x.element_size() % 16 == 0 for width in widths) and _groups_on(x.device, x.dtype)
