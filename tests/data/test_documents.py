"""Documents in one sequence: what Megatron-LM makes of them, and corpora whose documents have no end."""

import logging

import corpus
import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron.config import DataConfig, RunConfig
from megatron.data.documents import check_documents, cumulative_lengths, with_documents
from megatron.data.errors import DataError
from megatron.data.loader import batches
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer
from megatron.model.document_attention import document_mask

EOD, SEQ = 9, 12
SEQUENCES = {
    "none": [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4],
    "some": [1, 2, EOD, 4, 5, 6, 7, EOD, 1, 2, 3, 4],
    "first": [EOD, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4],
    "last": [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, EOD],
    "adjacent": [1, EOD, EOD, EOD, 5, 6, 7, 8, 1, 2, EOD, EOD],
    "all": [EOD] * SEQ,
}
ALL = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)


def batch(*sequences: list[int]) -> dict:
    tokens = torch.tensor(sequences)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(tokens.shape), "sample_index": 0}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_megatrons_own_function_agrees(positions, attention, loss):
    data = DataConfig(reset_position_ids=positions, reset_attention_mask=attention, eod_mask_loss=loss)
    made = with_documents(batch(*SEQUENCES.values()), data, EOD)
    assert ("position_ids" in made) == positions
    assert ("cu_seqlens" in made) == attention
    place = torch.arange(SEQ).expand(len(SEQUENCES), -1)
    position_ids = made.get("position_ids", place)
    masks = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(len(SEQUENCES), 1, -1, -1)
    if attention:
        masks = document_mask(made["cu_seqlens"], len(SEQUENCES), SEQ)
    assert position_ids.dtype == torch.int64
    for row, sequence in enumerate(SEQUENCES.values()):
        mask, loss_mask, expected = _get_ltor_masks_and_position_ids(
            torch.tensor(sequence), EOD, positions, attention, loss, create_attention_mask=True
        )
        assert torch.equal(masks[row], ~mask)  # Megatron's is True where nobody looks
        assert torch.equal(made["loss_mask"][row], loss_mask)
        assert torch.equal(position_ids[row], expected)


def test_a_loss_mask_is_not_overwritten():
    given = batch(SEQUENCES["some"])
    given["loss_mask"][0, 4] = 0.0
    made = with_documents(given, ALL, EOD)
    assert (made["loss_mask"][0] == 0).nonzero().flatten().tolist() == [2, 4, 7]
    assert given["loss_mask"].sum() == SEQ - 1


@pytest.mark.parametrize("documents", [1, 63, 64, 65, 200])
def test_cumulative_lengths_are_few_different_shapes(documents):
    tokens = torch.zeros(4, 200, dtype=torch.int64)
    ends = [3 * number for number in range(1, documents + 1)]
    tokens.view(-1)[ends] = EOD
    lengths = cumulative_lengths(tokens, EOD)
    assert lengths.dtype == torch.int32
    assert len(lengths) in (65, 129, 257)
    begins = sorted({0, 200, 400, 600} | {end + 1 for end in ends})  # sequences begin documents, too
    assert lengths.tolist() == begins + [800] * (len(lengths) - len(begins))


class Sequences:
    """A dataset of the sequences above."""

    def __len__(self) -> int:
        return len(SEQUENCES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = batch(list(SEQUENCES.values())[index])
        return {name: made[name][0] for name in ("tokens", "labels", "loss_mask")}


def run(data: DataConfig) -> RunConfig:
    made = RunConfig(data=data)
    made.data.num_workers, made.training.micro_batch_size = 0, 2
    return made


def test_the_loader_makes_them():
    for number, made in enumerate(batches(Sequences(), run(ALL), 0, 1, 0, EOD)):
        expected = with_documents(batch(*list(SEQUENCES.values())[2 * number : 2 * number + 2]), ALL, EOD)
        assert made.keys() == expected.keys()
        for name in ("loss_mask", "position_ids", "cu_seqlens"):
            assert torch.equal(made[name], expected[name])
    plain = next(iter(batches(Sequences(), run(DataConfig()), 0, 1, 0)))
    assert plain.keys() == {"tokens", "labels", "loss_mask", "sample_index"}


def test_without_an_end_of_document_token_there_is_an_error():
    with pytest.raises(ValueError, match="need the tokenizer's end-of-document token; got None"):
        next(iter(batches(Sequences(), run(ALL), 0, 1, 0)))


def test_a_corpus_whose_documents_do_not_end_is_refused(tmp_path, caplog):
    config = corpus.gpt2(tmp_path)
    tokenizer = build_tokenizer(config)
    prefixes = []
    for name, append in (("ended", True), ("open", False)):
        path = corpus.write_jsonl(tmp_path / f"{name}.jsonl", corpus.english(100, seed=1, words=20))
        preprocess([str(path)], str(tmp_path / name), config, append_eod=append, workers=0)
        prefixes.append(str(tmp_path / f"{name}_text_document"))
    for option in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        check_documents(DataConfig(data_path=(prefixes[0],), **{option: True}), tokenizer)
        with pytest.raises(DataError, match=r"open_text_document: none of 64 documents .* --append-eod") as error:
            check_documents(DataConfig(data_path=tuple(prefixes), **{option: True}), tokenizer)
        assert "ended_text_document" not in str(error.value)
    check_documents(DataConfig(data_path=tuple(prefixes)), tokenizer)
    assert not caplog.records


def test_a_corpus_of_which_some_documents_do_not_end_is_a_warning(tmp_path, caplog):
    tokenizer = build_tokenizer(corpus.byte_level(tmp_path))
    prefix = str(tmp_path / "some")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in ([1, 2, tokenizer.eod], [3, 4], [], [5, tokenizer.eod]):
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.add_document(torch.tensor([6, 7, tokenizer.eod]), [2, 1])  # in two pieces, as sentences
    builder.finalize(f"{prefix}.idx")
    with caplog.at_level(logging.WARNING):
        check_documents(DataConfig(data_path=(prefix,), reset_position_ids=True), tokenizer)
    (record,) = caplog.records
    assert "1 of 4 documents looked at do not end with the end-of-document token 256" in record.getMessage()
