"""What building the sample index costs at launch, and what a launch costs once it is cached.

    python -m benchmarks.sample_index --documents 100M --folder /tmp/index --json sample_index.json

A dataset of so many documents is made up: lengths are drawn (lognormal), the .bin is a sparse file of zeros. A run's
training data are then built in --processes processes over gloo three times: with no cache, with the cache, and with one
bit of the cache changed. "built" counts the processes that computed an index; the others wait for it. Seconds are those
of the slowest process, imports left out; "hash" is what checking the cache takes rank 0.
"""

import argparse
import dataclasses
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.output import make_parser, markdown, number, write_json
from megatron.config import DataConfig, RunConfig
from megatron.config.option import parse_count
from megatron.data.files import crc32
from megatron.data.index_file import write_index

SEQ = 2048


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    cache: str
    seconds: float
    built: int
    hash_seconds: float
    index_bytes: int
    peak_bytes: int  # of memory, of the process that has most


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, device=False)
    parser.add_argument(
        "--documents", type=parse_count, default=100_000_000, metavar="N", help="Documents of the dataset (100M)."
    )
    parser.add_argument("--mean-tokens", type=int, default=600, metavar="N", help="Tokens of a document (600).")
    parser.add_argument("--epochs", type=float, default=1.0, metavar="N", help="How often the run reads it (1).")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="Ranks (2).")
    parser.add_argument(
        "--folder", metavar="DIR", help="Where to work; 12 bytes a document at least (a temporary one)."
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Make the dataset, measure, print."""
    args = parse_args(words)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prefix = Path(folder) / "made_up"
        tokens = make_dataset(prefix, args.documents, args.mean_tokens)
        samples = int(tokens * args.epochs) // SEQ - 1
        rows = [launch(args.processes, prefix, samples, "none"), launch(args.processes, prefix, samples, "whole")]
        damage(prefix.parent / "index-cache")
        rows.append(launch(args.processes, prefix, samples, "damaged"))
    print(f"{args.documents:,} documents, {tokens:,} tokens, {samples:,} samples, {args.processes} processes")
    print(table(rows), flush=True)
    setting = {"documents": args.documents, "tokens": tokens, "samples": samples, "processes": args.processes}
    write_json(args.json, "cpu", rows, **setting)


def make_dataset(prefix: Path, documents: int, mean: int) -> int:
    """Write the .idx and a sparse .bin; returns the number of tokens."""
    draw = np.random.default_rng(1234)
    lengths = np.empty(documents, dtype=np.int32)
    for first in range(0, documents, 1 << 20):
        part = lengths[first : first + (1 << 20)]
        part[:] = np.clip(draw.lognormal(np.log(mean) - 0.5, 1.0, len(part)), 1, 1_000_000)
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, np.dtype(np.uint16), lengths, np.arange(1, documents + 1))
    tokens = int(lengths.sum(dtype=np.int64))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    return tokens


def damage(folder: Path) -> None:
    """Change one bit in the middle of the sample index."""
    (path,) = folder.glob("*-sequences.npy")
    with open(path, "rb+") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def launch(processes: int, prefix: Path, samples: int, cache: str) -> Row:
    """Build the training data in so many fresh processes."""
    context = multiprocessing.get_context("spawn")
    meeting = tempfile.mkdtemp()
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, processes, meeting, str(prefix), samples, results))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    shutil.rmtree(meeting)
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a process has failed; its error stands above")
    seconds, built, peak = zip(*(results.get() for _ in ranks), strict=True)
    files = list((prefix.parent / "index-cache").glob("*.npy"))
    begin = time.perf_counter()
    for path in files:
        crc32(path)
    hashed = time.perf_counter() - begin
    return Row(cache, max(seconds), sum(built), hashed, sum(path.stat().st_size for path in files), max(peak))


def _rank(rank: int, processes: int, meeting: str, prefix: str, samples: int, results) -> None:
    import torch

    import megatron.data.index_cache  # noqa: F401 - its import is not what is measured
    from megatron.data.gpt_dataset import build_datasets
    from megatron.data.tokenizer import ByteTokenizer

    built: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: built.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron.data.index_cache")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    torch.distributed.init_process_group("gloo", f"file://{meeting}/store", rank=rank, world_size=processes)
    config = RunConfig(data=DataConfig(data_path=(prefix,), split="1"))
    config.model.seq_length = SEQ
    torch.distributed.barrier()
    begin = time.perf_counter()
    train = build_datasets(config, ByteTokenizer(), (samples, 0, 0)).train
    assert train is not None
    item = train[samples - 1]
    seconds = time.perf_counter() - begin
    assert item["tokens"].shape == (SEQ,)
    results.put((seconds, len(built), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    torch.distributed.destroy_process_group()


def table(rows: list[Row]) -> str:
    """Markdown."""
    cells = [
        [row.cache, number(row.seconds, 1), str(row.built), number(row.hash_seconds, 1)]
        + [number(size / 1e9, 2) for size in (row.index_bytes, row.peak_bytes)]
        for row in rows
    ]
    return markdown("<cache | seconds | built | hash s | index GB | peak GB of memory", cells)


if __name__ == "__main__":
    main()
