"""Saving, and starting from the weights of another run: what is told."""

import os

import pytest
from config.problems import problems


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"finetune": True, "save": "new"},
            "--finetune requires --load, the weights to start from; add --load DIR, or drop --finetune",
        ),
        (
            {"finetune_load_optim": True, "load": "old", "save": "new"},
            "--finetune-load-optim requires --finetune; a resumed run always loads its optimizer state. Add --finetune,"
            " or drop --finetune-load-optim",
        ),
        (
            {"finetune": True, "load": "old/step_00000008", "save": "old"},
            "--finetune starts a new run from the weights of --load old/step_00000008, but --save old is the folder of"
            " the old run; give another --save, or drop --finetune to resume the old run",
        ),
        (
            {"change_blend": True, "save": "new"},
            "--change-blend requires --load, the run to resume; add --load DIR, or drop --change-blend",
        ),
    ],
)
def test_messages(values, message):
    assert problems(values) == (message,)


def test_a_new_run_may_start_from_the_weights_of_another():
    assert problems({"finetune": True, "finetune_load_optim": True, "load": "old", "save": "new"}) == ()
    assert problems({"finetune": True, "load": "old"}) == ()


def test_folders_are_compared_and_not_their_names(tmp_path):
    os.symlink(tmp_path, tmp_path / "link")
    (problem,) = problems({"finetune": True, "load": str(tmp_path / "old"), "save": str(tmp_path / "link" / "old")})
    assert "give another --save" in problem
