"""The command line of a run, generated from the dataclass fields.

``parse_args`` fills a :class:`RunConfig` from, in rising precedence: defaults, ``--model`` preset, ``--recipe``,
``--config`` YAML file, flags. Tools take some options of a run by :func:`add_options`, and share the flags at the end
of this file.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import yaml

from megatron.config.errors import ConfigError, nearest
from megatron.config.option import KIND_NAMES, Option, Range, in_words
from megatron.config.presets import PRESETS
from megatron.config.recipes import apply_recipe
from megatron.config.run import OPTIONS, PRECISIONS, SECTIONS, RunConfig, build, read_mapping

_EPILOG = """\
values:
  Token counts accept suffixes: 300B, 375M, 1.5K. The word none unsets an optional value. Every switch has its opposite
  (--checkpoint-activations, --no-checkpoint-activations). Precedence: defaults < --model < --recipe < --config < flags.

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
    except ConfigError as error:
        parser.error(f"--config {args.config}: {error}")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and value is not _NOT_GIVEN}
    return apply_recipe(preset, from_file | given)


def build_parser() -> argparse.ArgumentParser:
    """A parser of all flags of a run, with typed values and defaults."""
    parser = _Parser(
        usage="%(prog)s [flags]", description="Pretrain a GPT, dense or with mixtures of experts.", epilog=_EPILOG,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_run_flags(parser)
    for section, kind in SECTIONS.items():
        about = (kind.__doc__ or "").splitlines()[0].replace("``", "")
        add_options(parser, (name for name, option in OPTIONS.items() if option.section == section), section, about)
    return parser


def add_options(
    parser: argparse.ArgumentParser, names: Iterable[str], title: str, about: str | None = None
) -> argparse._ArgumentGroup:
    """Add a group with the flags of some options of a run; :func:`config_from_args` reads their values."""
    group = parser.add_argument_group(title, about)
    for name in names:
        _add_option(group, OPTIONS[name])
    return group


def config_from_args(args: argparse.Namespace) -> RunConfig:
    """The configuration of what a tool parsed with flags of :func:`add_options`; defaults for the rest."""
    return build({name: value for name, value in vars(args).items() if name in OPTIONS})


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


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    help_text = option.help.replace("%", "%%")
    if option.name == "precision":
        exclusive = group.add_mutually_exclusive_group()
        for precision in PRECISIONS:
            text = f"{precision} weights and activations{' (default)' if precision == option.default else ''}."
            exclusive.add_argument(
                f"--{precision}", dest=option.name, action="store_const", const=precision, help=text,
                default=option.default,
            )  # fmt: skip
    elif option.opposite is not None:
        add = {"dest": option.name, "action": "store_const", "default": option.default}
        help_text = f"{help_text} (default: off; undo: {option.opposite})"
        group.add_argument(option.flag, const=not option.default, help=help_text, **add)
        group.add_argument(option.opposite, const=option.default, help=argparse.SUPPRESS, **add)
    else:
        metavar = option.metavar or (f"{{{','.join(option.choices)}}}" if option.choices else _METAVARS[option.kind])
        facts = [] if option.default in (None, ()) else [f"default: {in_words(option.default)}"]
        facts += [str(option.range)] if option.range else []
        if facts:
            help_text = f"{help_text} ({'; '.join(facts)})"
        group.add_argument(
            option.flag, dest=option.name, action=_Store, type=_reader(option.from_word), nargs=option.nargs,
            default=option.default, metavar=metavar, help=help_text,
        )  # fmt: skip


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
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


# -------------------------------------------------------------------------------------------- flags that tools share

TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Add a group with the options that a run has for its tokenizer."""
    add_options(parser, ("tokenizer_type", *TOKENIZER_FILES, "eod_token"), "tokenizer")


def add_tokenizer_files(
    parser: argparse.ArgumentParser, about: str = "Where its files are now, if they moved since training."
) -> argparse._ArgumentGroup:
    """Add a group with the files of a trained model's tokenizer; returns it. :func:`tokenizer_files` reads them."""
    group = parser.add_argument_group("tokenizer", about)
    for name in TOKENIZER_FILES:
        group.add_argument(OPTIONS[name].flag, metavar=OPTIONS[name].metavar)
    return group


def tokenizer_files(args: argparse.Namespace) -> dict[str, str | None]:
    """The tokenizer's files by option; None for what was not given."""
    return {name: getattr(args, name) for name in TOKENIZER_FILES}


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="Number format of the model (default: fp32 on a CPU, that of the training run on a GPU).",
    )


def number(kind: type, **bounds: float) -> Callable[[str], Any]:
    """An argparse type: a number of ``kind`` within the bounds of an option's :class:`Range`."""
    valid = Range(**bounds)

    def convert(word: str) -> Any:
        value = kind(word)
        if not (-math.inf < value < math.inf and value in valid):
            raise argparse.ArgumentTypeError(f"got {word}; expected {KIND_NAMES[kind]}, {valid}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the word is no number
    return convert


COUNT = number(int, min=1)
"""An argparse type: a whole number, at least 1."""
