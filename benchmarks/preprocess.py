"""Tokens/s per core of tools/preprocess_data.py, against the bare tokenizer library and Megatron-LM's tool.

    python -m benchmarks.preprocess --text corpus.jsonl.zst --vocab-file gpt2-vocab.json \\
        --merge-file gpt2-merges.txt --documents 40000 --megatron-lm CHECKOUT --json preprocess.json

"tokenizers" (Hugging Face's) and "tiktoken" are the bare libraries in batches of documents that are in memory already,
with a thread for each core; nothing is read, converted or written while the clock runs. The tools read the same JSON
lines from a plain file and write .bin/.idx, with a worker for each core; every process that they start stays on these
cores. "start-up" is what a tool takes for one document, and is not counted in rates. All take turns, --repeats times,
and the best time of each counts. Tokens per CPU second depend little on what else the machine does: the cores' busy
time in all processes counts.

tiktoken and every .bin/.idx must hold the tokens of tokenizers, document by document, or the tool is not in the table.
Megatron-LM's tools/preprocess_data.py runs from a checkout (its own requirements must be installed) with the same
vocabulary through its HuggingFaceTokenizer; why it cannot run is printed in one line.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.output import make_parser, markdown, number, one_line, write_json
from megatron.config import DataConfig
from megatron.data.inputs import spans_of
from megatron.data.reading import read_batches
from megatron.data.tiktoken_backend import from_gpt2_files

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
MEGATRON = "Megatron-LM"
BATCH = 100  # documents in a call of the library, which then is fastest
DTYPES = {4: np.int32, 8: np.uint16}  # codes of the .idx format


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. The last three are speeds as shares of others' on as many cores; None if not measured."""

    tool: str
    cores: int
    seconds: float  # of the whole command, start-up included
    startup_seconds: float
    cpu_seconds: float  # busy time of all cores, start-up not counted
    tokens_per_second: float  # start-up not counted
    tokens_per_second_per_core: float
    tokens_per_cpu_second: float
    of_tokenizers: float | None = None
    of_tiktoken: float | None = None
    of_megatron: float | None = None


