"""Datasets on several processes: rank 0 builds the index, all read the same, and all refuse together."""

import dataclasses
from pathlib import Path

import corpus
import pytest
import torch
from distributed.spawn import run_distributed

from megatron.config import DataConfig, RunConfig
from megatron.data.errors import DataError
from megatron.data.preprocess import preprocess

SEQ, SAMPLES = 16, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = corpus.gpt2(folder)
    for name in "ab":
        path = corpus.write_jsonl(folder / f"{name}.jsonl", corpus.english(50, seed=ord(name), words=20))
        preprocess([str(path)], str(folder / name), tokenizer, append_eod=True, workers=0)
    paths = tuple(word for name in "ab" for word in ("1", str(folder / f"{name}_text_document")))
    return dataclasses.replace(tokenizer, data_path=paths, num_workers=0, split="90,10,0")


def make_config(data: DataConfig, cache: Path) -> RunConfig:
    run = RunConfig(data=dataclasses.replace(data, data_cache_path=str(cache)))
    run.model.seq_length, run.training.micro_batch_size = SEQ, 2
    return run


def read(config: RunConfig) -> tuple[torch.Tensor, list[int]]:
    """This rank's tokens of the training data, and their sample numbers."""
    import torch.distributed as dist

    from megatron.data.gpt_dataset import batches, build_datasets
    from megatron.data.tokenizer import build_tokenizer

    built = build_datasets(config, build_tokenizer(config.data), (SAMPLES, 8, 0))
    assert (len(built.train), len(built.valid["valid"])) == (SAMPLES, 8)
    found = list(batches(built.train, config, dist.get_rank(), dist.get_world_size(), 0))
    return torch.cat([batch["tokens"] for batch in found]), [b["sample_index"] for b in found]


@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_share_one_index_and_together_read_what_one_process_reads(parts, data, tmp_path):
    from megatron.data.gpt_dataset import build_datasets
    from megatron.data.tokenizer import build_tokenizer

    if parts == 1:
        data = dataclasses.replace(data, data_path=data.data_path[1:2])
    alone = build_datasets(make_config(data, tmp_path / "alone"), build_tokenizer(data), (SAMPLES, 8, 0)).train
    expected = torch.stack([alone[index]["tokens"] for index in range(SAMPLES)])
    found = torch.zeros_like(expected)
    for tokens, numbers in run_distributed(read, 2, make_config(data, tmp_path / "two")):
        for place, number in enumerate(numbers):
            found[number : number + 2] = tokens[2 * place : 2 * place + 2]
    assert torch.equal(found, expected)


def refuse(config: RunConfig) -> str:
    from megatron.data.gpt_dataset import build_datasets
    from megatron.data.tokenizer import build_tokenizer

    try:
        build_datasets(config, build_tokenizer(config.data), (SAMPLES, 8, 0))
    except DataError as error:
        return str(error)
    return "not refused"


def test_what_rank_0_finds_all_ranks_raise(data, tmp_path):
    config = make_config(data, tmp_path)
    config.data.split = "99.9,0.1,0"  # only rank 0 looks into the splits
    first, second = run_distributed(refuse, 2, config)
    assert first == second
    assert first.count("the valid split gets no document") == 2
