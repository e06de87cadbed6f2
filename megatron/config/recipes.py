"""Recipes: named values of the options that balance experts and keep training stable (``--recipe NAME``).

A recipe is applied like a preset: above the preset's values, below those of a YAML file and of flags. What each holds
is in ``presets.py``. ``auto`` chooses one: launch scripts use it, so that the published models are trained as
published, and other models with experts as recommended.
"""

from collections.abc import Mapping
from typing import Any

from megatron.config import RunConfig
from megatron.config.option import in_words
from megatron.config.presets import PRESETS, RECIPES, UNPUBLISHED
from megatron.config.run import OPTIONS, build, flatten

# Which model it is. Another value makes it another model than the preset's.
_SHAPE = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts", "expert_interval", "topk",
    "mlp_type",
)  # fmt: skip


def apply_recipe(preset: str | None, given: dict[str, Any]) -> RunConfig:
    """The configuration of a preset, if any, under a recipe and values that were given by field name.

    The recipe is ``given["recipe"]``; the configuration has the name of the one that was applied, never ``auto``.
    """
    base = {"run_name": preset, **PRESETS[preset]} if preset else {}
    plain = build(base | given)
    recipe = plain.training.recipe
    if recipe == "auto":
        published = preset is not None and preset not in UNPUBLISHED and _same_shape(plain, build(base))
        recipe = "published" if published or not plain.moe.enabled else "recommended"
    return build(base | _values(recipe, plain) | given | {"recipe": recipe})


def recipe_in_words(config: RunConfig) -> str:
    """Which recipe a run has, what was given in place of the recipe's values, and what the other recipes would set.

    A value that is not the recipe's comes from a flag or a YAML file, so no recipe would change it.
    """
    now, recipe = flatten(config), config.training.recipe
    given = {name: now[name] for name, value in _all_values(recipe, config).items() if value != now[name]}
    words = recipe + (f", but for {_as_flags(given)}" if given else "")
    for other in RECIPES:
        values = {name: value for name, value in _all_values(other, config).items() if value != now[name]}
        changes = {name: value for name, value in values.items() if name not in given}
        if other != recipe:
            words += f"; {other} would set {_as_flags(changes, now)}" if changes else f"; {other} would change nothing"
    return words


def _same_shape(config: RunConfig, other: RunConfig) -> bool:
    one, two = (flatten(each) | {"ffn_hidden_size": each.model.ffn_size} for each in (config, other))
    return all(one[name] == two[name] for name in _SHAPE)


def _values(recipe: str, config: RunConfig) -> dict[str, Any]:
    """What a recipe sets for a model such as ``config``'s: in a dense one, no option of experts."""
    return {
        name: value for name, value in RECIPES[recipe].items() if config.moe.enabled or OPTIONS[name].section != "moe"
    }


def _all_values(recipe: str, config: RunConfig) -> dict[str, Any]:
    """The values under a recipe of all options that any recipe sets: defaults, which no preset changes, or its own."""
    names = [name for other in RECIPES for name in _values(other, config)]
    return {name: OPTIONS[name].default for name in names} | _values(recipe, config)


def _as_flags(values: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> str:
    """Flags that set options, each with the value that it has ``now``."""
    words = []
    for name, value in values.items():
        option = OPTIONS[name]
        if option.kind is bool:
            words.append(str(option.flag if value != option.default else option.opposite))
        else:
            instead = "" if now is None else f" (not {in_words(now[name])})"
            words.append(f"{option.flag} {in_words(value)}{instead}")
    return ", ".join(words)
