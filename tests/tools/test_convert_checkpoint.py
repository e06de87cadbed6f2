"""The command lines that convert and inspect checkpoints."""

import json

import saved_model
from test_docs import tool

from megatron.config import MoEConfig


def run(name: str, *flags: object) -> int:
    try:
        return tool(f"tools/{name}.py").main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code


def test_a_dense_checkpoint_is_upcycled_and_looked_at(tmp_path, capsys):
    saved = saved_model.save_model(tmp_path, MoEConfig())
    new = tmp_path / "new"
    flags = ("--load", saved.folder, "--to", "native", "--save", new)
    assert run("convert_checkpoint", *flags, "--upcycle", "--num-experts", 4, "--ep", 2, "--dtype", "bf16") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {new / 'step_00000003'}"
    assert run("inspect_checkpoint", new, "--verify", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["model"]["experts"] == [1, 4]
    assert about["written_by"]["expert_parallel"] == [2]
    assert {kind["dtype"] for kind in about["tensors"].values()} == {"bfloat16"}
    assert run("convert_checkpoint", *flags) == 1
    assert f"--save {new} is there already and not empty" in capsys.readouterr().err
    assert run("convert_checkpoint", *flags[:-1], tmp_path / "x", "--max-shard-size", "big") == 1
    assert "expected a size such as 5GB" in capsys.readouterr().err
    assert run("convert_checkpoint", *flags, "--average", saved.folder) == 2
    assert run("inspect_checkpoint", tmp_path / "nothing") == 1
    assert "does not exist" in capsys.readouterr().err
