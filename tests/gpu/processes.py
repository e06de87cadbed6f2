"""Tests of two processes over NCCL, each of which needs a GPU of its own.

Or a share of the only one: NCCL from 2.30 on lets processes share a GPU with ``NCCL_MULTI_RANK_GPU_ENABLE=1``, if
CUDA's MPS runs (``nvidia-cuda-mps-control -d``). ``LD_PRELOAD=libnccl.so.2`` loads a newer NCCL than torch's own.
"""

import os

import pytest
import torch

ENOUGH = torch.cuda.device_count() >= (1 if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else 2)
needs_two_gpus = pytest.mark.skipif(not ENOUGH, reason="needs two CUDA devices")
