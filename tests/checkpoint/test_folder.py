import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import Box, CheckpointError, ShardedTensor, latest, load, save
from megatron.checkpoint.folder import CheckpointStatus, complete_checkpoints, in_use, record_status

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def save_value(folder: Path, step: int, value: float, **options) -> Path:
    """A checkpoint whose only tensor is full of ``value``."""
    tensor = torch.full((4, 3), value)
    return save(
        folder, step, [ShardedTensor("w", (4, 3), torch.float32, [Box((0, 0), tensor)])], {"value": value}, **options
    )


def load_value(folder: Path) -> float:
    tensor = torch.full((4, 3), -1.0)
    meta = load(folder, [ShardedTensor("w", (4, 3), torch.float32, [Box((0, 0), tensor)])])
    assert (tensor == meta["value"]).all()
    return meta["value"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_there(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    (tmp_path / ".step_00000001.tmp").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load(tmp_path, [])


def test_layout_and_latest(tmp_path):
    assert save_value(tmp_path, 100, 1.0) == tmp_path / "step_00000100"
    save_value(tmp_path, 200, 2.0)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200"]
    assert (tmp_path / "latest").read_text() == "step_00000200\n"
    assert names(tmp_path / "step_00000100") == ["data-00000.safetensors", "index.json", "manifest.json", "meta.json"]
    assert latest(tmp_path) == latest(str(tmp_path)) == tmp_path / "step_00000200"
    assert latest(tmp_path / "step_00000100") == tmp_path / "step_00000100"
    assert load_value(tmp_path) == 2.0
    assert load_value(tmp_path / "step_00000100") == 1.0
    moved = (tmp_path / "step_00000100").rename(tmp_path / "a copy")
    assert load_value(moved) == 1.0


def test_latest_counts_although_another_step_is_higher(tmp_path):
    save_value(tmp_path, 200, 2.0)
    save_value(tmp_path, 150, 1.5)  # a run resumed from an older checkpoint
    assert load_value(tmp_path) == 1.5


@pytest.mark.parametrize("mark", [None, "step_00000300\n", "../../etc\n", "", "step_00000200"])
def test_without_a_usable_mark_the_newest_complete_one_is_taken(tmp_path, mark):
    save_value(tmp_path, 200, 2.0)
    save_value(tmp_path, 100, 1.0)
    shutil.copytree(tmp_path / "step_00000200", tmp_path / "step_00000300")
    (tmp_path / "step_00000300" / "manifest.json").unlink()
    if mark is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(mark)
    if mark == "step_00000200":
        assert load_value(tmp_path) == 2.0
        return
    with pytest.warns(UserWarning, match=r"using .*step_00000100, the newest complete checkpoint"):
        assert load_value(tmp_path) == 1.0


def test_only_broken_checkpoints_is_an_error_not_a_new_start(tmp_path):
    (save_value(tmp_path, 100, 1.0) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .* latest says step_00000100"):
        latest(tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"none has an intact manifest.json"):
        latest(tmp_path)


def test_a_checkpoints_own_folder_that_is_none_is_an_error(tmp_path):
    save_value(tmp_path, 100, 1.0)
    (save_value(tmp_path, 200, 2.0) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing.*Load .*step_00000100 instead"):
        latest(tmp_path / "step_00000200")
    with pytest.raises(CheckpointError, match=r"step_00000300.*is missing"):
        latest(tmp_path / "step_00000300")
    moved = (tmp_path / "step_00000200").rename(tmp_path / "a copy")
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        latest(moved)


def test_a_manifest_that_was_changed_is_noticed(tmp_path):
    path = save_value(tmp_path, 100, 1.0) / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["meta.json"]["size"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: its contents do not match its own checksum"):
        latest(path.parent)
    content["format"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="of format 2; this version reads format 1"):
        latest(path.parent)
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: UnicodeDecodeError"):
        latest(path.parent)


def test_keep_last(tmp_path):
    for step in (100, 200, 300):
        save_value(tmp_path, step, float(step), keep_last=2)
    assert names(tmp_path) == ["latest", "step_00000200", "step_00000300"]
    save_value(tmp_path, 250, 250.0, keep_last=2)  # what was saved last is kept, whatever its number
    assert names(tmp_path) == ["latest", "step_00000250", "step_00000300"]
    save_value(tmp_path, 400, 400.0)
    assert names(tmp_path) == ["latest", "step_00000250", "step_00000300", "step_00000400"]


def test_one_in_doubt_is_the_last_choice(tmp_path):
    save_value(tmp_path, 100, 1.0)
    save_value(tmp_path, 200, 2.0, status=CheckpointStatus.DOUBTED)
    assert load_value(tmp_path) == 1.0
    assert load_value(tmp_path / "step_00000200") == 2.0
    save_value(tmp_path, 300, 3.0, status=CheckpointStatus.PENDING)
    assert load_value(tmp_path) == 3.0
    record_status(tmp_path / "step_00000300", CheckpointStatus.DOUBTED)
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match=r"using .*step_00000100"):
        assert load_value(tmp_path) == 1.0
    (tmp_path / "step_00000200" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"Load .*step_00000100 instead \(older ones: \['step_00000300'\]\)"):
        latest(tmp_path / "step_00000200")


def test_a_checkpoint_being_loaded_is_kept(tmp_path):
    old = save_value(tmp_path, 100, 1.0)
    with in_use(old):
        save_value(tmp_path, 200, 2.0, keep_last=1)
        assert load_value(old) == 1.0
    save_value(tmp_path, 300, 3.0, keep_last=1)
    assert names(tmp_path) == ["latest", "step_00000300"]


def test_who_comes_when_a_checkpoint_is_deleted_waits_until_it_is_gone(tmp_path, monkeypatch):
    old = save_value(tmp_path, 100, 1.0)
    came = threading.Event()

    def come() -> None:
        with in_use(old):
            came.set()

    visitor, rename = threading.Thread(target=come), Path.rename

    def rename_while_somebody_comes(path, target):
        if path == old:
            visitor.start()
            assert not came.wait(0.2)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_while_somebody_comes)
    save_value(tmp_path, 200, 2.0, keep_last=1)
    assert came.wait(10)
    visitor.join()
    assert names(tmp_path) == ["latest", "step_00000200"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    save_value(tmp_path, 100, 1.0)

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.warns(UserWarning, match=r"cannot delete the old .*Permission denied"):
            save_value(tmp_path, 200, 2.0, keep_last=1)
    assert load_value(tmp_path) == 2.0
    save_value(tmp_path, 300, 3.0, keep_last=1)
    assert names(tmp_path) == ["latest", "step_00000300"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_value(tmp_path, 100, 1.0)
    save_value(tmp_path, 200, 2.0)
    save_value(tmp_path, 100, 1.5)
    assert load_value(tmp_path) == 1.5
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200"]


def test_a_crash_while_a_step_is_replaced_loses_nothing(tmp_path):
    save_value(tmp_path, 100, 1.0)
    (tmp_path / "step_00000100").rename(tmp_path / ".step_00000100.replaced")
    assert [path.name for path in complete_checkpoints(tmp_path)] == [".step_00000100.replaced"]
    with pytest.warns(UserWarning, match="step_00000100, which cannot be used: .*manifest.json is missing"):
        assert load_value(tmp_path) == 1.0
    save_value(tmp_path, 200, 2.0)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200"]
    assert load_value(tmp_path / "step_00000100") == 1.0


def test_left_overs_are_removed_by_the_next_save(tmp_path):
    save_value(tmp_path, 100, 1.0)
    for name in (".step_00000100.replaced", ".step_00000050.deleted", ".step_00000200.tmp", ".step_00000300.tmp"):
        shutil.copytree(tmp_path / "step_00000100", tmp_path / name)
    assert load_value(tmp_path) == 1.0
    save_value(tmp_path, 200, 2.0)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00000200"]
    assert load_value(tmp_path) == 2.0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_value(tmp_path, 100, 1.0)
