"""What an environment lacks, and constraints that leave alone what it has."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_requirements", ROOT / "tools" / "check_requirements.py")
check_requirements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_requirements)


def setup_py(folder: Path, requirements: list[str]) -> Path:
    path = folder / "setup.py"
    path.write_text(f"REQUIREMENTS = {requirements!r}\nEXTRAS = {{'more': ['not-there-at-all>=1']}}\n")
    return path


def test_names_what_is_missing_or_of_another_version(tmp_path):
    path = setup_py(tmp_path, ["numpy>=1", "torch<1", "nothing-of-this-name"])
    torch_version = importlib.metadata.version("torch")
    expected = [f"torch<1 (installed: {torch_version})", "nothing-of-this-name (not installed)"]
    assert check_requirements.unmet([], path) == expected
    assert check_requirements.unmet(["more"], path)[-1] == "not-there-at-all>=1 (not installed)"


def test_an_unknown_extra_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'plots'; setup.py declares more"):
        check_requirements.unmet(["plots"], setup_py(tmp_path, []))


def test_the_environment_of_the_tests_meets_what_setup_py_states(capsys):
    assert check_requirements.main(["--extras", "dev"]) == 0, capsys.readouterr().out


def test_constraints_keep_what_is_installed(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# tested\nnumpy==0.1\ntorch==1.0\nnothing-of-this-name==3\n")
    assert check_requirements.respectful_constraints(path).splitlines() == [
        "# tested",
        "nothing-of-this-name==3",
        f"torch=={importlib.metadata.version('torch')}",
    ]
