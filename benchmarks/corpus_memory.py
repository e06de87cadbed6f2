"""Peak memory of the corpus tools over inputs of several sizes: whether it grows, and by how much a document.

    python -m benchmarks.corpus_memory --text corpus.jsonl.zst --megabytes 50 200 800 --vocab-file gpt2-vocab.json \\
        --merge-file gpt2-merges.txt --json corpus_memory.json

The inputs are JSON lines of so many million bytes: the documents of --text, and then the same again and again with
their words shuffled, so that none is there twice. The tools are started as a user starts them; their processes are
looked at every 20 ms, and peaks are the kernel's (VmHWM). "main" is the tool, "worker" the largest of its workers,
"all" the sum over all. Pages of mapped files count in these but can be dropped by the kernel at any time; "private" is
the main process without them. "one document" is a single line of that size. Needs Linux.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.output import make_parser, markdown, number, write_json
from megatron.data.inputs import spans_of
from megatron.data.reading import read_batches

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("tokenize", "tokenize parquet", "merge", "clean exact", "clean near", "tokenize one document")
PERIOD = 0.02
KIB = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; memory in bytes."""

    tool: str
    input_bytes: int
    documents: int
    seconds: float
    main: int
    private: int
    worker: int
    all: int


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--text", required=True, metavar="FILE", help='JSON lines with a field "text".')
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[50, 200, 800], metavar="N", help="Sizes of inputs."
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="What is measured (default: all).")
    parser.add_argument("--vocab-file", type=Path, required=True, metavar="FILE", help="GPT-2's vocab.json.")
    parser.add_argument("--merge-file", type=Path, required=True, metavar="FILE", help="GPT-2's merges.txt.")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="Of each tool (default: 2).")
    parser.add_argument(
        "--folder", metavar="DIR", help="Where to work; four times the largest input (a temporary one)."
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(words)
    rows = []
    for megabytes in args.megabytes:
        for tool in args.tools:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                rows.append(measure(args, tool, megabytes * 1_000_000, Path(folder)))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: TOOLS.index(row.tool))
    print(table(rows))
    write_json(args.json, "cpu", rows, workers=args.workers)


def measure(args: argparse.Namespace, tool: str, size: int, folder: Path) -> Row:
    """Make the input, run the tool, watch it."""
    tokenizer = ["--vocab-file", str(args.vocab_file), "--merge-file", str(args.merge_file), "--append-eod"]
    workers = ["--workers", str(args.workers)]
    text = folder / "text.jsonl"
    documents = _write_text(args.text, size, text, one=tool == "tokenize one document")
    tokenize = ["preprocess_data.py", "--input", str(text), *workers, *tokenizer, "--output-prefix"]
    clean = ["clean_corpus.py", "--input", str(text), *workers, "--output-prefix", str(folder / "clean")]
    if tool == "tokenize parquet":
        text = _as_parquet(text)
        tokenize[2] = str(text)
    if tool == "merge":
        shards = ["--num-shards", "2", "--shard-index"]
        for shard in ("0", "1"):
            watched([*tokenize, str(folder / "out"), *shards, shard])
    words = {
        "clean exact": [*clean, "--exact-duplicates"],
        "clean near": [*clean, "--near-duplicates", "0.8"],
        "merge": ["merge_datasets.py", "--input", str(folder / "out-*"), "--output-prefix", str(folder / "merged")],
    }.get(tool, [*tokenize, str(folder / "out")])
    return Row(tool, text.stat().st_size, documents, *watched(words))


def watched(words: list[str]) -> tuple[float, int, int, int, int]:
    """Run a tool. Seconds; peak bytes of its process, the private ones among them, of a worker, and of all together."""
    begin = time.perf_counter()
    peaks: dict[int, int] = {}
    private = 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]], stdout=said, stderr=said
        )
        while process.poll() is None:
            for pid in _tree(process.pid):
                with contextlib.suppress(OSError):
                    found = _status(pid)
                    peaks[pid] = max(peaks.get(pid, 0), found.get("VmHWM", 0))
                    private = max(private, found.get("RssAnon", 0) if pid == process.pid else 0)
            time.sleep(PERIOD)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)}: {said.read().decode()[-2000:]}")
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return seconds, peaks[process.pid], private, max(workers, default=0), sum(peaks.values())


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _status(pid: int) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * KIB for words in lines if words[-1] == "kB"}


def _write_text(source: str, size: int, path: Path, one: bool) -> int:
    """JSON lines of at least ``size`` bytes, or a single one; returns how many lines."""
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        if one:
            file.write('{"text": "')
        for text in _texts(source):
            written += file.write(json.dumps(text)[1:-1] if one else json.dumps({"text": text}) + "\n")
            count += 1
            if written >= size:
                break
        if one:
            file.write('"}\n')
    return 1 if one else count


def _texts(source: str) -> Iterator[str]:
    draw = random.Random(0)
    for again in range(1_000_000):
        for batch in read_batches(spans_of([source])):
            for line in batch.records:
                text = json.loads(line)["text"]
                words = text.split()
                draw.shuffle(words)
                yield " ".join(words) if again else text


def _as_parquet(text: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = text.with_suffix(".parquet")
    with text.open(encoding="utf-8") as file, parquet.ParquetWriter(path, pyarrow.schema([("text", "string")])) as out:
        while lines := file.readlines(32_000_000):
            out.write_table(pyarrow.table({"text": [json.loads(line)["text"] for line in lines]}))
    return path


def table(rows: list[Row]) -> str:
    """Markdown; memory in MB."""

    def cells(row: Row) -> list[str]:
        memory = (row.main, row.private, row.worker, row.all)
        return [
            *(row.tool, number(row.input_bytes / 1e6, 0), f"{row.documents:,}", number(row.seconds, 1)),
            *(number(value / 1e6, 0) for value in memory),
        ]

    columns = "<tool | input MB | documents | seconds | main MB | private MB | worker MB | all MB"
    return markdown(columns, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
