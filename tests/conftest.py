"""What holds for all tests: where the package is found, and which tests this machine can run."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Processes that tests start find this checkout too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# Without a GPU, Triton's interpreter runs the kernels, also in processes that tests start. It must be told before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, skip those for a GPU where there is none, and say which are run one after another.

    Several workers share the files. But tests of several processes, which have limits of time, go to one worker, and
    with them those that need a GPU: they would get into each other's way.
    """
    for item in items:
        folders = item.path.relative_to(ROOT / "tests").parts
        if folders[0] == "distributed":
            item.add_marker(pytest.mark.distributed)
        if folders[0] == "slurm":
            item.add_marker(pytest.mark.slurm)
        if folders[0] == "gpu":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        alone = any(item.get_closest_marker(name) for name in ("distributed", "gpu", "slurm"))
        item.add_marker(pytest.mark.xdist_group("alone" if alone else str(item.path)))
