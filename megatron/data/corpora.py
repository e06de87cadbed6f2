"""Which corpora a run reads and what for, from the words of ``--data-path``, ``--train-data-path`` and their like."""

import dataclasses
import glob
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from megatron.config import DataConfig
from megatron.data.errors import DataError

_PATHS = ("train_data_path", "valid_data_path", "test_data_path")


@dataclasses.dataclass(frozen=True)
class Blend:
    """Corpora and how much of each; without ``weights`` in proportion to their tokens."""

    prefixes: list[str]
    weights: list[float] | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of data: a blend, and from where to where the documents of each of its corpora are read."""

    flag: str
    blend: Blend
    first: float = 0.0
    """As a fraction of all documents, like ``last``."""
    last: float = 1.0


@dataclasses.dataclass(frozen=True)
class Corpora:
    """What a run reads. Sets for validation and test are named; those of ``--split`` and blends "valid" and "test"."""

    train: Source
    valid: Mapping[str, Source]
    test: Mapping[str, Source]

    def sources(self) -> Iterator[Source]:
        """All sets."""
        yield self.train
        yield from self.valid.values()
        yield from self.test.values()

    def prefixes(self) -> dict[str, str]:
        """Every corpus, with the flag that names it first."""
        found: dict[str, str] = {}
        for source in self.sources():
            for prefix in source.blend.prefixes:
                found.setdefault(prefix, source.flag)
        return found


def find_corpora(data: DataConfig) -> Corpora:
    """The corpora that a configuration names. Looks at no files.

    Raises:
        DataError: what is wrong with the words.
    """
    given = [name for name in _PATHS if getattr(data, name)]
    if data.data_path and given:
        raise DataError(
            f"--data-path and {_flag(given[0])} exclude each other: give --data-path, which --split divides into"
            " training, validation and test, or --train-data-path, --valid-data-path and --test-data-path"
        )
    if not data.data_path and not given:
        raise DataError(
            "--data-path is missing (launch scripts: DATA_PATH); make a dataset with tools/preprocess_data.py and give"
            " its PREFIX, or a blend 0.7 PREFIX1 0.3 PREFIX2"
        )
    if data.data_path:
        blend, shares = parse_blend(data.data_path), parse_split(data.split)
        train, valid, test = (
            Source("--data-path", blend, sum(shares[:place]), sum(shares[: place + 1])) for place in range(3)
        )
        if not shares[0]:
            raise DataError(f"--split {data.split!r} leaves nothing for training; use 98,2,0")
        return Corpora(train, {"valid": valid} if shares[1] else {}, {"test": test} if shares[2] else {})
    if not data.train_data_path:
        raise DataError(f"{_flag(given[0])} requires --train-data-path; add it")
    if data.split != DataConfig.split:
        raise DataError(
            f"--split {data.split} divides --data-path and has no effect on --train-data-path; drop it, or give"
            " --data-path"
        )
    train = Source("--train-data-path", parse_blend(data.train_data_path, "--train-data-path"))
    return Corpora(train, _named(data.valid_data_path, "valid"), _named(data.test_data_path, "test"))


def parse_blend(words: tuple[str, ...], flag: str = "--data-path") -> Blend:
    """Read PREFIX..., or WEIGHT PREFIX WEIGHT PREFIX ...

    Raises:
        DataError: neither form, a weight that is not positive, or a corpus that is given twice.
    """
    given = f"{flag} {' '.join(words)}"
    if not _has_weights(words):
        blend = Blend(list(words), None)
    elif len(words) % 2 or any(_number(word) is None for word in words[::2]):
        raise DataError(f"{given}: weights and prefixes must alternate; write 0.7 PREFIX1 0.3 PREFIX2")
    else:
        blend = Blend(list(words[1::2]), [float(word) for word in words[::2]])
    for weight, prefix in zip(blend.weights or [], blend.prefixes, strict=False):
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(f"{flag}: the weight of {prefix} is {weight:g}, expected a number above 0")
    if len(set(blend.prefixes)) < len(blend.prefixes):
        raise DataError(f"{given}: a dataset is given more than once; give it once, with the sum of its weights")
    return blend


def parse_split(split: str) -> list[float]:
    """Read ``--split``, such as ``98,2,0``, into the shares of train, valid and test, with sum 1.

    Raises:
        DataError: not one to three plain numbers, or all 0.
    """
    words = [word.strip() for word in split.split(",")]
    plain = all(re.fullmatch(r"\d*\.?\d+|\d+\.", word) for word in words)
    if len(words) > 3 or not plain or not any(map(float, words)):
        raise DataError(
            f"--split {split!r} must be up to three numbers, separated by commas, for training, validation and test,"
            " and not all 0; use 98,2,0"
        )
    shares = [float(word) for word in words] + [0.0] * (3 - len(words))
    return [share / sum(shares) for share in shares]


def _named(words: tuple[str, ...], kind: str) -> dict[str, Source]:
    """The sets of ``--valid-data-path`` or ``--test-data-path``: PREFIX or NAME=PREFIX each, or one blend."""
    flag = f"--{kind}-data-path"
    if not words:
        return {}
    if _has_weights(words):
        return {kind: Source(flag, parse_blend(words, flag))}
    sets: dict[str, Source] = {}
    for word in words:
        name, equals, prefix = word.partition("=")
        if not equals or "/" in name:  # the = belongs to the path
            prefix = word
            name = PurePath(word).name.removesuffix("_text_document") or word
        if not name or not prefix:
            raise DataError(f"{flag} {word}: expected a name and a prefix around =; write NAME=PREFIX")
        if name in sets:
            raise DataError(f"{flag}: two sets have the name {name!r}; name them, NAME1=PREFIX1 NAME2=PREFIX2")
        sets[name] = Source(flag, Blend([prefix], None))
    return sets


def _has_weights(words: tuple[str, ...]) -> bool:
    return len(words) > 1 and any(_number(word) is not None for word in words)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# -------------------------------------------------------------------------------------------- what a configuration asks


def word_problems(data: DataConfig, eval_interval: int) -> Iterator[str]:
    """What is wrong with the words that name a run's data, as far as they are given, and options without effect."""
    if not data.data_path and not any(getattr(data, name) for name in _PATHS):
        data = dataclasses.replace(data, data_path=("PREFIX",))  # file_problems reports that none is given
    try:
        find_corpora(data)
    except DataError as error:
        yield str(error)
        return
    if data.valid_data_path and eval_interval == 0:
        yield "--valid-data-path is never read with --eval-interval 0; use 1 or more, or drop --valid-data-path"


