"""Both modules of operations have the same signatures, and kernels are used for layers that they know only."""

import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from megatron.config import ModelConfig, MoEConfig
from megatron.config.option import option
from megatron.moe import kernels, operations, torch_ops, triton_ops
from megatron.moe.kernels import support
from megatron.moe.kernels.support import supported_kernels
from megatron.moe.layer import MoELayer
from megatron.moe.spec import LayerSpec
from megatron.parallel.groups import ALONE, ExpertGroup

H, E = 16, 4
MODEL = ModelConfig(num_layers=2, hidden_size=H, ffn_hidden_size=24, num_attention_heads=2)
ANY_PLAN = {"permutation", "reorder", "expert_mlp"}
NO_ROUTER = ANY_PLAN | {"expert_mlp_sorted"}
NO_LAYER = NO_ROUTER | {"route"}
ALL = NO_LAYER | {"top1_layer"}


def protocol() -> dict[str, inspect.Signature]:
    found = inspect.getmembers(operations.Operations, inspect.isfunction)
    return {name: inspect.signature(f) for name, f in found if not name.startswith("_")}


@pytest.mark.parametrize("module", [torch_ops, triton_ops])
def test_a_module_defines_every_operation_with_the_arguments_of_the_protocol(module):
    assert len(protocol()) == 5
    for name, signature in protocol().items():
        assert (
            list(inspect.signature(getattr(module, name)).parameters.values())
            == list(signature.parameters.values())[1:]
        )


def of(training: bool = True, model: ModelConfig = MODEL, num_experts: int = E, size: int = 1, **moe) -> frozenset[str]:
    config = MoEConfig(num_experts=(num_experts,), **moe)
    return supported_kernels(LayerSpec(model, config, num_experts, ExpertGroup(size, 0, None), ALONE, training))


def test_each_kernel_is_used_for_what_it_knows():
    assert of() == ALL
    assert of(training=False) == NO_LAYER  # nothing is dropped
    assert of(training=False, moe_eval_capacity_factor=2.0) == ALL
    assert of(moe_token_dropping=False) == NO_LAYER
    assert of(size=2) == NO_LAYER
    assert of(topk=2) == NO_ROUTER
    assert of(model=dataclasses.replace(MODEL, qk_layernorm=True)) == ALL  # of attention
    assert of(moe_noise_policy="Jitter") == NO_ROUTER
    assert of(training=False, moe_noise_policy="Jitter") == NO_LAYER
    assert of(num_experts=1024) == ALL
    assert of(num_experts=2048) == ANY_PLAN
    assert of(num_experts=2048, size=2) == NO_ROUTER


@dataclasses.dataclass
class NewRouterOption(MoEConfig):
    """A configuration with an option that no kernel names."""

    gate_function: str = option("softmax", "Scores from logits.")


@dataclasses.dataclass
class NewModelOption(ModelConfig):
    """The same of the experts' form."""

    activation: str = option("gelu", "Between the products.")


def layers(**changed: str) -> list[MoELayer]:
    """With the new option at its default, or ``changed``."""
    shape = {field.name: getattr(MODEL, field.name) for field in dataclasses.fields(MODEL)}
    gate_function, activation = changed.get("gate_function", "softmax"), changed.get("activation", "gelu")
    made = []
    for topk, dropping in ((1, True), (1, False), (2, True)):
        moe = NewRouterOption((E,), topk=topk, moe_token_dropping=dropping, gate_function=gate_function)
        made.append(MoELayer(NewModelOption(**shape, activation=activation), moe, E))
    return made


def noted(name: str, found: list[str]) -> Callable:
    """The operation, which adds its name to a list."""
    function = getattr(triton_ops, name)

    def call(*args, **options):
        found.append(name)
        return function(*args, **options)

    return call


@pytest.fixture
def kernels_run(monkeypatch) -> list[str]:
    """The operations that run in kernels, which count as usable on any device."""
    monkeypatch.setattr(kernels, "_usable_on", lambda device: True)
    found: list[str] = []
    for name in [*protocol(), "top1_layer"]:
        monkeypatch.setattr(triton_ops, name, noted(name, found))
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("changed", [{"gate_function": "sigmoid"}, {"activation": "swiglu"}])
def test_an_option_that_kernels_do_not_name_never_reaches_one(changed, train, kernels_run, caplog):
    caplog.set_level("INFO")
    support._log_unknown.cache_clear()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(10, H, device=device)
    for layer in layers(**changed):
        layer.to(device).train(train)(x)[0].sum().backward()
    assert kernels_run == []
    (option_name,) = changed
    assert [record.message.endswith(f".{option_name}") for record in caplog.records] == [True]
    layers()[2].to(device).train(train)(x)  # at their defaults the same options change nothing
    assert "permutation" in kernels_run
