import importlib.util
from pathlib import Path

import pytest
import saved_model

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def run(capsys):
    """Runs the tool; returns its exit status, standard output and standard error."""
    spec = importlib.util.spec_from_file_location("convert_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*flags: str) -> tuple[int, str, str]:
        try:
            status = tool.main(list(flags))
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_exit_status_and_messages(run, tmp_path):
    saved = saved_model.save_model(tmp_path)
    arguments = ("--load", str(saved.folder), "--to", "hf", "--save", str(tmp_path / "hf"))
    status, out, err = run(*arguments, "--dtype", "bf16")
    assert status == 0, err
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'hf'}"
    status, out, err = run(*arguments)
    assert (status, out.count("wrote")) == (1, 0)
    assert "is there already and not empty" in err
    status, out, err = run(*arguments[:-1], str(tmp_path / "y"), "--upcycle")
    assert status == 1
    assert "has experts already" in err
    status, out, err = run("--load", str(tmp_path / "nowhere"), "--to", "hf", "--save", str(tmp_path / "x"))
    assert status == 1
    assert "nowhere does not exist" in err
    status, out, err = run(*arguments[:-1], str(tmp_path / "x"), "--max-shard-size", "big")
    assert status == 1
    assert "expected a size such as 5GB" in err
    assert not (tmp_path / "x").exists()
