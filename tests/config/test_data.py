"""Each rule of files: what it accepts, and a message with a fix."""

import corpus
import pytest

from megatron.config import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.run import OPTIONS, build
from megatron.config.validation import validate
from megatron.data import merging
from megatron.data.errors import DataError
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer


@pytest.fixture
def data(tmp_path):
    for name in ("web.bin", "web.idx", "code_text_document.bin", "code_text_document.idx", "half.idx"):
        (tmp_path / name).touch()
    for name in ("vocab.json", "merges.txt", "t.model", "ds.json"):
        (tmp_path / name).touch()
    return tmp_path


def file_problems(folder, **values) -> tuple[str, ...]:
    """Problems with data fields whose names of files are relative to ``folder``."""
    base = {"vocab_file": f"{folder}/vocab.json", "merge_file": f"{folder}/merges.txt", "data_path": (f"{folder}/web",)}
    base["train_tokens"] = 10**9
    try:
        validate(build(base | values), 1)
    except ConfigError as error:
        return tuple(problem.replace(f"{folder}/", "") for problem in error.problems)
    return ()


def test_valid_files(data):
    assert file_problems(data) == ()
    assert file_problems(data, data_path=("0.5", f"{data}/web", "2", f"{data}/code_text_document")) == ()
    assert file_problems(data, data_path=(f"{data}/web", f"{data}/code_text_document")) == ()
    assert file_problems(data, tokenizer_type="ByteTokenizer", vocab_file=None) == ()
    assert file_problems(data, tokenizer_type="HFTokenizer", tokenizer_model=f"{data}/t.model", vocab_file=None) == ()
    assert file_problems(data, deepspeed_config=f"{data}/ds.json") == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (),
            "--data-path is missing (launch scripts: DATA_PATH); make a dataset with tools/preprocess_data.py and give"
            " its PREFIX, or a blend 0.7 PREFIX1 0.3 PREFIX2",
        ),
        (("@none",), "--data-path none: no file none.idx or none.bin; write the dataset with tools/preprocess_data.py"),
        (("@half",), "--data-path half: no file half.bin; write the dataset with tools/preprocess_data.py"),
        (("@code",), "--data-path code: no file code.idx or code.bin; use code_text_document"),
        (
            ("@web.idx",),
            "--data-path web.idx: no file web.idx.idx or web.idx.bin; give the prefix without its ending: web",
        ),
        (("-1", "@web", "1", "@half"), "--data-path: the weight of web is -1, expected a number above 0"),
        (
            ("@web", "2", "@code"),
            "--data-path web 2 code: weights and prefixes must alternate; write 0.7 PREFIX1 0.3 PREFIX2",
        ),
    ],
)
def test_data_path_messages(words, message, data):
    data_path = tuple(f"{data}/{word[1:]}" if word.startswith("@") else word for word in words)
    assert file_problems(data, data_path=data_path) == (message,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"vocab_file": None},
            "--tokenizer-type GPT2BPETokenizer needs --vocab-file, which is missing; add --vocab-file FILE or take"
            " another tokenizer",
        ),
        (
            {"merge_file": "/no/m.txt"},
            "--merge-file /no/m.txt: no such file; give the tokenizer's own",
        ),
        (
            {"tokenizer_type": "SentencePieceTokenizer"},
            "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model, which is missing; add --tokenizer-model"
            " FILE or take another tokenizer",
        ),
        (
            {"deepspeed_config": "/no/ds.json"},
            "--deepspeed_config /no/ds.json: no such file; give a DeepSpeed JSON file or drop the flag",
        ),
    ],
)
def test_file_messages(values, message, data):
    assert file_problems(data, **values) == (message,)


def test_files_of_every_set_are_looked_for(data):
    paths = {"data_path": (), "train_data_path": (f"{data}/web",), "valid_data_path": (f"books={data}/none",)}
    assert file_problems(data, **paths, test_data_path=(f"{data}/half", f"{data}/web")) == (
        "--valid-data-path none: no file none.idx or none.bin; write the dataset with tools/preprocess_data.py",
        "--test-data-path half: no file half.bin; write the dataset with tools/preprocess_data.py",
    )


def said(call, *args) -> tuple[str, ...]:
    """The lines of the DataError of a call; none if it succeeds."""
    try:
        call(*args)
    except DataError as error:
        return tuple(str(error).splitlines())
    return ()


@pytest.mark.parametrize("kind", OPTIONS["tokenizer_type"].choices)
@pytest.mark.parametrize("eod_token", [None, "</s>"])
def test_a_tokenizer_is_refused_for_preprocessing_as_for_training(kind, eod_token, data):
    options = {"tokenizer_type": kind, "tokenizer_model": "missing", "vocab_file": None, "eod_token": eod_token}
    told = file_problems(data, **options)
    assert told == said(build_tokenizer, DataConfig(**options, merge_file=f"{data}/merges.txt"))
    assert (told == ()) == (kind == "ByteTokenizer" and eod_token is None)


@pytest.mark.parametrize("split", ["1", "100,0,0", "98,2", "98;2", "0,0,0", ""])
def test_a_split_is_refused_by_tools_as_by_training(split, data):
    corpus.write_jsonl(data / "in.jsonl", ["text"] * 100)
    preprocess([str(data / "in.jsonl")], str(data / "d"), DataConfig(tokenizer_type="ByteTokenizer"), workers=0)
    prefix = f"{data}/d_text_document"
    assert file_problems(data, data_path=(prefix,), split=split) == said(merging.split, prefix, f"{data}/cut", split)
