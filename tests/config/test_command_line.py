"""The whole command line of pretrain_gpt_moe.py, frozen in command_line.txt so that a change of it shows in a diff.

Write the file anew after an intended change, from the root of the repository:

    PYTHONPATH=.:tests python tests/config/test_command_line.py
"""

import argparse
import types
from pathlib import Path
from typing import Any

from megatron.checkpoint import CheckpointError
from megatron.config.flags import build_parser
from megatron.config.option import Option
from megatron.config.run import OPTIONS, build, flatten, to_dict
from megatron.training.resume import check, check_base

FILE = Path(__file__).with_name("command_line.txt")
HEADER = """\
# The command line of pretrain_gpt_moe.py: flags, type, default, choices, range. After each option: may it change when a
# run is resumed, and when a new run starts from the weights (--finetune)? yes; warns; no, the checkpoint is refused.
"""
# Of a model with experts, so that options of experts count.
BASE: dict[str, Any] = {"num_experts": (2,)}
# A value that differs from the base where the default plus one would be no other, or not valid.
OTHER: dict[str, Any] = {"expert_interval": 1, "num_experts": (4,), "moe_expert_parallel_size": (2,)}


def other_value(option: Option) -> Any:
    """A value that differs from the one in ``BASE``."""
    if option.name in OTHER:
        return OTHER[option.name]
    if option.kind is bool:
        return not option.default
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    value = "other" if option.kind is str else option.kind(7)
    return (value,) if option.many else value


def outcome(compare: Any, option: Option) -> str:
    """What ``compare``, a function of megatron.training.resume, says of a run in which this option alone differs."""
    tokenizer: Any = types.SimpleNamespace(fingerprint="0" * 64)
    before = to_dict(build(BASE))
    meta = {"config": before, "vocab_size": 1024, "tokenizer": {"fingerprint": tokenizer.fingerprint}, "optimizer": {}}
    try:
        return "warns" if compare(meta, build(BASE | {option.name: other_value(option)}), 1024, tokenizer) else "yes"
    except CheckpointError:
        return "no"


def flag_words(action: argparse.Action) -> str:
    """One flag with what it takes."""
    words = "/".join(action.option_strings)
    if action.nargs not in (None, 0):
        words += f" {action.nargs}"
    if action.help is argparse.SUPPRESS:
        words += " (hidden)"
    return words


def option_line(option: Option, actions: list[argparse.Action]) -> str:
    """One line for one option."""
    value = option.kind.__name__ + (" ..." if option.many else "") + (" or none" if option.optional else "")
    words = [", ".join(map(flag_words, actions)), f"{value} = {option.default!r}"]
    if option.choices:
        words.append(f"choices {', '.join(option.choices)}")
    if option.range:
        words.append(str(option.range))
    words.append(f"resume: {outcome(check, option)}")
    words.append(f"finetune: {outcome(check_base, option)}")
    return f"{option.name}: {'; '.join(words)}"


def listing() -> str:
    """The text of the file."""
    actions: dict[str, list[argparse.Action]] = {}
    for action in build_parser()._actions:
        actions.setdefault(action.dest, []).append(action)
    lines = [f"{name}: {', '.join(map(flag_words, found))}" for name, found in actions.items() if name not in OPTIONS]
    section = None
    for name, option in OPTIONS.items():
        if option.section != section:
            section = option.section
            lines.append(f"\n[{section}]")
        lines.append(option_line(option, actions[name]))
    return HEADER + "\n" + "\n".join(lines) + "\n"


def test_the_command_line_is_the_frozen_one():
    assert listing().splitlines() == FILE.read_text(encoding="utf-8").splitlines(), "see the first lines of this file"


def test_defaults_of_the_parser_are_those_of_the_options():
    defaults = {action.dest: action.default for action in build_parser()._actions if action.dest in OPTIONS}
    assert defaults == flatten(build({}))


if __name__ == "__main__":
    FILE.write_text(listing(), encoding="utf-8")
