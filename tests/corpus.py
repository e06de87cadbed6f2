"""Text, files and tokenizers for the tests of megatron/data and its tools."""

import functools
import gzip
import itertools
import json
import os
import random
from pathlib import Path

import pytest
import zstandard

from megatron.config import DataConfig
from megatron.data.corpora import parse_split
from megatron.data.dataset_checks import document_range
from megatron.data.index_file import read_index

ROOT = Path(__file__).parents[1]

NASTY = [
    "",
    " ",
    "\n",
    "  two  spaces\n\n\tand a tab \r\n, trailing  ",
    "I'm he's WE'LL don't 'quoted' it''s",
    "日本語のテキスト。 한국어 العربية עברית ไทย",
    "é e\u0301 ﬁ ſ ２ ½ İ ı ß \u00ad\u200b\u200d\ufeff\u2028\u2029\u00a0\u3000",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \U0010ffff \x00\x01\x7f\x80\u0085",
    "3.14159 1,000,000 0x1F 12345678901234567890",
    "def f(x):\n        return x  # comment\n\n\n",
    "x" * 3000,
    "ab" * 700 + " " * 300,
    'a <b> </b> &amp; \\n "quotes" {}[]()!?…—',
]
MARKERS = ["<|endoftext|>", "before<|endoftext|>after", "</s>", "<unk> <s> <0x0A> <|end_of_text|><eos>"]


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of random characters from all over Unicode, surrogates left out."""
    draw = random.Random(seed)
    alphabets = ["abc xyz\n", " \t\n\r", "".join(map(chr, range(256))), "αβγδ язык 漢字かな🙂👍"]

    def character() -> str:
        if draw.random() < 0.1:
            return chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))
        return draw.choice(alphabets[draw.randrange(len(alphabets))])

    return ["".join(character() for _ in range(draw.randrange(200))) for _ in range(count)]


def english(documents: int, seed: int = 0, words: int = 80) -> list[str]:
    """Documents that look a little like English."""
    draw = random.Random(seed)
    vocabulary = [
        "".join(draw.choice("etaoinshrdlucm") for _ in range(draw.randrange(1, 9))) for _ in range(500)
    ]  # fmt: skip
    return [
        " ".join(draw.choice(vocabulary) for _ in range(draw.randrange(1, 2 * words))).capitalize() + ".\n"
        for _ in range(documents)
    ]


def split_sizes(prefix: str, shares: str) -> list[tuple[int, int]]:
    """Documents and tokens of a dataset in training, validation and test, where ``--split`` of training cuts."""
    index = read_index(prefix)
    bounds = itertools.pairwise([0.0, *itertools.accumulate(parse_split(shares))])
    ranges = [document_range(prefix, *pair) for pair in bounds]
    return [(last - first, index.sum_lengths(first, last)) for first, last in ranges]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """JSON lines, compressed as the name says."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        half = len(content) // 2  # two frames, as parallel compressors write them
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        content = compress(content[:half]) + compress(content[half:])
    path.write_bytes(content)
    return path


def write_parquet(path: Path, columns: dict[str, list], row_group_size: int | None = None) -> Path:
    """A Parquet file; skips the test where pyarrow is not installed."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def shared_data() -> Path | None:
    """Real data where there is some: $MEGATRON_MOE_TEST_DATA, or shared/data beside the repository."""
    given = os.environ.get("MEGATRON_MOE_TEST_DATA")
    for folder in (Path(given) if given else None, ROOT.parent / "shared" / "data"):
        if folder is not None and folder.is_dir():
            return folder
    return None


@functools.cache
def _gpt2_vocabulary() -> tuple[str, str]:
    """vocab.json and merges.txt of a byte-level BPE, trained on a little text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [*english(200), *NASTY], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model = json.loads(tokenizer.to_str())["model"]
    return json.dumps(model["vocab"]), "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"])


def gpt2(folder: Path) -> DataConfig:
    """A small tokenizer of GPT-2's kind."""
    vocab, merges = _gpt2_vocabulary()
    (folder / "vocab.json").write_text(vocab)
    (folder / "merges.txt").write_text(merges)
    return DataConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


def byte_level(folder: Path) -> DataConfig:
    """The tokenizer without files."""
    return DataConfig(tokenizer_type="ByteTokenizer")


def tiktoken(folder: Path) -> DataConfig:
    """The tokens of :func:`gpt2` as one of tiktoken's encodings; skips the test where tiktoken is not installed."""
    import base64

    pytest.importorskip("tiktoken")
    from megatron.data.tiktoken_backend import from_gpt2_files

    data = gpt2(folder)
    ranks = from_gpt2_files(data.vocab_file, data.merge_file)._mergeable_ranks
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path = folder / "r50k_base.tiktoken"
    path.write_text("".join(lines))
    return DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(path))


@functools.cache
def _sentencepiece_model(model_type: str) -> bytes:
    import tempfile

    from megatron.data.sentencepiece_training import train

    with tempfile.TemporaryDirectory() as folder:
        texts = write_jsonl(Path(folder) / "text.jsonl", english(300))
        path = train([str(texts)], f"{folder}/model", 400, model_type=model_type, threads=1)
        return Path(path).read_bytes()


def sentencepiece(folder: Path, model_type: str = "unigram") -> DataConfig:
    """A small SentencePiece model of our own making."""
    (folder / "spm.model").write_bytes(_sentencepiece_model(model_type))
    return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "spm.model"))


def hugging_face(folder: Path, eod: str = "</s>", **changes: object) -> DataConfig:
    """A byte-level tokenizer.json that asks for a leading token, truncation and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab, merges = _gpt2_vocabulary()
    ids = json.loads(vocab.replace("<|endoftext|>", "<unused>"))
    backend = Tokenizer(models.BPE(ids, [tuple(line.split(" ")) for line in merges.splitlines()[1:]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", eod])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=10)
    backend.save(str(folder / "tokenizer.json"))
    return DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder / "tokenizer.json"))
