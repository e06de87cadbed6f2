"""What layers draw follows from the micro-batch's seed and the layer's number."""

import torch

from megatron.model.randomness import layer_seed, seed_generators, seed_layer


def test_generators_are_seeded_as_torch_does():
    torch.manual_seed(5)
    expected = torch.rand(9)
    torch.rand(3)
    seed_generators(5)
    assert torch.equal(torch.rand(9), expected)
    assert torch.initial_seed() == 5


def test_layers_have_numbers_of_their_own_that_repeat():
    seeds = {layer_seed(seed, layer) for seed in range(30) for layer in range(30)}
    assert len(seeds) == 900
    seed_layer(7, 3)
    first = torch.rand(9)
    seed_layer(7, 4)
    assert not torch.equal(torch.rand(9), first)
    seed_layer(7, 3)
    assert torch.equal(torch.rand(9), first)
