"""What holds for all tests: where the package is found, and which tests this machine can run."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Processes that tests start find this checkout too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and skip those for a GPU where there is none."""
    for item in items:
        folders = item.path.relative_to(ROOT / "tests").parts
        if folders[0] == "distributed":
            item.add_marker(pytest.mark.distributed)
        if folders[0] == "gpu":
            item.add_marker(pytest.mark.gpu)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
