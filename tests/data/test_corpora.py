"""Words that name a run's data: what they mean, and what is told."""

import pytest
from config.problems import problems

from megatron.config import DataConfig
from megatron.data.corpora import Blend, Source, find_corpora
from megatron.data.errors import DataError


def names(words: tuple[str, ...]) -> dict[str, list[str]]:
    """The validation sets that these words make: the prefixes of each by name."""
    found = find_corpora(DataConfig(train_data_path=("t",), valid_data_path=words)).valid
    return {name: source.blend.prefixes for name, source in found.items()}


def test_one_path_is_cut_by_split():
    found = find_corpora(DataConfig(data_path=("2", "a", "1", "b"), split="80,15,5"))
    blend = Blend(["a", "b"], [2.0, 1.0])
    assert found.train == Source("--data-path", blend, 0.0, 0.8)
    assert found.valid["valid"].first == found.train.last
    assert found.test["test"].first == found.valid["valid"].last
    assert found.test["test"].last == pytest.approx(1.0)
    assert (list(found.valid), list(found.test)) == (["valid"], ["test"])
    assert find_corpora(DataConfig(data_path=("a",), split="9,1")).test == {}
    assert find_corpora(DataConfig(data_path=("a", "b"))).train.blend == Blend(["a", "b"], None)


def test_three_paths_are_read_whole():
    found = find_corpora(DataConfig(train_data_path=("a",), valid_data_path=("b", "n=c"), test_data_path=("1", "d")))
    assert found.train == Source("--train-data-path", Blend(["a"], None), 0.0, 1.0)
    assert found.prefixes() == {
        "a": "--train-data-path", "b": "--valid-data-path", "c": "--valid-data-path", "d": "--test-data-path",
    }  # fmt: skip
    assert found.test == {"test": Source("--test-data-path", Blend(["d"], [1.0]))}
    assert find_corpora(DataConfig(train_data_path=("a",))).valid == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("data/a_text_document", "b_valid"), {"a": ["data/a_text_document"], "b_valid": ["b_valid"]}),
        (("books=data/b", "data/c"), {"books": ["data/b"], "c": ["data/c"]}),
        (("data/lang=en/c",), {"c": ["data/lang=en/c"]}),
        (("./lang=en",), {"lang=en": ["./lang=en"]}),
        (("x=data/lang=en/c",), {"x": ["data/lang=en/c"]}),
        (("0.7", "a", "0.3", "b"), {"valid": ["a", "b"]}),
    ],
)  # fmt: skip
def test_names_of_validation_sets(words, expected):
    assert names(words) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data_path": ("a",), "valid_data_path": ("b",)},
            "--data-path and --valid-data-path exclude each other: give --data-path, which --split divides into"
            " training, validation and test, or --train-data-path, --valid-data-path and --test-data-path",
        ),
        (
            {"test_data_path": ("b",)},
            "--test-data-path requires --train-data-path; add it",
        ),
        (
            {"train_data_path": ("a",), "split": "90,10,0"},
            "--split 90,10,0 divides --data-path and has no effect on --train-data-path; drop it, or give --data-path",
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("x/b_text_document", "y/b")},
            "--valid-data-path: two sets have the name 'b'; name them, NAME1=PREFIX1 NAME2=PREFIX2",
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("=b",)},
            "--valid-data-path =b: expected a name and a prefix around =; write NAME=PREFIX",
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("b", "0.5", "c")},
            "--valid-data-path b 0.5 c: weights and prefixes must alternate; write 0.7 PREFIX1 0.3 PREFIX2",
        ),
        (
            {"train_data_path": ("1", "a", "nan", "b")},
            "--train-data-path: the weight of b is nan, expected a number above 0",
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("b",), "eval_interval": 0},
            "--valid-data-path is never read with --eval-interval 0; use 1 or more, or drop --valid-data-path",
        ),
        ({"data_path": ("a",), "split": "0,50,50"}, "--split '0,50,50' leaves nothing for training; use 98,2,0"),
    ],
)
def test_messages(values, message):
    assert problems(values) == (message,)


@pytest.mark.parametrize("data", [{"train_data_path": ("a",)}, {"split": "1"}, {"split": "98,0,2"}])
def test_training_alone_has_no_validation(data):
    assert problems(data | {"eval_interval": 50}) == ()
    assert not find_corpora(DataConfig(**{"data_path": ("a",)} | data if "split" in data else data)).valid


def test_without_words_it_is_missing():
    with pytest.raises(DataError, match="--data-path is missing"):
        find_corpora(DataConfig())
