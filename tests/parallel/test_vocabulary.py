"""An id outside of the vocabulary is an error wherever ids are looked up or scored, on any number of processes."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed

from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel
from megatron.parallel.groups import TensorGroup
from megatron.parallel.vocabulary import check_ids

VOCAB = 64
SHAPE = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8)
OUTSIDE = pytest.mark.parametrize("wrong", [VOCAB, -1, 10**12])


@pytest.mark.parametrize("ids", [[0, VOCAB - 1], []])
def test_ids_of_the_vocabulary_pass(ids):
    check_ids(torch.tensor(ids, dtype=torch.int64), VOCAB)


def refused(wrong: int) -> list[str]:
    """What a model says of a wrong token and of a wrong label, and the loss of a masked one."""
    size = dist.get_world_size()
    group = TensorGroup(size, dist.get_rank(), dist.group.WORLD) if size > 1 else TensorGroup()
    model = GPTModel(SHAPE, MoEConfig(), VOCAB, tensor_group=group)
    right = torch.zeros(2, 8, dtype=torch.int64)
    ids = right.clone()
    ids[1, 3] = wrong
    mask = (ids == 0).float()
    told = []
    for arguments in ((ids,), (ids, right), (right, ids), (right, ids, mask)):
        with pytest.raises(IndexError) as error:
            (model if len(arguments) == 1 else model.loss)(*arguments)
        told.append(str(error.value))
    return told


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@OUTSIDE
def test_a_model_refuses_ids_outside_of_it(size, wrong):
    message = (
        f"got token id {wrong}; expected 0 to 63, the rows of the token table. Give the tokenizer that the data was"
        " made with"
    )
    for told in run_distributed(refused, size, wrong):
        assert told == [message] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("statement", ["model(ids)", "model.loss(right, ids)", "cross_entropy(logits, ids)"])
@OUTSIDE
def test_a_gpu_refuses_them(statement, wrong):
    """In a process of its own, whose GPU can do nothing after."""
    program = f"""
import torch
from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel
from megatron.model.loss import cross_entropy
model = GPTModel({SHAPE!r}, MoEConfig(), {VOCAB}).cuda()
right, logits = torch.zeros(1, 8, dtype=torch.int64).cuda(), torch.zeros(1, 8, {VOCAB}).cuda()
ids = torch.zeros(1, 8, dtype=torch.int64)
ids[0, 3] = {wrong}
ids = ids.cuda()
torch.cuda.set_sync_debug_mode("error")
model.loss(right, right)
torch.cuda.set_sync_debug_mode("default")
torch.cuda.synchronize()
print("ready", flush=True)
{statement}
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "ready", done.stderr
    assert done.returncode
    assert "device-side assert triggered" in done.stderr
