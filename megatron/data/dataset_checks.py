"""What can be wrong with datasets is found here, before the first step and with all problems in one message."""

import dataclasses
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

from megatron.data import manifest
from megatron.data.errors import DataError
from megatron.data.index_file import ANEW, index_problems, read_index
from megatron.data.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass
class Blend:
    """Datasets and how much of each; ``weights`` is None where ``--data-path`` gives none."""

    prefixes: list[str]
    weights: list[float] | None


def parse_blend(data_path: tuple[str, ...]) -> Blend:
    """Read ``--data-path``: PREFIX..., or WEIGHT PREFIX WEIGHT PREFIX ...

    Raises:
        DataError: neither form, a weight that is not positive, or a dataset that stands there twice.
    """
    if not data_path:
        raise DataError("--data-path is not given; expected PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
    words = list(data_path)
    numbers = [_number(word) for word in words[::2]]
    given = " ".join(words)
    if len(words) == 1 or all(number is None for number in numbers):
        blend = Blend(words, None)
    elif len(words) % 2 or None in numbers:
        raise DataError(f"--data-path {given}: weights and prefixes must alternate: WEIGHT PREFIX WEIGHT PREFIX ...")
    else:
        blend = Blend(words[1::2], [number for number in numbers if number is not None])
    for weight, prefix in zip(blend.weights or [], blend.prefixes, strict=False):
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(f"--data-path: the weight of {prefix} is {weight:g}, expected a number above 0")
    if len(set(blend.prefixes)) < len(blend.prefixes):
        raise DataError(f"--data-path {given}: a dataset stands there more than once; add its weights up")
    return blend


def parse_split(split: str) -> list[float]:
    """Read ``--split``, such as ``98,2,0``, into the shares of train, valid and test, with sum 1.

    Raises:
        DataError: not one to three plain numbers, or all 0.
    """
    if not re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+){0,2}", split) or not any(map(float, split.split(","))):
        raise DataError(f"--split {split!r}: expected up to three shares of 0 or more, such as 98,2,0")
    shares = [float(share) for share in split.split(",")]
    shares += [0.0] * (3 - len(shares))
    return [share / sum(shares) for share in shares]


def open_problems(prefix: str) -> list[str]:
    """Why the dataset ``prefix`` cannot be opened; empty where it can."""
    missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not os.path.isfile(f"{prefix}{suffix}")]
    if missing:
        return [f"--data-path {prefix}: there is no {' and no '.join(missing)}{_hint(prefix)}"]
    try:
        if not len(read_index(prefix).lengths):
            return [f"--data-path {prefix}: the .bin has 0 bytes, so there is nothing to train on"]
    except (DataError, OSError) as error:
        return [f"--data-path {error}"]
    return []


def damage_problems(prefix: str) -> list[str]:
    """What in the .idx of the dataset ``prefix``, which can be opened, contradicts itself; reads all of it."""
    return [f"--data-path {prefix}: {problem}. {ANEW}" for problem in index_problems(read_index(prefix))]


def tokenizer_problems(prefix: str, tokenizer: Tokenizer, allow_mismatch: bool = False) -> list[str]:
    """Why the dataset ``prefix``, by its manifest, was not made with this tokenizer; nothing where it has none."""
    try:
        facts = manifest.read(prefix)
    except DataError as error:
        return [str(error)]
    if facts is None:
        return []
    found = count_tokens(prefix)
    if facts.tokens != found:
        return [
            f"--data-path {prefix}: its manifest {manifest.path_of(prefix)} speaks of {facts.tokens} tokens, the .idx "
            f"of {found}. The files do not belong together; preprocess anew"
        ]
    theirs: dict[str, Any] = facts.tokenizer
    if allow_mismatch or theirs["fingerprint"] == tokenizer.fingerprint:
        return []
    return [
        f"--data-path {prefix}: made with {theirs['kind']} of {theirs['vocab_size']} tokens, fingerprint "
        f"{theirs['fingerprint'][:12]}; this run has {tokenizer.kind} of {tokenizer.vocab_size} tokens, fingerprint "
        f"{tokenizer.fingerprint[:12]}. Give the tokenizer flags that the data was made with, or "
        "--allow-tokenizer-mismatch"
    ]


def count_tokens(prefix: str) -> int:
    """Tokens of the dataset ``prefix``."""
    return read_index(prefix).tokens


def split_ranges(prefix: str, shares: list[float]) -> list[tuple[int, int]]:
    """First document and the one after the last of ``prefix`` in train, valid and test, cut where megatron.core cuts.

    A document is here what the .idx calls a sequence.
    """
    count = float(len(read_index(prefix).lengths))
    bounds = [round(sum(shares[:number]) * count) for number in range(len(shares) + 1)]
    return list(itertools.pairwise(bounds))


def split_tokens(prefix: str, shares: list[float]) -> list[tuple[int, int]]:
    """Documents and tokens of ``prefix`` in train, valid and test."""
    index = read_index(prefix)
    return [(last - first, index.sum_lengths(first, last)) for first, last in split_ranges(prefix, shares)]


def cache_problems(folder: Path) -> list[str]:
    """Why no sample index can be kept in ``folder``; creates the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"cannot create the folder of the sample index, {folder}: {error}. Choose one with --data-cache-path"]
    if not os.access(folder, os.W_OK) and not any(folder.glob("*.npy")):
        return [f"no permission to write the sample index to {folder}. Choose a folder with --data-cache-path"]
    return []


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _hint(prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return f". Give the prefix without {suffix}"
    near = sorted(str(path)[: -len(".idx")] for path in Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))
    return f". Is it {near[0]}?" if near else ""
