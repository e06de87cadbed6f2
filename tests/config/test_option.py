"""One option: its range and words. And what all options and rules have in common."""

import dataclasses
import re

import pytest
from config.problems import GOOD, MOE, problems

from megatron.config.option import RULES, Range, parse_count
from megatron.config.run import OPTIONS, RunConfig, build

NUMBERS = [name for name, option in OPTIONS.items() if option.kind in (int, float)]


@pytest.mark.parametrize(
    ("valid", "inside", "outside", "words"),
    [
        (Range(min=1), (1, 1.5), (0.999, 0), "at least 1"),
        (Range(max=3), (3, -7), (3.1,), "at most 3"),
        (Range(above=0), (1e-9,), (0, -1), "above 0"),
        (Range(min=0, below=1), (0, 0.99), (-0.1, 1), "at least 0 and below 1"),
        (Range(above=0, max=1), (1, 0.1), (0, 1.1), "above 0 and at most 1"),
    ],
)
def test_ranges(valid, inside, outside, words):
    assert all(number in valid for number in inside)
    assert not any(number in valid for number in outside)
    assert float("nan") not in valid
    assert str(valid) == words


def test_every_number_has_a_range_with_its_default():
    assert [name for name in NUMBERS if not OPTIONS[name].range] == []
    for name in NUMBERS:
        assert list(OPTIONS[name].problems(OPTIONS[name].default)) == []


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_numbers_are_found_once_and_alone(name):
    option = OPTIONS[name]
    value = (option.kind(-1),) * 3 if option.many else option.kind(-1)
    extra = {"save": "checkpoints"} if name == "keep_last" else {}
    (problem,) = problems({name: value} | extra)
    assert re.match(rf"{option.flag} [-1.0 ]+ must be ", problem)


@pytest.mark.parametrize("text", ["", "B", "3G", "1.5", "nan", "one"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="expected a"):
        parse_count(text)


class _Recorder:
    """A section of a configuration that notes which of its options are read."""

    def __init__(self, section: object, read: set[str]) -> None:
        self._section, self._read = section, read

    def __getattr__(self, name: str) -> object:
        found = getattr(type(self._section), name, None)
        if isinstance(found, property):
            return found.fget(self)
        if callable(found):
            return lambda *args: found(self, *args)
        self._read.add(name)
        return getattr(self._section, name)


BAD = {"moe_expert_parallel_size": (4,), "rampup_batch_size": (5, 7, 100), "pipeline_layer_split": "1,3", "split": "1"}
BAD |= {"sequence_parallel": True, "reset_attention_mask": True, "spike_sigmas": 6.0, "finetune": True, "load": "old"}
BAD |= {"optimizer_cpu_offload": True, "exp_avg_dtype": "bf16", "cuda_graphs": True, "moe_overlap_chunks": 2}
BAD |= {"tensor_model_parallel_size": 2, "max_position_embeddings": 8, "lr_warmup_tokens": 10**7, "device": "cuda"}


@pytest.mark.parametrize("values", [{}, MOE, BAD, BAD | MOE, MOE | {"cuda_graphs": True, "moe_noise_policy": "Jitter"}])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check.__name__)
def test_a_rule_names_the_options_that_it_reads(rule, values):
    config, read = build(GOOD | values), set()
    recorder = RunConfig(**{
        field.name: _Recorder(getattr(config, field.name), read) for field in dataclasses.fields(config)
    })  # fmt: skip
    if not any(name.endswith("data_path") or name.startswith("tokenizer") for name in rule.options):
        list(rule.check(recorder, 4))  # the others hand the whole section to megatron.data
    assert read <= rule.options <= OPTIONS.keys()
