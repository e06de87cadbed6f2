"""What the fork server of :mod:`distributed.spawn` imports once, so that not every process of every test has to.

Where there is a GPU it is torch alone: DeepSpeed decides when it is imported on which device it works.
"""

import os
import shutil
import warnings

import torch  # noqa: F401

if shutil.which("nvidia-smi") is None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state  # noqa: F401

        import megatron.engine.pipeline_module
        import megatron.training.pretrain  # noqa: F401
