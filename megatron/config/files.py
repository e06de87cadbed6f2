"""The files that a configuration names: whether they are there, and what to do if not."""

import glob
import math
from collections.abc import Iterator
from pathlib import Path

from megatron.config.options import OPTIONS
from megatron.config.run import RunConfig


def file_problems(config: RunConfig) -> Iterator[str]:
    """One line for each file that a run needs and that is not named or not there."""
    yield from _data_problems(config.data.data_path)
    yield from _tokenizer_problems(config)
    deepspeed = config.parallel.deepspeed_config
    if deepspeed is not None and not Path(deepspeed).is_file():
        yield f"--deepspeed_config {deepspeed}: no such file; give a DeepSpeed JSON file or drop the flag"


def _data_problems(data_path: tuple[str, ...]) -> Iterator[str]:
    if not data_path:
        yield "--data-path is missing; give a PREFIX of tools/preprocess_data.py, or a blend 0.7 PREFIX1 0.3 PREFIX2"
        return
    if len(data_path) == 2:
        yield (
            f"--data-path {' '.join(data_path)} has 2 words; give one prefix alone, or a blend of at least two prefixes"
            " with a weight before each: 0.7 PREFIX1 0.3 PREFIX2"
        )
        return
    if len(data_path) > 1 and len(data_path) % 2:
        yield (
            f"--data-path has {len(data_path)} words; a blend has a weight before each prefix, an even number of words:"
            f" 0.7 {data_path[0]} 0.3 {data_path[1]}"
        )
        return
    for weight in data_path[:-1:2]:
        try:
            right = 0 < float(weight) < math.inf
        except ValueError:
            right = False
        if not right:
            yield f"--data-path: the weight {weight!r} must be a positive number; write 0.7 PREFIX1 0.3 PREFIX2"
    for prefix in data_path[len(data_path) > 1 :: 2]:
        missing = [prefix + suffix for suffix in (".idx", ".bin") if not Path(prefix + suffix).is_file()]
        if missing:
            yield f"--data-path {prefix}: no file {' or '.join(missing)}; {_prefix_fix(prefix)}"


def _prefix_fix(prefix: str) -> str:
    """What may have been meant by a prefix without its files."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.is_file():
        return f"give the prefix without its ending: {path.with_suffix('')}"
    beside = path.parent.glob(f"{glob.escape(path.name)}*.idx") if path.parent.is_dir() else ()
    similar = sorted(str(found.with_suffix("")) for found in beside if found.with_suffix(".bin").is_file())
    return f"use {' or '.join(similar[:3])}" if similar else "write the dataset with tools/preprocess_data.py"


def _tokenizer_problems(config: RunConfig) -> Iterator[str]:
    kind = config.data.tokenizer_type
    for name in ("vocab_file", "merge_file") if kind == "GPT2BPETokenizer" else ("tokenizer_model",):
        flag, file = OPTIONS[name].flag, getattr(config.data, name)
        if file is None:
            yield f"--tokenizer-type {kind} needs {flag}, which is missing; add {flag} FILE or take another tokenizer"
        elif not Path(file).is_file():
            yield f"{flag} {file}: no such file; give the file that the dataset was tokenized with"
