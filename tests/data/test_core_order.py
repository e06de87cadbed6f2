"""The order of earlier versions is that of megatron.core, sample by sample."""

import dataclasses
from pathlib import Path

import corpus
import pytest
import torch

from megatron.config import RunConfig
from megatron.data.data_state import CORE
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import ResumedData, build_datasets
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer

SEQ, SAMPLES = 16, (300, 9, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = corpus.gpt2(folder)
    paths = []
    for name, documents in (("a", 60), ("b", 30)):
        path = corpus.write_jsonl(folder / f"{name}.jsonl", corpus.english(documents, seed=documents, words=20))
        preprocess([str(path)], str(folder / name), tokenizer, append_eod=True, workers=0)
        paths.append(str(folder / f"{name}_text_document"))
    return dataclasses.replace(tokenizer, data_path=("3", paths[0], "1", paths[1]), split="80,15,5", num_workers=0)


def make_config(data, cache: Path, blended: bool) -> RunConfig:
    run = RunConfig(data=dataclasses.replace(data, data_cache_path=str(cache)))
    run.model.seq_length = SEQ
    if not blended:
        run.data.data_path = data.data_path[1:2]
    return run


def of_megatron_core(config: RunConfig, folder: Path) -> list[torch.Tensor]:
    """Training and validation tokens as megatron.core alone gives them."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, unique_identifiers = 1000, 0, {"class": "Tokenizer"}

    words = config.data.data_path
    blend = (list(words), None) if len(words) == 1 else (list(words[1::2]), [float(word) for word in words[::2]])
    core = GPTDatasetConfig(
        random_seed=config.training.seed, sequence_length=SEQ, blend=blend, split=config.data.split,
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, mid_level_dataset_surplus=0.05,
    )  # fmt: skip
    core.split_matrix[2] = None
    built = BlendedMegatronDatasetBuilder(GPTDataset, list(SAMPLES), lambda: True, core).build()
    return [torch.stack([built[split][i]["tokens"] for i in range(SAMPLES[split])]) for split in (0, 1)]


@pytest.mark.parametrize("blended", [False, True])
def test_a_run_of_before_goes_on_in_the_order_of_megatron_core(blended, data, tmp_path):
    config = make_config(data, tmp_path / "cache", blended)
    old = ResumedData(None, 40)
    found = build_datasets(config, build_tokenizer(config.data), SAMPLES, old)
    assert found.state.order == CORE
    assert "--train-tokens" in found.notes[-1]
    train, valid = of_megatron_core(config, tmp_path)
    for index in range(SAMPLES[0]):
        assert torch.equal(found.train[index]["tokens"], train[index])
    for index in range(SAMPLES[1]):
        assert torch.equal(found.valid["valid"][index]["tokens"], valid[index])
    # what it saves says so, and knows its data from then on
    again = build_datasets(config, build_tokenizer(config.data), SAMPLES, ResumedData(found.state, 60))
    assert (again.state, again.notes) == (found.state, found.notes[-1:])  # each time, what must not change
    config.data.data_path = data.data_path[3:4]
    with pytest.raises(DataError, match="are not those of the checkpoint"):
        build_datasets(config, build_tokenizer(config.data), SAMPLES, ResumedData(found.state, 60))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "50,50,0"}, "--split 50,50,0, in the checkpoint 80,15,5"),
        ({"data_path": ("1", "A", "1", "B")}, "--data-path 1 A 1 B, in the checkpoint 3 A 1 B"),
        ({"data_path": ("B",)}, "--data-path B, in the checkpoint 3 A 1 B"),
        ({"change_blend": True}, "--change-blend: the run goes on in the order of megatron.core"),
    ],
)
def test_a_run_of_before_does_not_go_on_with_other_data(changes, words, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in zip(data.data_path[1::2], "AB", strict=True):
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{name}{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
    begun = dataclasses.replace(data, data_path=("3", "A", "1", "B"))
    config = make_config(dataclasses.replace(begun, **changes), tmp_path / "cache", blended=True)
    with pytest.raises(DataError, match=words):
        build_datasets(config, build_tokenizer(config.data), SAMPLES, ResumedData(None, 40, begun))


def test_moved_files_of_a_run_of_before_are_told(data, tmp_path):
    config = make_config(data, tmp_path / "cache", blended=True)
    old = ResumedData(None, 40, dataclasses.replace(config.data))
    weights, prefixes = config.data.data_path[::2], config.data.data_path[1::2]
    tokenizer = build_tokenizer(config.data)
    expected = build_datasets(config, tokenizer, SAMPLES, old)
    assert not any("in the checkpoint" in note for note in expected.notes)
    moved = [str(tmp_path / f"{number}") for number in range(len(prefixes))]
    for source, to in zip(prefixes, moved, strict=True):
        for suffix in (".bin", ".idx", ".json"):
            Path(f"{to}{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
    scaled = [str(2 * float(weight)) for weight in weights]  # only ratios count
    config.data.data_path = tuple(word for pair in zip(scaled, moved, strict=True) for word in pair)
    found = build_datasets(config, tokenizer, SAMPLES, old)
    assert any(" ".join(moved) in note and " ".join(prefixes) in note for note in found.notes)
    assert all(torch.equal(found.train[i]["tokens"], expected.train[i]["tokens"]) for i in range(SAMPLES[0]))


def test_another_corpus_under_the_same_name_has_an_index_of_its_own(data, tmp_path):
    config = make_config(data, tmp_path / "cache", blended=False)
    tokenizer = build_tokenizer(config.data)
    for source in data.data_path[1::2]:
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / f"corpus{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
        config.data.data_path = (str(tmp_path / "corpus"),)
        found = build_datasets(config, tokenizer, (300, 0, 0), ResumedData(None, 40)).train
        config.data.data_path = (source,)
        expected = build_datasets(config, tokenizer, (300, 0, 0), ResumedData(None, 40)).train
        for index in range(300):
            assert torch.equal(found[index]["tokens"], expected[index]["tokens"])
