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

from parity import cli, join
from parity.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
CASE, LARGE = "w2-tp2-ep2-sgd-fp32", "w4-tp2-ep2-sgd-fp32"
CASES = """
suite = "joined"
[base]
deadline_s = 200.0
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


def test_ranks_of_torchrun_judge_cases(folder: Path) -> None:
    """The baseline runs on the first rank; a case larger than the job is an error that says so."""
    command = [sys.executable, *TORCHRUN, "-m", "parity", "rank", "w*", "--out", "out"]
    done = start(folder, *command)
    assert done.returncode != 0  # torchrun's own, for rank 0 that ended with 3
    assert done.stdout.count("1 of 2 cells errored") == 1  # rank 0 alone prints
    assert "needs 4 ranks, the job has 2" in done.stdout
    assert verdicts(folder) == {CASE: {"pass"}, LARGE: {"error"}}
    about = json.loads((folder / "out" / "run.json").read_text())
    assert (about["state"], about["command"]) == ("finished", "parity rank w*, 2 ranks")


def test_without_a_launcher_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3 and the variables, not a hang."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(cli.main, ["rank", "w4-*"])
    assert done.exit_code == 3
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in done.stderr


def test_rank_0_takes_what_the_case_file_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record names it; an unknown one is refused, with no directory, and the others may go."""
    monkeypatch.chdir(tmp_path)
    trainer, ended = "examples.two_rank_mlp:TwoRankMLP", []
    (tmp_path / "own.toml").write_text(f'implementation = "{trainer}"\n{CASES}')
    joined = join.Joined(None, 0, 1)
    monkeypatch.setattr(joined, "end", lambda: ended.append(1))
    with pytest.raises(UsageError, match="unknown implementation 'nope'; allowed: "):
        join.main(joined, ["own.toml"], None, None, "nope", None)
    assert [*tmp_path.iterdir()] == [tmp_path / "own.toml"]
    assert join.main(joined, ["own.toml"], None, None, None, Path("out")) == 3  # a job too small
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["selection"]["implementation"] == trainer
    assert ended == [1, 1]


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
        [str(recipe), LARGE, "--out", "out"], cwd=folder, env=env, text=True,
        capture_output=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(folder) == {LARGE: {"pass"}}
