"""`parity rank`: a world that torchrun starts, on one machine and across two network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity import cli

REPOSITORY = Path(__file__).resolve().parents[2]
CASE = "w2-tp2-ep2-sgd-fp32"
CASES = """
suite = "joined"
[base]
model.layers = 1
[[case]]
shape = { world = 2, tp = 2, ep = 2 }
[[case]]
shape = { world = 4, tp = 2, ep = 2 }
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a project of two cases, the second one larger than the job."""
    tmp_path.joinpath("cases").mkdir()
    tmp_path.joinpath("cases", "joined.toml").write_text(CASES)
    return tmp_path


def environment() -> dict[str, str]:
    """Give a clean environment in which this repository is found."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launched}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, cwd=folder, env=environment(), text=True, capture_output=True, check=False,
        timeout=240,
    )  # fmt: skip


def verdicts(folder: Path) -> dict[str, set[str]]:
    """Read the verdicts of the rows of each case."""
    found: dict[str, set[str]] = {}
    for line in (folder / "out" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["case"], set()).add(row["verdict"])
    return found


def test_ranks_of_torchrun_judge_a_case(folder: Path) -> None:
    """The folded world is the job, the baseline its first rank; rank 0 alone writes and prints."""
    command = [sys.executable, *TORCHRUN, "-m", "parity", "rank", CASE, "--out", "out"]
    done = start(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 of 1 cells passed") == 1
    assert verdicts(folder) == {CASE: {"pass"}}
    about = json.loads((folder / "out" / "run.json").read_text())
    assert (about["state"], about["command"]) == ("finished", f"parity rank {CASE}, 2 ranks")


def test_a_case_larger_than_the_job_is_an_error(folder: Path) -> None:
    """It is said with both sizes, the other case is judged, and the job ends."""
    command = [sys.executable, *TORCHRUN, "-m", "parity", "rank", "w*", "--out", "out"]
    done = start(folder, *command)
    assert done.returncode != 0
    large = "w4-tp2-ep2-sgd-fp32"
    found = verdicts(folder)
    assert found[large] == {"error"}
    assert "needs 4 ranks, the job has 2" in done.stdout
    assert found[CASE] == {"pass"}


def test_without_a_launcher_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3 and the variables, not a hang."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(cli.main, ["rank", "w4-*"])
    assert done.exit_code == 3
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in done.stderr


def _namespaces() -> bool:
    """Say whether this process may make network namespaces."""
    if not shutil.which("ip"):
        return False
    name = f"parity-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made.returncode == 0


def test_two_network_namespaces_are_two_nodes(folder: Path) -> None:
    """Two ranks in each of two namespaces, with Gloo over the link between them."""
    if not _namespaces():
        pytest.skip("no right to make network namespaces")
    env = {**environment(), "PYTHON": sys.executable}
    recipe = REPOSITORY / "recipes" / "two_namespaces.sh"
    done = subprocess.run(
        [str(recipe), "w4-tp2-ep2-sgd-fp32", "--out", "out"], cwd=folder, env=env, text=True,
        capture_output=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(folder) == {"w4-tp2-ep2-sgd-fp32": {"pass"}}
