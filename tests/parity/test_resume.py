"""A run that was cut off: what it leaves can be reported, and is finished without repeating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from parity import cli
from parity.store import RunDirectory, by_case
from tests.parity.example_rows import FakeJudge

CASES = "suite = 'cut'\n[base]\nseed = 1\n[axes]\nshape.world = [1, 2, 3, 4]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project of four cases."""
    tmp_path.joinpath("cases").mkdir()
    tmp_path.joinpath("cases", "cut.toml").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parity(*words: str, judge: FakeJudge) -> Result:
    """Run a command."""
    return CliRunner().invoke(cli.main, words, obj=judge.open)


def killed(folder: Path) -> Path:
    """Leave what SIGKILL leaves: results of two cases, half a line, run.json of the start."""
    judge = FakeJudge()
    assert parity("run", "--suite", "cut", "--out", "out", judge=judge).exit_code == 0
    out = folder / "out"
    about = json.loads((out / "run.json").read_text())
    about = {**about, "state": "running"}
    del about["ended"]
    (out / "run.json").write_text(json.dumps(about))
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    whole = [line for line in lines if '"w1-' in line or '"w2-' in line]
    (out / "results.jsonl").write_text("".join(whole) + lines[-1][:50])
    for name in ("report.md", "report.html", "junit.xml", "ctrf.json"):
        (out / name).unlink()
    return out


def test_what_finished_can_be_reported(folder: Path) -> None:
    """`parity report` writes every form out of whole lines alone."""
    out = killed(folder)
    done = parity("report", "out", judge=FakeJudge())
    assert done.exit_code == 0, done.output
    assert "2 of 2 cells passed" in done.stdout
    assert {p.name for p in out.iterdir()} >= {"report.md", "report.html", "junit.xml", "ctrf.json"}


def test_it_is_finished_without_repeating(folder: Path) -> None:
    """Only what is missing runs (and the case whose line was cut); id and start stay."""
    out = killed(folder)
    before = json.loads((out / "run.json").read_text())
    judge = FakeJudge()
    done = parity("run", "--resume", "out", judge=judge)
    assert done.exit_code == 0, done.output
    assert judge.seen == ["w2-sgd-fp32", "w3-sgd-fp32", "w4-sgd-fp32"]
    assert "4 of 4 cells passed" in done.stdout
    assert len(by_case(RunDirectory.open(out).rows())) == 4
    after: dict[str, Any] = json.loads((out / "run.json").read_text())
    assert (after["state"], after["id"]) == ("finished", before["id"])
    assert after["started"] == before["started"]
    assert list(after["definitions"]) == list(before["definitions"])


def test_a_case_that_changed_is_done_again(folder: Path) -> None:
    """Results of another seed are no results of this case."""
    killed(folder)
    (folder / "cases" / "cut.toml").write_text(CASES.replace("seed = 1", "seed = 2"))
    judge = FakeJudge()
    done = parity("run", "--resume", "out", judge=judge)
    assert done.exit_code == 0
    assert "changed since, done again: w1-sgd-fp32, w2-sgd-fp32" in done.stderr
    assert len(judge.seen) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"commit": "abc123def"}, "commit abc123def then, nocommit now"),
        ({"versions": {"torch": "1.0.0", "python": None}}, "torch 1.0.0 then, "),
    ],
)
def test_another_program_is_another_run(folder: Path, change: dict[str, Any], says: str) -> None:
    """Rows of another commit or version get no neighbours, and stay as they are."""
    out = killed(folder)
    about = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**about, **change}))
    rows = (out / "results.jsonl").read_bytes()
    judge = FakeJudge()
    done = parity("run", "--resume", "out", judge=judge)
    assert (done.exit_code, judge.opened) == (2, [])
    assert "out cannot be resumed: " in done.stderr
    assert says in done.stderr
    assert "start a new run" in done.stderr
    assert (out / "results.jsonl").read_bytes() == rows


def test_without_its_record_a_run_is_not_resumed(folder: Path) -> None:
    """What was asked for stands in run.json: without it nothing is guessed."""
    out = killed(folder)
    (out / "run.json").write_text("{")
    judge = FakeJudge()
    done = parity("run", "--resume", "out", judge=judge)
    assert (done.exit_code, judge.opened) == (2, [])
    assert "out/run.json: cannot be read" in done.stderr
    (out / "run.json").unlink()
    done = parity("run", "--resume", "out", judge=judge)
    assert (done.exit_code, judge.opened) == (2, [])
    assert "out/run.json: missing" in done.stderr


def test_latest_can_be_resumed(folder: Path) -> None:
    """The link is followed; it points to the run afterwards, not to itself."""
    assert parity("run", "--suite", "cut", judge=FakeJudge()).exit_code == 0
    latest = folder / "reports" / "latest"
    run = latest.resolve()
    assert parity("run", "--resume", "reports/latest", judge=FakeJudge()).exit_code == 0
    assert latest.readlink() == Path(run.name)


def test_a_run_that_goes_on_is_not_resumed(folder: Path) -> None:
    """Two processes never write one directory."""
    out = killed(folder)
    writer = RunDirectory.open(out)
    writer.hold()
    done = parity("run", "--resume", "out", judge=FakeJudge())
    assert done.exit_code == 2
    assert "out is being written by another run" in done.stderr
    writer.release()
    assert parity("run", "--resume", "out", judge=FakeJudge()).exit_code == 0