def file_problems(data: DataConfig) -> Iterator[str]:
    """One line for each dataset of a run whose files are not there, or for the words that name none."""
    try:
        prefixes = find_corpora(data).prefixes()
    except DataError as error:
        yield str(error)
        return
    for prefix, flag in prefixes.items():
        yield from missing_problems(prefix, flag)


def missing_problems(prefix: str, flag: str) -> list[str]:
    """Which files the dataset ``prefix`` lacks, and what may have been meant; empty where it has both."""
    missing = missing_files(prefix)
    return [f"{flag} {prefix}: no file {' or '.join(missing)}; {_prefix_fix(prefix)}"] if missing else []


def missing_files(prefix: str) -> list[str]:
    """Those of PREFIX.idx and PREFIX.bin that do not exist."""
    return [prefix + suffix for suffix in (".idx", ".bin") if not Path(prefix + suffix).is_file()]


def _prefix_fix(prefix: str) -> str:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.is_file():
        return f"give the prefix without its ending: {path.with_suffix('')}"
    beside = path.parent.glob(f"{glob.escape(path.name)}*.idx") if path.parent.is_dir() else ()
    similar = sorted(str(found.with_suffix("")) for found in beside if found.with_suffix(".bin").is_file())
    return f"use {' or '.join(similar[:3])}" if similar else "write the dataset with tools/preprocess_data.py"
