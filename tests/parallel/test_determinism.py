"""What ``--deterministic`` sets, and what it refuses."""

import os

import pytest
import torch

from megatron.config.errors import ConfigError
from megatron.parallel.determinism import make_deterministic


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing is set at first, and all is as before afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch._inductor.config.deterministic = False
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic = False


def test_torch_and_the_libraries_are_configured():
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention heeds the strict mode only
    assert torch._inductor.config.deterministic
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring,Tree"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8"),
        ("NCCL_ALGO", "Ring"),
        ("NCCL_ALGO", "^NVLS,NVLSTree"),
        ("NCCL_ALGO", "ring; allreduce:tree,ring"),
    ],
)
def test_the_users_values_are_kept(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    make_deterministic()
    assert os.environ[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "NVLS"),
        ("NCCL_ALGO", "ring,nvlstree"),
        ("NCCL_ALGO", "^Tree"),
        ("NCCL_ALGO", "^NVLS"),  # leaves NVLSTree
        ("NCCL_ALGO", "allreduce:tree"),  # leaves reduce-scatter
        ("NCCL_ALGO", "ring;allreduce:nvls"),
    ],
)
def test_values_that_are_not_deterministic_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"--deterministic: {name} is '.*'.*unset it"):
        make_deterministic()
