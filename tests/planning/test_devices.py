"""GPUs by name."""

import pytest

from megatron.config.errors import ConfigError
from megatron.planning.devices import DEVICES, USABLE, device_of, find_device


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_a_peak(name):
    device = find_device(name)
    assert device.peak_flops("fp16") > 1e14
    assert device.peak_flops("bf16") == (None if name == "V100" else device.peak_flops("fp16"))
    assert 0 < device.usable < device.memory
    assert device.network < device.link


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="nearest is 'A100'"):
        find_device("a10")


@pytest.mark.parametrize(
    ("name", "memory", "like"),
    [
        ("NVIDIA H200", 150e9, "H200"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100"),
        ("NVIDIA A100 80GB PCIe", 85e9, "A100"),
        ("Tesla V100-SXM2-16GB", 17e9, "V100"),
        ("NVIDIA GeForce RTX 4090", 25e9, "RTX4090"),
    ],
)
def test_torch_s_name_and_memory(name, memory, like):
    device = device_of(name, memory)
    assert (device.name, device.memory, device.usable) == (name, memory, USABLE * memory)
    assert device.link == DEVICES[like].link
    assert device.kernels == (like != "V100")


def test_what_is_not_known():
    assert device_of("Some GPU 5000", 1e9) is None
    assert device_of("NVIDIA A1000", 8e9) is None


def test_the_peak_of_a_slice_of_a_gpu_is_not_known():
    found = device_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5e9)
    assert [found.peak_flops(precision) for precision in ("bf16", "fp16", "fp32")] == [None] * 3
