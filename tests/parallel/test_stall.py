"""Whom the others wait for."""

import dataclasses
import json

import pytest

from megatron.parallel.stall import Place, behind, verdict


def place(number: int = 7, at: str = "engine/engine.py:1 f", **begun: int) -> Place:
    return Place(number, begun, at)


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({}, []),
        ({0: place(7, all=5), 1: place(7, all=5)}, []),
        ({0: place(8, all=5), 1: place(7, all=5), 2: place(8, all=9)}, [1]),
        ({0: place(all=5), 1: place(all=4), 2: place(all=5)}, [1]),
        # 0 and 2 have begun what 1 and 3 have not; 1 has begun with 3 what 3 has not: all wait for 3
        ({0: place(all=5, a=2), 1: place(all=4, b=3), 2: place(all=5, a=2), 3: place(all=4, b=2)}, [3]),
        ({0: place(x=1, y=2), 1: place(x=2, y=1)}, []),  # each waits for the other
    ],
)
def test_those_are_behind_who_keep_others_waiting_and_wait_for_nobody(places, found):
    assert behind(places) == found


def test_words():
    names = {rank: f"rank {rank} (host h, process {rank + 100})" for rank in range(20)}
    places = {0: place(all=5), 1: place(all=4, at="data/loader.py:132 __getitems__")}
    assert verdict(places, names) == "rank 1 (host h, process 101) is behind, at data/loader.py:132 __getitems__"
    assert verdict({0: place(all=5), 1: None}, names).startswith("no answer from rank 1 (host h, process 101): stopped")
    assert verdict({0: place(all=5), 1: place(all=5)}, names) == "no rank is known to be behind"
    many = verdict(dict.fromkeys(range(20)), names)
    assert "rank 7 (host h, process 107) and 12 others" in many


def test_a_place_travels_as_json_and_nonsense_is_none():
    there = json.loads(json.dumps(dataclasses.asdict(place(all=5))))
    assert Place.from_json(there) == place(all=5)
    for nonsense in (None, {}, {"number": "x", "begun": {}, "at": ""}, {"number": 1, "begun": 3, "at": ""}):
        assert Place.from_json(nonsense) is None