class Times(NamedTuple):
    """Seconds of a run by the clock, and those in which cores were busy with it."""

    wall: float
    cpu: float


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="Timed runs; the best counts (default: 3).")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help='JSON lines with a field "text": plain, .gz, .zst.'
    )
    parser.add_argument("--vocab-file", type=Path, required=True, metavar="FILE", help="GPT-2's vocab.json.")
    parser.add_argument("--merge-file", type=Path, required=True, metavar="FILE", help="GPT-2's merges.txt.")
    parser.add_argument("--documents", type=int, metavar="N", help="Take the first N documents (default: all).")
    parser.add_argument(
        "--cores", type=int, nargs="+", metavar="N", default=sorted({1, len(available_cores())}),
        help="Numbers of cores to measure on (default: 1 and all).",
    )  # fmt: skip
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="A checkout of Megatron-LM.")
    args = parser.parse_args(words)
    if max(args.cores) > len(available_cores()) or min(args.cores) < 1:
        parser.error(f"--cores {args.cores}: this process may use {len(available_cores())} cores")
    return args


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        rows, tokens, documents = measure(args, Path(folder))
    print(f"{documents:,} documents, {tokens:,} tokens\n" + table(rows), flush=True)
    setting = {"text": Path(args.text).name, "documents": documents, "tokens": tokens, "repeats": args.repeats}
    write_json(args.json, "cpu", rows, **setting)


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[Row], int, int]:
    """Rows, and tokens and documents of the text."""
    text, one = folder / "text.jsonl", folder / "one.jsonl"
    documents = take(args.text, args.documents, text)
    take(args.text, 1, one)
    commands: dict[str, Callable[[Path, Path, int], list[str]]] = {"ours": functools.partial(our_command, args)}
    if args.megatron_lm:
        commands[MEGATRON] = functools.partial(megatron_command, args, tokenizer_folder(args, folder))
    libraries = ["tokenizers"] + (["tiktoken"] if importlib.util.find_spec("tiktoken") else [])
    rows: list[Row] = []
    tokens = 0
    for cores in args.cores:
        times: dict[str, list[Times]] = {name: [] for name in (*libraries, *commands)}
        startups: dict[str, list[Times]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name in libraries:
                times[name].append(run_library(args, name, text, folder / f"{name}.npz", cores))
            expected = np.load(folder / "tokenizers.npz")
            if "tiktoken" in libraries:
                found = np.load(folder / "tiktoken.npz")
                assert np.array_equal(found["tokens"], expected["tokens"]), (
                    "tiktoken makes other tokens than tokenizers"
                )
            for name in list(startups):
                try:
                    startups[name].append(run_tool(commands[name], one, folder / "one", cores)[0])
                    took, prefix = run_tool(commands[name], text, folder / "out", cores)
                    check(prefix, expected["tokens"], expected["lengths"])
                    times[name].append(took)
                except Exception as error:
                    if name == "ours":
                        raise
                    print(f"{name} on {cores} cores is left out: {one_line(error)}", flush=True)
                    del startups[name], times[name]
        tokens = int(expected["lengths"].sum())
        rows += compared([make_row(name, cores, tokens, times[name], startups.get(name, [])) for name in times])
    return rows, tokens, documents


def make_row(name: str, cores: int, tokens: int, times: list[Times], startups: list[Times]) -> Row:
    """The best of runs."""
    best = Times(*map(min, zip(*times, strict=True)))
    startup = Times(*map(min, zip(*startups, strict=True))) if startups else Times(0.0, 0.0)
    busy = best.cpu - startup.cpu
    if best.wall <= startup.wall or busy <= 0:
        raise ValueError(f"{best.wall:.1f} s, of which start-up {startup.wall:.1f} s: take a longer text")
    rate = tokens / (best.wall - startup.wall)
    return Row(name, cores, best.wall, startup.wall, busy, rate, rate / cores, tokens / busy)


def compared(rows: list[Row]) -> list[Row]:
    """The same with shares of each other's speed."""
    rates = {row.tool: row.tokens_per_second for row in rows}

    def share(row: Row, other: str) -> float | None:
        return row.tokens_per_second / rates[other] if other in rates else None

    names = {"of_tokenizers": "tokenizers", "of_tiktoken": "tiktoken", "of_megatron": MEGATRON}
    return [dataclasses.replace(row, **{field: share(row, name) for field, name in names.items()}) for row in rows]


def take(source: str, count: int | None, file: Path) -> int:
    """Write the first ``count`` documents that are not empty as plain JSON lines; returns how many there were."""
    lines = (line for batch in read_batches(spans_of([source])) for line in batch.records)
    texts = filter(None, (json.loads(line)["text"] for line in lines if line.strip()))
    number = 0
    with file.open("w", encoding="utf-8") as out:
        for number, text in enumerate(itertools.islice(texts, count), start=1):  # noqa: B007 - counted
            out.write(json.dumps({"text": text}) + "\n")
    if number == 0:
        raise ValueError(f"--text {source}: expected JSON lines with a field text, found no document")
    return number


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this process, and those that it starts meanwhile, on so many cores, where the system can."""
    before = available_cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, before[:count])
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)


def run_library(args: argparse.Namespace, name: str, text: Path, out: Path, cores: int) -> Times:
    """Times of a bare library, in a process of its own; tokens and lengths of documents go to ``out``."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, name, str(args.vocab_file), str(args.merge_file), text, out, cores)
    with on_cores(cores):
        process = context.Process(target=_library, args=arguments)
        process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError("the process of the library has failed; its error stands above") from None
    finally:
        process.join()


def _library(pipe, name: str, vocab_file: str, merge_file: str, text: Path, out: Path, cores: int) -> None:
    os.environ |= {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    encode, end = {"tokenizers": _tokenizers, "tiktoken": _tiktoken}[name](vocab_file, merge_file, cores)
    documents = [json.loads(line)["text"] for line in text.open(encoding="utf-8")]
    wall, cpu, tokens, lengths = 0.0, 0.0, [], []
    for first in range(0, len(documents), BATCH):
        batch = documents[first : first + BATCH]
        begin, busy = time.perf_counter(), time.process_time()
        encodings = encode(batch)
        wall, cpu = wall + time.perf_counter() - begin, cpu + time.process_time() - busy
        ids = [(found if isinstance(found, list) else found.ids) + end for found in encodings]
        lengths += map(len, ids)
        tokens.append(np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32))
    np.savez(out, tokens=np.concatenate(tokens), lengths=np.array(lengths, dtype=np.int32))
    pipe.send(Times(wall, cpu))


def _tokenizers(vocab_file: str, merge_file: str, cores: int) -> tuple[Callable, list[int]]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    return encode, [tokenizer.token_to_id(END)]


def _tiktoken(vocab_file: str, merge_file: str, cores: int) -> tuple[Callable, list[int]]:
    encoding = from_gpt2_files(vocab_file, merge_file)
    return functools.partial(encoding.encode_ordinary_batch, num_threads=cores), [encoding.eot_token]


def our_command(args: argparse.Namespace, text: Path, out: Path, cores: int) -> list[str]:
    """The command line of this project's tool."""
    files = ["--vocab-file", str(args.vocab_file), "--merge-file", str(args.merge_file)]
    words = ["--input", str(text), "--output-prefix", str(out), "--append-eod", "--workers", str(cores), *files]
    return [str(ROOT / "tools" / "preprocess_data.py"), *words]


def megatron_command(args: argparse.Namespace, tokenizer: Path, text: Path, out: Path, cores: int) -> list[str]:
    """The command line of Megatron-LM's tool."""
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    words += ["--input", str(text), "--output-prefix", str(out), "--append-eod", "--workers", str(cores)]
    return [str(args.megatron_lm.resolve() / "tools" / "preprocess_data.py"), *words]


def tokenizer_folder(files: DataConfig | argparse.Namespace, folder: Path) -> Path:
    """The vocabulary as a folder that Hugging Face's AutoTokenizer loads."""
    made = folder / "tokenizer"
    made.mkdir()
    shutil.copy(files.vocab_file, made / "vocab.json")
    shutil.copy(files.merge_file, made / "merges.txt")
    config = {"tokenizer_class": "GPT2TokenizerFast", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def run_tool(command: Callable[[Path, Path, int], list[str]], text: Path, out: Path, cores: int) -> tuple[Times, Path]:
    """Times of a command, and the prefix of what it wrote.

    Raises:
        RuntimeError: it failed; says its last line.
    """
    prefix = out.with_name(out.name + "_text_document")
    for suffix in (".bin", ".idx", ".json"):
        prefix.with_name(prefix.name + suffix).unlink(missing_ok=True)
    words = command(text, out, cores)
    checkout = str(Path(words[0]).parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([checkout, *paths]), "HF_HUB_OFFLINE": "1"}
    with on_cores(cores):
        begin, busy = time.perf_counter(), children_busy()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=out.parent)
        took = Times(time.perf_counter() - begin, children_busy() - busy)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return took, prefix


def children_busy() -> float:
    """CPU seconds of all processes that were started from here and have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check(prefix: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Compare what a tool wrote with the library's tokens.

    Raises:
        AssertionError: other documents, or other tokens.
    """
    with prefix.with_name(prefix.name + ".idx").open("rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00", f"{file.name}: expected a Megatron .idx"
        file.read(8)
        dtype = DTYPES[file.read(1)[0]]
        sequences, _ = np.frombuffer(file.read(16), dtype=np.int64)
        found_lengths = np.frombuffer(file.read(4 * int(sequences)), dtype=np.int32)
    assert np.array_equal(found_lengths, lengths), "other documents than the library's, or of other lengths"
    found = np.fromfile(prefix.with_name(prefix.name + ".bin"), dtype=dtype)
    assert np.array_equal(found, tokens), "other tokens than the library's"


def table(rows: list[Row]) -> str:
    """Markdown."""

    def cells(row: Row) -> list[str]:
        times = [number(value, 1) for value in (row.seconds, row.startup_seconds)]
        rates = (row.tokens_per_second, row.tokens_per_second_per_core, row.tokens_per_cpu_second)
        shares = (row.of_tokenizers, row.of_tiktoken, row.of_megatron)
        return [
            row.tool,
            str(row.cores),
            *times,
            *(number(value, 0) for value in rates),
            *(number(value, 2) for value in shares),
        ]

    columns = "<tool | cores | seconds | start-up s | tokens/s | tokens/s per core | tokens per CPU second"
    columns += " | of tokenizers | of tiktoken | of Megatron-LM"
    return markdown(columns, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
