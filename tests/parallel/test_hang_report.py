"""Which ranks the others wait for."""

import dataclasses
import json

import pytest

from megatron.parallel.hang_report import RankState, describe_hang, find_stragglers


def state(step: int = 7, location: str = "engine/engine.py:1 f", **collectives: int) -> RankState:
    return RankState(step, collectives, location)


@pytest.mark.parametrize(
    ("states", "stragglers"),
    [
        ({}, []),
        ({0: state(7, all=5), 1: state(7, all=5)}, []),
        ({0: state(8, all=5), 1: state(7, all=5), 2: state(8, all=9)}, [1]),
        ({0: state(all=5), 1: state(all=4), 2: state(all=5)}, [1]),
        # 0 and 2 have started what 1 and 3 have not; 1 has started with 3 what 3 has not: all wait for 3
        ({0: state(all=5, a=2), 1: state(all=4, b=3), 2: state(all=5, a=2), 3: state(all=4, b=2)}, [3]),
        ({0: state(x=1, y=2), 1: state(x=2, y=1)}, []),  # each waits for the other
    ],
)
def test_stragglers_keep_others_waiting_and_wait_for_nobody(states, stragglers):
    assert find_stragglers(states) == stragglers


def test_description():
    names = {rank: f"rank {rank} (host h, process {rank + 100})" for rank in range(20)}
    states = {0: state(all=5), 1: state(all=4, location="data/loader.py:132 __getitems__")}
    assert describe_hang(states, names) == "rank 1 (host h, process 101) is behind, at data/loader.py:132 __getitems__"
    assert describe_hang({0: state(all=5), 1: None}, names).startswith(
        "no answer from rank 1 (host h, process 101): stopped"
    )
    assert describe_hang({0: state(all=5), 1: state(all=5)}, names) == "no rank is known to be behind"
    many = describe_hang(dict.fromkeys(range(20)), names)
    assert "rank 7 (host h, process 107) and 12 others" in many


def test_a_state_survives_json_and_anything_else_is_none():
    there = json.loads(json.dumps(dataclasses.asdict(state(all=5))))
    assert RankState.from_json(there) == state(all=5)
    for nonsense in (
        None,
        {},
        {"step": "x", "collectives": {}, "location": ""},
        {"step": 1, "collectives": 3, "location": ""},
    ):
        assert RankState.from_json(nonsense) is None
