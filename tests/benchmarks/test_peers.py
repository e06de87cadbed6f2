"""Other projects' MoE layers, built from their own code and compared with float64."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from benchmarks import peers

SHAPE = peers.Shape(hidden=32, experts=4, device="cpu", dtype=torch.float32)


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(128, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_sorted_layer(dtype, tolerance):
    peer = peers.sorted_layer(dataclasses.replace(SHAPE, dtype=dtype))
    peers.verify(peer, tokens(dtype), tolerance)
    y_TH, aux_loss = peer.layer(tokens(dtype))
    p_TE = (tokens(dtype) @ peer.router_EH.T).float().softmax(-1)
    share_E = torch.bincount(p_TE.argmax(-1), minlength=4) / 128
    torch.testing.assert_close(aux_loss, 4 * (p_TE.mean(0) * share_E).sum())
    assert y_TH.dtype == dtype


RUN = """
import contextlib, sys
from unittest import mock
import torch
from benchmarks import peers
name, device, dtype, tolerance = sys.argv[1:]
if name == "megatron" and device == "cpu":  # it asks for CUDA's device and streams even where nothing else needs them
    torch.cuda.current_device, torch.cuda.current_stream = lambda: "cpu", lambda: None
    torch.cuda.Stream, torch.cuda.stream = mock.MagicMock, lambda stream: contextlib.nullcontext()
dtype = getattr(torch, dtype)
peer = peers.PEERS[name](peers.Shape(64, 4, device, dtype))
torch.manual_seed(0)
peers.verify(peer, torch.randn(256, 64, device=device).to(dtype), float(tolerance))
print(peer.name, peer.capacity_factor)
"""


def verified(*words: str) -> str:
    """In a process of its own, for the groups that the layers leave behind."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("deepspeed", "DeepSpeed 0.19.8 1.0"),
        pytest.param(
            "megatron", "Megatron-core 0.16.1 without Transformer Engine, no biases None", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_layers_that_need_process_groups(name, shown):
    assert verified(name, "cpu", "float32", "2e-5") == shown


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepspeed", "grouped_mm", "megatron"])
def test_peers_in_bf16_on_a_gpu(name):
    assert verified(name, "cuda", "bfloat16", "2e-2")


def test_scattermoe_without_a_checkout_says_how_to_give_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "scattermoe", None)
    with pytest.raises(ImportError, match="--scattermoe DIR"):
        peers.scattermoe_layer(SHAPE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("output", "outputs of expert 0: relative error 0.001"),
        ("gradient", "tokens' gradient: relative error 0.001"),
        ("nan", "not finite"),
        ("dropped", "64 tokens more or less"),
    ],
)
def test_a_wrong_peer_is_found(wrong, message, monkeypatch):
    peer = peers.sorted_layer(SHAPE)
    forward = peer.layer.forward

    def broken(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y_TH, aux_loss = forward(x_TH)
        if wrong == "output":
            y_TH = y_TH * 1.001
        elif wrong == "gradient":
            y_TH = y_TH + 1e-3 * (y_TH - y_TH.detach())
        elif wrong == "nan":
            y_TH = y_TH.where(torch.arange(len(y_TH))[:, None] != 5, torch.nan)
        else:
            y_TH = y_TH * (torch.arange(len(y_TH))[:, None] % 2)
        return y_TH, aux_loss

    monkeypatch.setattr(peer.layer, "forward", broken)
    with pytest.raises(AssertionError, match=message):
        peers.verify(peer, tokens(), 2e-5)
