"""Checkpoints are good once a good update has followed; the last good one is never lost."""

from pathlib import Path

import pytest

from megatron.checkpoint import CheckpointStatus, latest
from megatron.checkpoint.folder import begin, checkpoint_status, commit
from megatron.training.hooks.checkpoint_tracker import CheckpointTracker, Origin, origin_of

GOOD, OUTLIER, NAN = (
    {"finite": finite, "good": good} for finite, good in ((True, True), (True, False), (False, False))
)


class Run:
    """A run as its checkpoints see it; a save may take a while."""

    def __init__(self, folder: Path, keep_last: int = 2, origin: Path | None = None) -> None:
        self.folder = folder
        self.checkpoints = CheckpointTracker(folder, keep_last, writes=True)
        if origin is not None:
            self.checkpoints.start_from(origin_of(origin))

    def updates(self, *updates: dict[str, bool]) -> "Run":
        for update in updates:
            self.checkpoints.add_update(**update)
            self.checkpoints.write_statuses()
        self.checkpoints.wait()
        return self

    def save(self, step: int, *meanwhile: dict[str, bool], at_the_end: bool = False) -> "Run":
        status = self.checkpoints.status_of_new(at_the_end)
        self.checkpoints.add_checkpoint(self.folder / f"step_{step:08d}", status)
        for update in meanwhile:
            self.checkpoints.add_update(**update)
        begin(self.folder, step)
        commit(self.folder, step, {}, status)
        self.checkpoints.write_statuses()
        if status.good:
            self.checkpoints.delete_older()
        self.checkpoints.wait()
        return self


def found(folder: Path) -> dict[int, str]:
    return {int(path.name[5:]): checkpoint_status(path).value for path in sorted(folder.glob("step_*"))}


def marked(folder: Path) -> int:
    return int(latest(folder).name[5:])


@pytest.mark.parametrize("in_background", [False, True])
def test_the_next_good_update_confirms(tmp_path, in_background):
    run = Run(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        if in_background:
            run.save(step, GOOD)
        else:
            run.save(step)
            assert found(tmp_path)[step] == "pending"
            run.updates(GOOD)
        assert marked(tmp_path) == step
    assert found(tmp_path) == {2: "confirmed", 3: "confirmed"}
    assert run.checkpoints.last_good == tmp_path / "step_00000003"


@pytest.mark.parametrize("bad", [NAN, OUTLIER])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_bad_update_casts_doubt_and_a_good_one_ends_it(tmp_path, bad, in_background):
    run = Run(tmp_path).save(1).updates(GOOD)
    run = run.save(2, bad, bad) if in_background else run.save(2).updates(bad, bad)
    assert found(tmp_path) == {1: "confirmed", 2: "doubted"}
    assert (marked(tmp_path), run.checkpoints.last_good) == (1, tmp_path / "step_00000001")
    run.updates(GOOD, bad)
    assert found(tmp_path) == {1: "confirmed", 2: "confirmed"}, "nothing takes back what a good update said"
    assert marked(tmp_path) == 2


def test_without_a_good_one_latest_names_the_only_one(tmp_path):
    run = Run(tmp_path).save(1).updates(NAN)
    assert run.checkpoints.last_good is None
    assert (found(tmp_path), marked(tmp_path)) == ({1: "doubted"}, 1)


def test_only_good_ones_count_and_the_last_confirmed_one_stays(tmp_path):
    run = Run(tmp_path, keep_last=1).save(1).updates(GOOD)
    run.save(2).updates(NAN).save(3, at_the_end=True).updates(OUTLIER).save(4)
    assert found(tmp_path) == {1: "confirmed", 2: "doubted", 3: "doubted", 4: "doubted"}
    run.updates(GOOD).save(5).updates(GOOD)
    assert found(tmp_path) == {5: "confirmed"}, "what is older than a good one and not good goes"


def test_what_was_saved_at_the_end_counts_and_a_run_that_goes_on_may_doubt_it(tmp_path):
    Run(tmp_path, keep_last=1).save(1).updates(GOOD).save(2, at_the_end=True)
    assert found(tmp_path) == {1: "confirmed", 2: "ended"}
    assert marked(tmp_path) == 2
    run = Run(tmp_path, keep_last=1, origin=tmp_path / "step_00000002").updates(NAN)
    assert (found(tmp_path)[2], marked(tmp_path)) == ("doubted", 1)
    assert run.checkpoints.last_good == tmp_path / "step_00000001"
    run = Run(tmp_path, keep_last=1, origin=tmp_path / "step_00000002").updates(GOOD)
    assert found(tmp_path) == {2: "confirmed"}
    assert run.checkpoints.last_good == tmp_path / "step_00000002"


def test_at_the_end_an_outlier_leaves_latest_where_it_was(tmp_path):
    run = Run(tmp_path).save(1).updates(GOOD, OUTLIER).save(2, at_the_end=True)
    assert found(tmp_path) == {1: "confirmed", 2: "doubted"}
    assert marked(tmp_path) == 1
    assert not run.checkpoints.good


def test_latest_goes_back_to_where_this_run_comes_from(tmp_path):
    """Not to a newer checkpoint of another branch that lies there; and however old it is, it is kept."""
    Run(tmp_path, keep_last=0).save(5).updates(GOOD).save(8).updates(GOOD).save(9).updates(GOOD)
    run = Run(tmp_path, keep_last=1, origin=tmp_path / "step_00000005").updates(GOOD).save(6).updates(NAN)
    assert marked(tmp_path) == 5
    run.save(7, at_the_end=True)
    assert 5 in found(tmp_path)


def test_checkpoints_of_other_runs_are_left_as_they_are(tmp_path):
    Run(tmp_path / "old").save(1).updates(GOOD).save(2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    for update in (GOOD, NAN):
        run = Run(tmp_path / "new", origin=tmp_path / "old" / "step_00000002").updates(update)
        assert run.checkpoints.last_good == tmp_path / "old" / f"step_0000000{2 if update is GOOD else 1}"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")} == before


def test_a_checkpoint_that_was_not_saved_is_not_good(tmp_path):
    run = Run(tmp_path).save(1).updates(GOOD)
    run.checkpoints.add_checkpoint(tmp_path / "step_00000002", CheckpointStatus.PENDING)
    run.checkpoints.add_update(**GOOD)
    run.checkpoints.remove(tmp_path / "step_00000002")
    run.updates(GOOD)
    assert run.checkpoints.last_good == tmp_path / "step_00000001"


def test_checkpoints_without_a_record_are_good(tmp_path):
    begin(tmp_path, 1)
    commit(tmp_path, 1, {})
    assert [path.name for path in (tmp_path / "step_00000001").iterdir()] == ["manifest.json"]
    path = tmp_path / "step_00000001"
    assert origin_of(path) == Origin(path, CheckpointStatus.CONFIRMED, path)


def test_only_the_first_rank_writes(tmp_path):
    Run(tmp_path).save(1)
    other = CheckpointTracker(tmp_path, 1, writes=False)
    other.add_checkpoint(tmp_path / "step_00000001", CheckpointStatus.PENDING)
    other.add_update(**GOOD)
    other.write_statuses()
    assert other.last_good == tmp_path / "step_00000001"
    assert found(tmp_path) == {1: "pending"}


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    run = Run(tmp_path).save(1).updates(GOOD).save(2)
    monkeypatch.setattr("megatron.training.hooks.checkpoint_tracker.record_status", full)
    with pytest.warns(UserWarning, match="cannot be recorded: .*No space left"):
        run.updates(GOOD)
    assert found(tmp_path) == {1: "confirmed", 2: "pending"}
