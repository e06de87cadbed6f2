"""What can be wrong with datasets is found here, before the first step and with all problems in one message."""

import os
from pathlib import Path
from typing import Any

from megatron.config import DataConfig
from megatron.data import manifest
from megatron.data.corpora import Blend, find_corpora, missing_problems, parse_split
from megatron.data.errors import DataError
from megatron.data.index_file import ANEW, index_problems, read_index
from megatron.data.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test")


def open_problems(prefix: str, flag: str = "--data-path") -> list[str]:
    """Why the dataset ``prefix`` cannot be opened; empty where it can."""
    if missing := missing_problems(prefix, flag):
        return missing
    try:
        if not len(read_index(prefix).lengths):
            return [f"{flag} {prefix}: the .bin has 0 bytes, so there is nothing to train on"]
    except (DataError, OSError) as error:
        return [f"{flag} {error}"]
    return []


def damage_problems(prefix: str, flag: str = "--data-path") -> list[str]:
    """What in the .idx of the dataset ``prefix``, which can be opened, contradicts itself; reads all of it."""
    return [f"{flag} {prefix}: {problem}. {ANEW}" for problem in index_problems(read_index(prefix))]


def tokenizer_problems(
    prefix: str, tokenizer: Tokenizer, allow_mismatch: bool = False, flag: str = "--data-path"
) -> list[str]:
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
            f"{flag} {prefix}: its manifest {manifest.path_of(prefix)} speaks of {facts.tokens} tokens, the .idx "
            f"of {found}. The files do not belong together; preprocess anew"
        ]
    theirs: dict[str, Any] = facts.tokenizer
    if allow_mismatch or theirs["fingerprint"] == tokenizer.fingerprint:
        return []
    return [
        f"{flag} {prefix}: made with {theirs['kind']} of {theirs['vocab_size']} tokens, fingerprint "
        f"{theirs['fingerprint'][:12]}; this run has {tokenizer.kind} of {tokenizer.vocab_size} tokens, fingerprint "
        f"{tokenizer.fingerprint[:12]}. Give the tokenizer flags that the data was made with, or "
        "--allow-tokenizer-mismatch"
    ]


def count_tokens(prefix: str) -> int:
    """Tokens of the dataset ``prefix``."""
    return read_index(prefix).tokens


def weights_of(blend: Blend) -> list[float]:
    """Those of the corpora of ``blend``, which can be opened: as given, or their tokens."""
    return blend.weights or [float(count_tokens(prefix)) for prefix in blend.prefixes]


def document_range(prefix: str, first: float, last: float) -> tuple[int, int]:
    """The first document of ``prefix`` and the one after the last, from one fraction to another of all of them.

    A document is here what the .idx calls a sequence. The cut is megatron.core's.
    """
    count = float(len(read_index(prefix).lengths))
    return round(first * count), round(last * count)


def flag_differences(then: DataConfig, now: DataConfig) -> list[str]:
    """What to tell of a run that goes on with the options ``now``, where of its data nothing but ``then`` is known.

    Files may have moved; another ``--split`` or other weights are other data.

    Raises:
        DataError: they are other data.
    """
    if not now.data_path:
        return []  # nothing else goes on in megatron.core's order, which is reported elsewhere
    before, after = find_corpora(then).train.blend, find_corpora(now).train.blend
    found = []
    if parse_split(then.split) != parse_split(now.split):
        found.append(f"--split {now.split}, in the checkpoint {then.split}")
    if _shares(before) != _shares(after):
        found.append(f"--data-path {' '.join(now.data_path)}, in the checkpoint {' '.join(then.data_path)}")
    if found:
        raise DataError(
            "the training data are not those of the checkpoint:\n  " + "\n  ".join(found) + "\n"
            "Give the data of the checkpoint; or --finetune, to begin a new run with the checkpoint's weights"
        )
    if before.prefixes == after.prefixes:
        return []
    return [
        f"--data-path has {' '.join(after.prefixes)}, in the checkpoint {' '.join(before.prefixes)}; these must be the "
        "same files in the same order, moved or renamed"
    ]


def _shares(blend: Blend) -> list[float] | int:
    """Of the corpora of ``blend``, or how many there are of one without weights."""
    if blend.weights is None or len(blend.weights) == 1:
        return len(blend.prefixes)
    return [round(weight / sum(blend.weights), 9) for weight in blend.weights]


def cache_problems(folder: Path) -> list[str]:
    """Why no sample index can be kept in ``folder``; creates the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"cannot create the folder of the sample index, {folder}: {error}. Choose one with --data-cache-path"]
    if not os.access(folder, os.W_OK) and not any(folder.glob("*.npy")):
        return [f"no permission to write the sample index to {folder}. Choose a folder with --data-cache-path"]
    return []
