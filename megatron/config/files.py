"""The files that a configuration names: whether they are there, and what to do if not."""

import glob
from collections.abc import Iterator
from pathlib import Path

from megatron.config.corpora import find_corpora
from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.options import OPTIONS
from megatron.config.run import RunConfig


def file_problems(config: RunConfig) -> Iterator[str]:
    """One line for each file that a run needs and that is not named or not there."""
    yield from _data_problems(config.data)
    yield from _tokenizer_problems(config)
    deepspeed = config.parallel.deepspeed_config
    if deepspeed is not None and not Path(deepspeed).is_file():
        yield f"--deepspeed_config {deepspeed}: no such file; give a DeepSpeed JSON file or drop the flag"


def _data_problems(data: DataConfig) -> Iterator[str]:
    try:
        prefixes = find_corpora(data).prefixes()
    except ConfigError as error:
        yield from error.problems
        return
    for prefix, flag in prefixes.items():
        if missing := missing_files(prefix):
            yield f"{flag} {prefix}: no file {' or '.join(missing)}; {_prefix_fix(prefix)}"


def missing_files(prefix: str) -> list[str]:
    """Those of PREFIX.idx and PREFIX.bin that do not exist."""
    return [prefix + suffix for suffix in (".idx", ".bin") if not Path(prefix + suffix).is_file()]


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
    files = {"GPT2BPETokenizer": ("vocab_file", "merge_file"), "ByteTokenizer": ()}.get(kind, ("tokenizer_model",))
    for name in files:
        flag, file = OPTIONS[name].flag, getattr(config.data, name)
        if file is None:
            yield f"--tokenizer-type {kind} needs {flag}, which is missing; add {flag} FILE or take another tokenizer"
        elif not Path(file).is_file():
            yield f"{flag} {file}: no such file; give the file that the dataset was tokenized with"
