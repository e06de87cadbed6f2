"""On a GPU a profile counts kernels, sorts by their time, and sees when none runs."""

import re
import time

import pytest
import torch

from megatron.training.hooks.profiling import profiled

pytestmark = pytest.mark.gpu
SLEEP = 20_000_000  # clock cycles, about 10 ms


def test_the_idle_share_is_of_kernels_and_not_of_named_ranges(tmp_path, capsys):
    device = torch.device("cuda", 0)
    x = torch.randn(512, 512, device=device)
    for pause, least, most in ((0.0, 0.0, 0.2), (0.1, 0.6, 1.0)):
        x @ x
        with profiled(tmp_path, "two sleeps", device), torch.profiler.record_function("a named range"):
            torch.cuda._sleep(SLEEP)
            x @ x
            if pause:
                torch.cuda.synchronize()
                time.sleep(pause)
            torch.cuda._sleep(SLEEP)
        printed = capsys.readouterr().out
        found = re.match(r"two sleeps: ([\d.]+) ms from the first kernel to the last, idle ([\d.]+)%\n", printed)
        assert found, printed
        assert least <= float(found[2]) / 100 <= most, printed
        assert float(found[1]) > 1e3 * pause
        rows = (tmp_path / "table.txt").read_text().splitlines()
        kernels = [row for row in rows if "spin_kernel" in row or "gemm" in row.lower()]
        assert "spin_kernel" in kernels[0], "the longest comes first"
    assert (tmp_path / "trace.json").stat().st_size > 0
