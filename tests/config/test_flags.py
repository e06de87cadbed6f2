"""The command line: names, precedence, values and errors."""

import argparse
import dataclasses
import json

import pytest
import yaml

from megatron.config import RunConfig
from megatron.config.flags import add_options, build_parser, config_from_args, number, parse_args
from megatron.config.presets import PRESETS
from megatron.config.run import OPTIONS, build, flatten, from_dict, to_dict

# A value other than the default for every option, as it stands in the dataclass.
OTHER_VALUES = {
    "num_experts": (4, 1, 16),
    "moe_expert_parallel_size": (2, 1, 4),
    "data_path": ("0.3", "web text", "0.7", "code"),
    "rampup_batch_size": (32, 32, 1_953_125),
    "skip_samples": ("0-16", "96-160"),
    "split": "90,5,5",
    "train_data_path": ("web", "code"),
    "valid_data_path": ("books=data/books", "code"),
    "test_data_path": ("0.5", "books", "1", "code"),
    "lr": 1.25e-5,
    "min_lr": 1e-9,
    "train_tokens": 300 * 10**9,
}
BY_KIND = {int: 7, float: 0.3, str: "some text"}


def other_value(name: str):
    option = OPTIONS[name]
    if option.kind is bool:
        return not option.default
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    return OTHER_VALUES.get(name, BY_KIND[option.kind])


def as_flags(name: str, value: object) -> list[str]:
    """The words of a command line that set an option."""
    option = OPTIONS[name]
    if name == "precision":
        return [f"--{value}"]
    if option.kind is bool:
        return [option.flag if value != option.default else option.opposite]
    return [option.flag, *map(str, value if option.many else (value,))]


