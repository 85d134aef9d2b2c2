"""The scripts of examples/, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "train_qwen3_moe.py"


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


@pytest.mark.parametrize(("trainer", "code"), [("TwoRankMLP", 0), ("Forgetful", 1)])
def test_a_trainer_of_ones_own_is_judged(trainer: str, code: int, tmp_path: Path) -> None:
    """It passes without the bug; with it the cause stands alone, the norm below the MLP at 1/tp."""
    assert len((EXAMPLES / "two_rank_mlp.py").read_text().splitlines()) <= 80
    parity = Path(sys.executable).with_name("parity")  # a script: the working folder is no sys.path
    words = ["run", "examples/two_rank_mlp.toml", "--out", str(tmp_path), "--format", "json"]
    done = subprocess.run(
        [str(parity), *words, "--implementation", f"examples.two_rank_mlp:{trainer}"],
        cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    found = json.loads(done.stdout)
    families = {line["family"]: line for line in found["families"]}
    assert len(families) == 6
    if not code:
        assert found["counts"]["pass"] == 1
        return
    (failure,) = found["failures"]
    assert failure["causes"] == ["dense-input-gradient-partial"]
    scales = {row["tensor"]: row["scale"] for row in failure["rows"]}
    assert scales["layers.1.mlp_norm.weight"] == pytest.approx(0.5, abs=1e-5)
    assert families["layernorm"]["replica"] == 0
