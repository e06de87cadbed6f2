"""Recipes: what they set, what wins over them, and what is said of them."""

import pytest

from megatron.config import RunConfig
from megatron.config.flags import parse_args
from megatron.config.presets import PRESETS, RECIPES, UNPUBLISHED
from megatron.config.recipes import recipe_in_words
from megatron.config.run import OPTIONS, flatten, from_dict, to_dict
from megatron.config.validation import validate_numbers

RECOMMENDED = RECIPES["recommended"]
DEFAULTS = {name: option.default for name, option in OPTIONS.items()}
OF_EXPERTS = {name for name in RECOMMENDED if OPTIONS[name].section == "moe"}


def run(words: str) -> RunConfig:
    return parse_args(words.split())


def changed(config: RunConfig, other: RunConfig) -> dict[str, object]:
    """The values of ``config`` that ``other`` has not, but for the recipe's name."""
    before = flatten(other)
    return {name: value for name, value in flatten(config).items() if value != before[name] and name != "recipe"}


def test_the_published_recipe_is_a_run_without_one():
    assert run("--model 350M+MoE-128 --recipe published") == run("--model 350M+MoE-128")


def test_no_preset_sets_what_a_recipe_sets():
    for name, values in PRESETS.items():
        assert {option: values[option] for option in RECOMMENDED if option in values}.items() <= DEFAULTS.items(), name


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if "MoE" in preset])
def test_the_recommended_recipe_changes_a_preset_in_its_options_alone_and_is_valid(preset):
    recommended, published = (run(f"--model {preset} --recipe {name}") for name in ("recommended", "published"))
    assert changed(recommended, published) == RECOMMENDED
    validate_numbers(recommended, world_size=128 if preset in UNPUBLISHED else 64)


def test_a_dense_model_gets_no_options_of_experts():
    recommended = changed(run("--model 350M --recipe recommended"), run("--model 350M"))
    assert recommended == {name: value for name, value in RECOMMENDED.items() if name not in OF_EXPERTS}


def test_flags_and_files_win_over_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: recommended\nmodel: 350M+MoE-128\nmoe_router_center_input: false")
    config = run(f"--config {file} --no-qk-layernorm")
    assert (config.moe.moe_router_center_input, config.model.qk_layernorm) == (False, False)
    assert config.moe.balancing == RECOMMENDED["moe_router_load_balancing_type"]
    assert run(f"--config {file} --recipe published") == run("--model 350M+MoE-128")


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        *((f"--model {preset}", "published") for preset in PRESETS if preset not in UNPUBLISHED),
        *((f"--model {preset}", "recommended") for preset in UNPUBLISHED),
        ("--model 350M+MoE-128 --lr 1e-3 --seq-length 512 --micro-batch-size 1 --moe-loss-coeff 0.02", "published"),
        ("--model 350M+MoE-128 --num-experts 128 --ffn-hidden-size 4096", "published"),
        ("--model 350M+MoE-128 --num-experts 32", "recommended"),
        ("--model 350M+MoE-128 --topk 2", "recommended"),
        ("--model 350M+MoE-128 --mlp-type residual", "recommended"),
        ("--model 350M --num-experts 8", "recommended"),
        ("--num-experts 8", "recommended"),
        ("--model 350M --num-layers 12", "published"),
        ("", "published"),
    ],
)
def test_auto_is_recommended_for_experts_in_a_model_that_was_not_published(words, recipe):
    config = run(f"{words} --recipe auto")
    assert config.training.recipe == recipe
    assert config == run(f"{words} --recipe {recipe}")


def test_the_name_that_was_applied_is_in_the_record_and_adds_nothing_when_that_is_read():
    config = run("--num-experts 8 --recipe auto --no-qk-layernorm")
    record = to_dict(config)
    assert record["training"]["recipe"] == "recommended"
    assert from_dict(record) == config


def test_an_unknown_recipe_is_an_error_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        run("--recipe recomended")
    said = "--recipe: got 'recomended'; choose from published, recommended, auto (nearest: 'recommended')"
    assert said in capsys.readouterr().err


def test_words_name_every_flag_that_the_other_recipe_would_set(monkeypatch):
    monkeypatch.setitem(RECIPES, "recommended", {"moe_z_loss_coeff": 0.001, "qk_layernorm": True})
    experts = "--model 350M+MoE-128 --recipe"
    assert recipe_in_words(run(f"{experts} published")) == (
        "published; recommended would set --moe-z-loss-coeff 0.001 (not 0.0), --qk-layernorm"
    )
    assert recipe_in_words(run(f"{experts} recommended")) == (
        "recommended; published would set --moe-z-loss-coeff 0.0 (not 0.001), --no-qk-layernorm"
    )
    assert recipe_in_words(run("--model 350M")) == "published; recommended would set --qk-layernorm"


def test_words_name_what_was_given_which_no_recipe_changes(monkeypatch):
    monkeypatch.setitem(RECIPES, "recommended", {"moe_z_loss_coeff": 0.001, "qk_layernorm": True})
    given = "--num-experts 8 --moe-z-loss-coeff 0.01"
    assert recipe_in_words(run(given)) == (
        "published, but for --moe-z-loss-coeff 0.01; recommended would set --qk-layernorm"
    )
    assert recipe_in_words(run(f"{given} --recipe recommended --no-qk-layernorm")) == (
        "recommended, but for --moe-z-loss-coeff 0.01, --no-qk-layernorm; published would change nothing"
    )
