"""What the planner knows about GPUs: memory and bandwidths; peaks are in :mod:`megatron.planning.flops`."""

import dataclasses
import re

from megatron.config.errors import ConfigError, nearest
from megatron.planning.flops import peak_tflops

USABLE = 0.94
"""Share of a GPU's memory that tensors may fill: the CUDA context, NCCL's buffers and fragments need the rest."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU. Bandwidths in bytes a second, ``link`` and ``network`` in one direction; ``fp32`` in FLOP/s."""

    name: str
    memory: float  # bytes
    bandwidth: float  # of its memory
    link: float  # to the GPUs of its node
    network: float  # its share of the node's network
    fp32: float  # peak of its products in fp32, without TF32
    kernels: bool = True  # from Ampere on

    @property
    def usable(self) -> float:
        """Bytes that tensors may fill."""
        return self.memory * USABLE

    def with_network(self, network: float) -> "Device":
        """The same GPU beside another network."""
        return dataclasses.replace(self, network=network)

    def peak_flops(self, precision: str) -> float | None:
        """FLOP/s in bf16, fp16 or fp32, for which the trainer does not turn TF32 on. None where it is not known."""
        peak = peak_tflops(self.name, "fp16" if precision == "fp32" else precision)
        if peak is None:
            return None
        return self.fp32 if precision == "fp32" else peak * 1e12


# Memory: what torch.cuda.get_device_properties reports, or the data sheet's GB. Bandwidths, fp32: NVIDIA's and AMD's
# data sheets (of MI300X that of its matrix cores). Network: that of the usual server, one adapter a GPU of 400 Gbit/s
# beside H100 and later, 200 beside A100, 100 for the others. --network-gb-per-second says what yours has.
DEVICES = {
    "V100": Device("Tesla V100-SXM2-32GB", 34.1e9, 0.90e12, 150e9, 12.5e9, 15.7e12, kernels=False),
    "A100-40GB": Device("NVIDIA A100-SXM4-40GB", 42.3e9, 1.56e12, 300e9, 25e9, 19.5e12),
    "A100": Device("NVIDIA A100-SXM4-80GB", 84.9e9, 2.04e12, 300e9, 25e9, 19.5e12),
    "H100": Device("NVIDIA H100 80GB HBM3", 84.9e9, 3.35e12, 450e9, 50e9, 67e12),
    "H200": Device("NVIDIA H200", 150.1e9, 4.80e12, 450e9, 50e9, 67e12),
    "B200": Device("NVIDIA B200", 191.5e9, 8.00e12, 900e9, 50e9, 75e12),
    "L40S": Device("NVIDIA L40S", 47.7e9, 0.864e12, 32e9, 12.5e9, 91.6e12),
    "RTX4090": Device("NVIDIA GeForce RTX 4090", 25.3e9, 1.01e12, 32e9, 12.5e9, 82.6e12),
    "MI300X": Device("AMD Instinct MI300X", 206.1e9, 5.30e12, 448e9, 50e9, 163.4e12),
}


def find_device(name: str) -> Device:
    """The GPU of a name such as ``A100`` or ``A100-40GB``.

    Raises:
        ConfigError: there is none of that name.
    """
    found = {key.lower(): device for key, device in DEVICES.items()}.get(name.lower())
    if found is None:
        best = nearest(name.upper(), DEVICES)
        raise ConfigError(f"no GPU {name!r}; the nearest is {best!r} of {', '.join(DEVICES)}")
    return found


def device_of(name: str, memory: float) -> Device | None:
    """The GPU that torch calls ``name``, with as much memory as it really has; None where it is not known."""
    for known in DEVICES.values():
        if _model(known.name) == _model(name):
            return dataclasses.replace(known, name=name, memory=memory)
    return None


def _model(name: str) -> str | None:
    found = re.search(r"\b(V100|A100|H100|H200|B200|L40S|RTX 4090|MI300X)\b", name)
    return found and found.group()
