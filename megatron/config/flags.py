"""The command line of a run, generated from the dataclass fields.

``parse_args`` fills a :class:`RunConfig` from, in rising precedence: defaults, ``--model`` preset, ``--config`` YAML
file, flags. Tools reuse parts of it: ``build_parser(["data"])``, then ``config_from_args``.
"""

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import yaml

from megatron.config.errors import ConfigError, nearest
from megatron.config.options import OPTIONS, PRECISIONS, SECTIONS, Option, build, from_dict, read_mapping, to_dict
from megatron.config.presets import PRESETS
from megatron.config.run import RunConfig

__all__ = ["build_parser", "config_from_args", "from_dict", "parse_args", "to_dict"]

_EPILOG = """\
values:
  Token counts accept suffixes: 300B, 375M, 1.5K. The word none unsets an optional value. Every switch has its opposite
  (--checkpoint-activations, --no-checkpoint-activations). Precedence: defaults < --model < --config < flags.

examples:
  A dense GPT of 350M parameters on 8 GPUs:
    deepspeed pretrain_gpt_moe.py --model 350M --train-tokens 300B --data-path corpus_text_document \\
      --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --save checkpoints/350M
  The same with 8 experts in every other layer, one on each GPU: add
      --num-experts 8 --moe-expert-parallel-size 8
  The same from a file, with another learning rate; run.yaml holds lines such as "model: 350M" and "num-experts: 8":
    torchrun --nproc-per-node 8 pretrain_gpt_moe.py --config run.yaml --lr 2e-4
"""
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_NOT_GIVEN = object()


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser with short errors that name the nearest valid flag."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        namespace, rest = self.parse_known_args(args, namespace)
        unknown = [word.split("=", 1)[0] for word in rest if word.startswith("-")]
        if unknown:
            valid = [flag for flag in self._option_string_actions if flag.startswith("--")]
            hints = (f"unknown flag {flag}; the nearest valid one is {nearest(flag, valid)}" for flag in unknown)
            self.error("; ".join(hints))
        if rest:
            self.error(f"{' '.join(rest)!r} belongs to no flag")
        return namespace

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags.\n")


class _Store(argparse.Action):
    """Stores a value, or several as a tuple; a single ``none`` unsets it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        if isinstance(values, list):
            if None in values and len(values) > 1:
                parser.error(f"argument {'/'.join(self.option_strings)}: 'none' stands alone")
            values = None if values == [None] else tuple(values)
        setattr(namespace, self.dest, values)


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration of a run from a command line (by default that of the process).

    A wrong command line prints what is wrong and exits with status 2. Whether the numbers fit each other and the
    number of processes is for :func:`megatron.config.validation.validate` to say.
    """
    parser = build_parser()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(OPTIONS, _NOT_GIVEN)))
    try:
        preset, from_file = _read_yaml(args.config) if args.config else (None, {})
        preset = args.model or preset
        base = {"run_name": preset, **PRESETS[preset]} if preset else {}
    except ConfigError as error:
        parser.error(f"--config {args.config}: {error}")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and value is not _NOT_GIVEN}
    return build(base | from_file | given)


def config_from_args(args: argparse.Namespace) -> RunConfig:
    """The configuration of what a tool parsed with a part of the flags; defaults for the rest."""
    return build({name: value for name, value in vars(args).items() if name in OPTIONS})


def build_parser(
    sections: Sequence[str] | None = None, fields: Collection[str] | None = None, **kwargs: Any
) -> argparse.ArgumentParser:
    """A parser of the flags of some sections, with typed values and defaults.

    Args:
        sections: names of the sections; by default all, together with ``--model``, ``--config`` and what launchers add.
        fields: only these of the sections' fields; by default all.
        **kwargs: for :class:`argparse.ArgumentParser`, such as ``description``.
    """
    if sections is None:
        about = "Pretrain a GPT, dense or with mixtures of experts."
        kwargs = {"usage": "%(prog)s [flags]", "description": about, "epilog": _EPILOG} | kwargs
    parser = _Parser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
    if sections is None:
        _add_run_flags(parser)
    for section in SECTIONS if sections is None else sections:
        group = parser.add_argument_group(section, SECTIONS[section].__doc__.splitlines()[0].replace("``", ""))
        for option in OPTIONS.values():
            if option.section == section and (fields is None or option.name in fields):
                _add_option(group, option)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run", "Where the values come from that no flag gives.")
    group.add_argument(
        "--model", type=_reader(_read_preset), metavar="NAME", help=f"Preset of a published run: {', '.join(PRESETS)}."
    )
    group.add_argument(
        "--config", metavar="FILE", help="YAML file of options, by section or flat, under field or flag names."
    )
    # The deepspeed launcher appends --local_rank=N to every command line; the engine reads LOCAL_RANK instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # Command lines written for other DeepSpeed programs carry --deepspeed. DeepSpeed is always the engine here.
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def _add_option(group: Any, option: Option) -> None:
    help_text = option.help.replace("%", "%%")
    if option.name == "precision":
        exclusive = group.add_mutually_exclusive_group()
        for precision in PRECISIONS:
            text = f"{precision} weights and activations{' (default)' if precision == option.default else ''}."
            exclusive.add_argument(
                f"--{precision}", dest=option.name, action="store_const", const=precision, help=text,
                default=option.default,
            )  # fmt: skip
    elif option.kind is bool:
        add = {"dest": option.name, "action": "store_const", "default": option.default}
        help_text = f"{help_text} (default: off; undo: {option.opposite})"
        group.add_argument(option.flag, const=not option.default, help=help_text, **add)
        group.add_argument(option.opposite, const=option.default, help=argparse.SUPPRESS, **add)
    else:
        metavar = option.metavar or (f"{{{','.join(option.choices)}}}" if option.choices else _METAVARS[option.kind])
        if option.default not in (None, ()):
            shown = " ".join(map(str, option.default)) if option.many else option.default
            help_text = f"{help_text} (default: {shown})"
        group.add_argument(
            option.flag, dest=option.name, action=_Store, type=_reader(option.from_word), nargs=option.nargs,
            default=option.default, metavar=metavar, help=help_text,
        )  # fmt: skip


def _reader(read: Any) -> Any:
    """``read`` as an argparse type: its ConfigError becomes the parser's error."""

    def convert(word: str) -> Any:
        try:
            return read(word)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _read_preset(name: Any) -> str:
    if name not in PRESETS:
        best = nearest(str(name), PRESETS)
        raise ConfigError(f"no preset {name!r}; the nearest is {best!r} of {', '.join(PRESETS)}")
    return name


def _read_yaml(path: str) -> tuple[str | None, dict[str, Any]]:
    """The preset that a YAML file names, if any, and its values by field name."""
    try:
        with open(path, encoding="utf-8") as file:
            mapping = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict | None):
        raise ConfigError(f"holds {type(mapping).__name__}; expected a mapping of options, such as 'num_layers: 12'")
    mapping = mapping or {}
    preset = None
    if isinstance(mapping.get("model"), str):  # "model: 350M" names a preset; "model:" with a mapping is the section
        preset = _read_preset(mapping["model"])
        mapping = {key: value for key, value in mapping.items() if key != "model"}
    return preset, read_mapping(mapping)
