import hashlib
import json
import subprocess
import sys
from pathlib import Path

import saved_model

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True)


def test_what_a_checkpoint_holds(tmp_path):
    saved = saved_model.save_model(tmp_path)
    done = run("--load", str(saved.folder), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["step"], found["tokens"], found["optimizer_state"]) == (3, 24 * 48, False)
    assert found["experts_of_layers"] == [1, 4]
    assert found["parameters"] == sum(p.numel() for p in saved.model.parameters())
    assert found["tensors"]["model.layers.1.mlp.experts.w1"] == {"shape": [4, 32, 128], "dtype": "float32"}
    assert list(found["tensors"]) == ["model." + name for name, _ in saved.model.named_parameters()]
    for name, record in found["files"].items():
        content = (Path(found["checkpoint"]) / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    data = Path(found["checkpoint"]) / "data-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    done = run("--load", str(saved.folder))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is damaged: data-00000.safetensors has" in done.stderr
