"""What the fork server of :mod:`distributed.spawn` imports once, so that not every process of every test has to."""

import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed  # noqa: F401
    from megatron.core import parallel_state  # noqa: F401

    import megatron.training.pretrain  # noqa: F401
