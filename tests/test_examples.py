"""The scripts of examples/, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_qwen3_moe.py"


def test_the_training_example_learns() -> None:
    """Folded over 4 CPU ranks with ZeRO-1, the loss falls below a third; at most 40 lines."""
    pytest.importorskip("transformers", reason="transformers is in the extra `models`")
    assert len(SCRIPT.read_text().splitlines()) <= 40
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "4", str(SCRIPT)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 3