def error_of(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """What a wrong command line prints; it exits with 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        parse_args(list(argv))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def write_yaml(path, text: str) -> str:
    (path / "run.yaml").write_text(text)
    return str(path / "run.yaml")


def test_no_flags_give_the_defaults():
    assert parse_args([]) == RunConfig()


def test_flag_sets_every_option():
    for name in OPTIONS.keys() - {"recipe"}:  # which sets others too
        value = other_value(name)
        assert flatten(parse_args(as_flags(name, value))) == flatten(RunConfig()) | {name: value}, name


@pytest.mark.parametrize("values", [{}, *PRESETS.values(), {name: other_value(name) for name in OPTIONS}])
def test_dict_round_trip_is_exact(values):
    config = build(values)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("values", [*PRESETS.values(), {name: other_value(name) for name in OPTIONS}])
def test_yaml_round_trip_nested_and_flat(values, tmp_path):
    config = build(values)
    nested = to_dict(config)
    flat = {name: value for section in nested.values() for name, value in section.items()}
    dashed = {name.replace("_", "-"): value for name, value in flat.items()}
    for mapping in (nested, flat, dashed):
        assert parse_args(["--config", write_yaml(tmp_path, yaml.safe_dump(mapping))]) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_round_trip_of_presets(preset):
    wanted = parse_args(["--model", preset])
    words = [word for name, value in PRESETS[preset].items() if value is not None for word in as_flags(name, value)]
    assert parse_args([*words, "--run-name", preset]) == wanted


def test_precedence_defaults_preset_yaml_flags(tmp_path):
    file = write_yaml(tmp_path, "lr: 0.5\nmin_lr: 0.25\nseed: 5")
    config = parse_args(["--config", file, "--lr", "0.75", "--model", "350M"])
    assert config.optimizer.lr == 0.75  # flag
    assert config.optimizer.min_lr == 0.25  # file, not the preset's 3e-5
    assert config.training.seed == 5  # file, not the default
    assert config.optimizer.lr_decay_tokens == 260 * 10**9  # preset
    assert config.data.num_workers == RunConfig().data.num_workers  # default
    assert config.logging.run_name == "350M"


def test_a_flag_with_the_defaults_value_still_overrides():
    assert parse_args(["--model", "1.3B", "--global-batch-size", "256"]).training.global_batch_size == 256


def test_preset_from_yaml_and_overridden_by_flag(tmp_path):
    file = write_yaml(tmp_path, "model: 350M+MoE-128\nnum-experts: 8")
    assert parse_args(["--config", file]).moe.num_experts == (8,)
    assert parse_args(["--config", file, "--model", "1.3B"]).model.hidden_size == 2048


def test_switches_of_a_preset_can_be_undone_and_optional_values_unset():
    config = parse_args(["--model", "1.3B", "--no-checkpoint-activations", "--rampup-batch-size", "none"])
    assert config.training.checkpoint_activations is False
    assert config.training.rampup_batch_size is None


def test_switches_that_are_on_by_default():
    config = parse_args(["--disable-moe-token-dropping", "--no-moe-rts"])
    assert not config.moe.moe_token_dropping
    assert not config.moe.moe_rts
    assert parse_args(["--no-moe-rts", "--moe-rts"]).moe.moe_rts


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("300B", 300 * 10**9), ("375M", 375 * 10**6), ("1.001T", 1_001 * 10**9), ("2_400_000", 2_400_000), ("1e9", 10**9)],
)
def test_counts(text, tokens, tmp_path):
    assert parse_args(["--train-tokens", text]).training.train_tokens == tokens
    assert parse_args(["--config", write_yaml(tmp_path, f"train_tokens: {text}")]).training.train_tokens == tokens


def test_yaml_reads_what_yaml_calls_text_as_numbers(tmp_path):
    assert parse_args(["--config", write_yaml(tmp_path, "lr: 3e-4")]).optimizer.lr == 3e-4


def test_yaml_blend_mixes_numbers_and_names(tmp_path):
    config = parse_args(["--config", write_yaml(tmp_path, "data_path: [0.25, web, 0.75, code]")])
    assert config.data.data_path == ("0.25", "web", "0.75", "code")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("no-moe-rts: true", "moe_rts", False),
        ("moe_rts: false", "moe_rts", False),
        ("moe: {disable_moe_token_dropping: true}", "moe_token_dropping", False),
        ("checkpoint-activations: true", "checkpoint_activations", True),
        ("fp16: true", "precision", "fp16"),
        ("fp16: false", "precision", "bf16"),
        ("--fp32: true", "precision", "fp32"),
        ("num_experts: 8", "num_experts", (8,)),
        ("moe:", "moe_rts", True),
        ("", "moe_rts", True),
    ],
)
def test_yaml_accepts_flag_names(text, field, value, tmp_path):
    assert flatten(parse_args(["--config", write_yaml(tmp_path, text)]))[field] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layer: 3", "num_layer: unknown key; the nearest valid one is 'num_layers'"),
        ("model: {hiden_size: 3}", "model.hiden_size: unknown key; the nearest valid one is 'hidden_size'"),
        ("modle: {num_layers: 3}", "modle: unknown key; the nearest valid one is 'model'"),
        ("model: {lr: 3}", "'lr' belongs to the section 'optimizer'"),
        ("model: 351M", "no preset '351M'; the nearest is '350M'"),
        ("moe: 8", "moe: got 8; expected a section"),
        ("lr: 1\noptimizer: {lr: 2}", "lr is given twice"),
        ("bf16: true\nfp16: true", "precision is given twice"),
        ("num_layers: twelve", "num_layers: got 'twelve'; expected a whole number"),
        ("num_layers: 1.5", "num_layers: got 1.5; expected a whole number"),
        ("num_layers: null", "num_layers: got None; expected a whole number"),
        ("num_layers: true", "num_layers: got True; expected a whole number"),
        ("lr: .nan", "lr: got nan; expected a finite number"),
        ("moe_rts: 1", "moe_rts: got 1; expected true or false"),
        ("bf16: 1", "bf16: got 1; expected true or false"),
        ("run_name: 350", "run_name: got 350; expected text (put it in quotes)"),
        ("num_experts: [4, x]", "num_experts: got 'x'; expected a whole number"),
        ("lr_decay_style: cosin", "choose from cosine, linear, constant (nearest: 'cosine')"),
        ("- num_layers", "holds list; expected a mapping"),
        ("lr: [1, 2", "is not valid YAML"),
    ],
)
def test_yaml_errors(text, message, capsys, tmp_path):
    assert message in error_of(capsys, "--config", write_yaml(tmp_path, text))


def test_yaml_errors_are_all_reported(capsys, tmp_path):
    printed = error_of(capsys, "--config", write_yaml(tmp_path, "num_layer: 3\nlr: fast"))
    assert "num_layers" in printed
    assert "'fast'" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layer", "3"], "unknown flag --num-layer; the nearest valid one is --num-layers"),
        (["--deepspeed-config=x"], "unknown flag --deepspeed-config; the nearest valid one is --deepspeed_config"),
        (["--no-checkpoint-activation"], "nearest valid one is --no-checkpoint-activations"),
        (["stray"], "'stray' belongs to no flag"),
        (["--model", "350m"], "no preset '350m'; the nearest is '350M'"),
        (["--num-layers", "many"], "argument --num-layers: got 'many'; expected a whole number"),
        (["--num-layers"], "argument --num-layers: expected one argument"),
        (["--lr", "inf"], "argument --lr: got inf; expected a finite number"),
        (["--train-tokens", "3G"], "argument --train-tokens: got '3G'; expected a count"),
        (["--train-tokens", "inf"], "argument --train-tokens: got 'inf'; expected a count"),
        (["--train-tokens", "1.5"], "got '1.5', which is 1.5; expected a whole number"),
        (["--mlp-type", "residul"], "choose from standard, residual (nearest: 'residual')"),
        (["--bf16", "--fp16"], "not allowed with argument"),
        (["--rampup-batch-size", "32", "none"], "'none' stands alone"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_errors_exit_with_2(argv, message, capsys):
    assert message in error_of(capsys, *argv)


def test_launchers_additions_are_ignored_and_hidden():
    assert parse_args(["--local_rank=3", "--deepspeed"]) == RunConfig()
    assert "local_rank" not in build_parser().format_help()


def test_help_shows_every_option_with_its_default():
    text = " ".join(build_parser().format_help().split())
    for name, option in OPTIONS.items():
        assert (name == "precision" and "--bf16" in text) or option.flag in text
    assert "Number of transformer layers. (default: 24; at least 1)" in text
    assert "pretrain_gpt_moe.py --model 350M" in text


def test_example_of_the_help_is_valid():
    example = build_parser().epilog.split("deepspeed pretrain_gpt_moe.py ")[1].split("\n  The")[0]
    assert parse_args(example.replace("\\\n", " ").split()).checkpoint.save == "checkpoints/350M"


def test_tools_reuse_a_part_of_the_flags():
    parser = argparse.ArgumentParser()
    add_options(parser, ("tokenizer_type", "vocab_file"), "tokenizer")
    parser.add_argument("--input")
    args = parser.parse_args(["--input", "x.jsonl", "--vocab-file", "v.json"])
    assert vars(args) == {"input": "x.jsonl", "vocab_file": "v.json", "tokenizer_type": "GPT2BPETokenizer"}
    wanted = RunConfig()
    wanted.data = dataclasses.replace(wanted.data, vocab_file="v.json")
    assert config_from_args(args) == wanted


@pytest.mark.parametrize(
    ("kind", "bounds", "word", "message"),
    [
        (int, {"min": 1}, "0", "got 0; expected a whole number, at least 1"),
        (int, {"min": 0, "max": 7}, "8", "got 8; expected a whole number, at least 0 and at most 7"),
        (float, {"above": 0}, "inf", "got inf; expected a number, above 0"),
        (int, {"min": 1}, "1.5", "invalid int value: '1.5'"),
    ],
)
def test_numbers_of_tools_have_ranges(kind, bounds, word, message, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=number(kind, **bounds))
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", word])
    assert f"argument --count: {message}" in capsys.readouterr().err
