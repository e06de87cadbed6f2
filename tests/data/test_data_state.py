"""The record of the training data in a checkpoint, and the data with which a run can be resumed."""

import dataclasses
import json

import pytest

from megatron.data.blend_order import BlendOrder
from megatron.data.data_state import CORE, CorpusState, DataState
from megatron.data.errors import DataError


def corpus(name: str, weight: float = 1.0, documents: int = 10) -> CorpusState:
    return CorpusState(f"data/{name}", name * 8, 0, documents, weight)


def begin(*corpora: CorpusState) -> DataState:
    return DataState.begin(7, corpora)


def test_json_round_trip():
    state = begin(corpus("a"), corpus("b", 2.0))
    assert DataState.load(json.loads(json.dumps(state.state()))) == state


def test_the_order_on_the_command_line_does_not_count():
    assert begin(corpus("b"), corpus("a")) == begin(corpus("a"), corpus("b"))


def test_the_same_documents_twice_are_refused():
    twin = CorpusState("data/copy", "a" * 8, 0, 10, 3.0)
    with pytest.raises(DataError, match="data/a and data/copy hold the same documents"):
        begin(corpus("a"), twin)
    begin(corpus("a"), corpus("a", documents=9))  # another split


def test_paths_and_units_of_weights_may_change_on_a_resume():
    state = begin(corpus("a", 1.0), corpus("b", 3.0))
    moved = begin(*(CorpusState(f"/new/{name}", name * 8, 0, 10, w) for name, w in (("b", 0.75), ("a", 0.25))))
    resumed, notes = state.resumed(moved, 100, change=False)
    assert notes == []
    assert [(c.prefix, c.weight) for c in resumed.corpora] == [("/new/a", 1.0), ("/new/b", 3.0)]
    assert DataState.load(state.state()).resumed(state, 100, change=True) == (state, [])


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ((corpus("a"),), ("only in the checkpoint: data/b",)),
        ((corpus("a"), corpus("b"), corpus("c")), ("not in the checkpoint: data/c",)),
        ((corpus("a"), corpus("b", documents=9)), ("not in the checkpoint: data/b (documents 0 to 9", "0 to 10")),
        ((corpus("a"), corpus("b", 2.0)), ("data/b: share 0.666667, in the checkpoint 0.5",)),
    ],
)
def test_other_data_are_refused_with_the_options(now, words):
    with pytest.raises(DataError) as error:
        begin(corpus("a"), corpus("b")).resumed(begin(*now), 100, change=False)
    for word in (*words, "--change-blend", "--finetune"):
        assert word in str(error.value)


def test_a_changed_blend_continues_each_corpus():
    first = begin(corpus("a", 1.0), corpus("b", 3.0))
    second, notes = first.resumed(begin(corpus("b", 1.0), corpus("c", 1.0)), 101, change=True)
    read = dict(zip("ab", BlendOrder([1, 3]).counts(101), strict=True))
    assert [(c.prefix, c.start) for c in second.corpora] == [("data/b", read["b"]), ("data/c", 0)]
    assert (second.position, second.left) == (101, {first.corpora[0].key: read["a"]})
    assert any("only in the checkpoint: data/a" in note for note in notes)
    assert f"data/b goes on with its sequence {read['b']}" in notes
    assert "data/c begins with its first sequence" in notes
    # a comes back, 51 sequences on, where it was left
    third, _ = second.resumed(begin(corpus("a")), 152, change=True)
    assert [(c.prefix, c.start) for c in third.corpora] == [("data/a", read["a"])]
    b, c = BlendOrder([1, 1]).counts(51)
    assert third.left == {second.corpora[0].key: read["b"] + b, second.corpora[1].key: c}
    # the command line of the second blend is the same at each restart
    assert second.resumed(begin(corpus("b"), corpus("c")), 120, change=True) == (second, [])


def test_another_split_of_a_corpus_that_was_read_is_reported():
    first = begin(corpus("a"), corpus("b"))
    _, notes = first.resumed(begin(corpus("a", documents=9), corpus("b")), 10, change=True)
    assert any(note.startswith("data/a begins with its first sequence") and "--split" in note for note in notes)
    assert not any("data/b" in note and "--split" in note for note in notes)


def test_a_blend_cannot_change_in_the_order_of_megatron_core():
    state = dataclasses.replace(begin(corpus("a")), order=CORE)
    with pytest.raises(DataError, match="in the order of megatron"):
        state.resumed(begin(corpus("b")), 10, change=True)
    with pytest.raises(DataError, match="not in the checkpoint: data/b") as error:
        state.resumed(begin(corpus("b")), 10, change=False)
    assert "--change-blend" not in str(error.value)  # which would be refused as well
