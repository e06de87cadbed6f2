"""The registry of formats: what is listed there is found in the command lines, and nothing else must be changed."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import saved_model
import torch
from test_docs import tool

from megatron.checkpoint import CheckpointError
from megatron.conversion.contents import Contents, Lazy
from megatron.conversion.formats import FORMATS, Format, format_of, readers, writers
from megatron.conversion.inspect import inspect
from megatron.conversion.job import Conversion


class Dump(Format):
    """One file of numbers, in JSON."""

    name, title, help = "dump", "a dump", "all numbers in one JSON file"
    writable = keeps_optimizer = True

    def detect(self, folder: str) -> bool:
        return (Path(folder) / "dump.json").is_file()

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> Contents:
        content = json.loads((Path(folder) / "dump.json").read_text())
        tensors = {name: torch.tensor(values) for name, values in content["tensors"].items()}
        lazy = {
            name: Lazy(tuple(t.shape), t.dtype, lambda row, t=t: t if row is None else t[row])
            for name, t in tensors.items()
        }
        return Contents(folder, content["meta"], lazy, content["step"]).check()

    def write(self, contents: Contents, job: Conversion) -> Generator[str, None, Path]:
        yield "numbers take a lot of room as text"
        tensors = {name: lazy.read(None).tolist() for name, lazy in contents.tensors.items()}
        Path(job.save).mkdir()
        content = {"step": contents.step, "meta": contents.meta, "tensors": tensors}
        (Path(job.save) / "dump.json").write_text(json.dumps(content))
        return Path(job.save)


def convert(*flags: object) -> int:
    return tool("tools/convert_checkpoint.py").main([str(flag) for flag in flags])


def test_a_format_that_is_listed_is_read_written_found_out_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FORMATS, Dump.name, Dump())
    saved = saved_model.save_model(tmp_path)
    assert convert("--load", saved.folder, "--to", "dump", "--save", tmp_path / "dump") == 0
    out = capsys.readouterr().out
    assert "numbers take a lot of room as text" in out
    assert out.endswith(f"wrote {tmp_path / 'dump'}\n")
    assert format_of(str(tmp_path / "dump")).name == "dump"
    assert convert("--load", tmp_path / "dump", "--to", "native", "--save", tmp_path / "back") == 0
    before, after = (inspect(str(folder), verify=True) for folder in (saved.folder, tmp_path / "back"))
    assert after["tensors"] == before["tensors"]
    with pytest.raises(CheckpointError, match="is a dump's; inspect what convert_checkpoint --to native makes of it"):
        inspect(str(tmp_path / "dump"), verify=False)
    with pytest.raises(SystemExit):
        convert("--help")
    help_ = capsys.readouterr().out
    assert "all numbers in one JSON file" in help_
    assert "--to {native,hf,megatron-deepspeed,dump}" in help_


def test_choices_of_the_command_line_stay():
    assert readers() == ["native", "hf", "megatron-deepspeed", "megatron-lm"]
    assert writers() == ["native", "hf", "megatron-deepspeed"]
    assert readers("gelu_as_tanh") == ["megatron-deepspeed", "megatron-lm"]
    assert writers("max_shard_size") == ["hf"]


def test_the_list_of_formats_imports_nothing_heavy():
    code = "import sys, megatron.conversion.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
