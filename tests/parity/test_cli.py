"""The command line: selection, exit codes, what is printed where, what is on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from parity import cli, cli_explain, doctor, fingerprint
from parity.case import Case
from parity.errors import InfrastructureError, UsageError
from parity.session import Selection, exit_code
from parity.store import Row, RunDirectory, by_case
from tests.parity.example_rows import FakeJudge, passing, row, scaled

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINER = "examples.two_rank_mlp:TwoRankMLP"
FOUR = "w4-tp2-ep4-gas2-*[px]-[as]*"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every command in a folder of its own; cases come from the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path


def parity(*arguments: str, judge: FakeJudge | None = None, color: bool = False) -> Result:
    """Run a command with a judge that needs no ranks."""
    opened = None if judge is None else judge.open
    return CliRunner().invoke(cli.main, arguments, obj=opened, color=color)


def skipped(case: Case) -> list[Row]:
    """Skip a case."""
    return [Row.of_case(case, "fold_impl", verdict="skipped", reason="needs a GPU")]


def interrupt(_case: Case) -> list[Row]:
    """Press Ctrl-C."""
    raise KeyboardInterrupt


def die(_case: Case) -> list[Row]:
    """Lose a rank."""
    error = InfrastructureError("rank 3 died of SIGKILL")
    error.__dict__.update(kind="died", rank=3, traceback="File x.py, line 7")
    raise error


def defect(_case: Case) -> list[Row]:
    """Fail inside the harness itself."""
    raise ZeroDivisionError("a defect")


def test_another_seed_reaches_the_judge_and_the_rerun_command(folder: Path) -> None:
    """Also after the run was cut off."""
    seeds: list[int] = []

    def failing(case: Case) -> list[Row]:
        seeds.append(case.seed)
        return scaled(case)

    judge = FakeJudge(answers={"w4": failing})
    done = parity("run", FOUR, "--seed", "7", "--out", "out", judge=judge)
    assert seeds == [7, 7, 7, 7]
    assert "--seed 7" in done.stdout
    results = folder / "out" / "results.jsonl"
    first = json.loads(results.read_text().splitlines()[0])["case"]
    lines = [x for x in results.read_text().splitlines(True) if json.loads(x)["case"] == first]
    results.write_text("".join(lines))
    parity("run", "--resume", "out", judge=judge)
    assert len(seeds) > 4
    assert {*seeds} == {7}


def test_explain_runs_a_case_again_with_the_seed_of_its_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other weights might not show what failed."""
    again: list[int] = []

    def rerun(_opener: Any, _name: str, case: Case, *_: Any) -> tuple[list[Row], dict[str, Any]]:
        again.append(case.seed)
        return scaled(case), {}

    monkeypatch.setattr(cli_explain, "_rerun", rerun)
    parity("run", FOUR, "--seed", "7", "--out", "out", judge=FakeJudge(answers={"w4": scaled}))
    parity("explain", "out", "--taps")
    assert again == [7]


# --- run: exit codes ----------------------------------------------------------------------------


def test_parity_that_holds_ends_with_0(folder: Path) -> None:
    """Results stand on stdout, progress on stderr, everything in the run directory."""
    done = parity("run", FOUR, judge=FakeJudge())
    assert done.exit_code == 0, done.output
    assert "4 of 4 cells passed (36 rows)." in done.stdout
    assert "[4/4] pass" in done.stderr
    assert "[4/4]" not in done.stdout
    latest = folder / "reports" / "latest"
    assert len(by_case(RunDirectory.open(latest).rows())) == 4
    assert "4 of 4 cells passed" in (latest / "report.md").read_text()
    assert f"report: {latest.resolve().relative_to(folder)}" in done.stdout


@pytest.mark.parametrize(
    ("answers", "code", "says"),
    [
        ({"clip-sgd": scaled}, 1, "1 of 4 cells failed: expert gradient x2.000 = tp on 1 shape."),
        ({"clip-sgd": lambda c: [row(c, verdict="leak")]}, 1, "leaks precision"),
        ({"clip-sgd": die}, 3, "1 of 4 cells errored: rank 3 died of SIGKILL."),
        ({"clip-sgd": die, "aux": scaled}, 3, "2 of 4 cells failed"),
        ({"clip-sgd": defect}, 3, "the harness failed: ZeroDivisionError: a defect"),
        ({"clip-sgd": lambda _: []}, 3, "the judge compared nothing"),
        ({"clip-sgd": skipped}, 0, "3 of 4 cells passed (28 rows). 1 skipped."),
        ({"": skipped}, 5, "skipped in 4 cases: needs a GPU"),
    ],
)
def test_the_exit_code_tells_how_it_went(answers: dict[str, Any], code: int, says: str) -> None:
    """1 for mismatches, 3 for infrastructure, which wins, 5 where all is skipped."""
    judge = FakeJudge(answers)
    done = parity("run", FOUR, judge=judge)
    assert done.exit_code == code
    assert says in done.stdout
    assert len(judge.seen) == 4  # what goes wrong in one case never stops the others


def test_exit_codes_by_verdict() -> None:
    """The order of the published exit codes, on bare verdicts."""
    table = {("pass",): 0, ("pass", "skipped"): 0, ("fail",): 1, ("leak", "pass"): 1,
             ("fail", "error"): 3, ("skipped",): 5, (): 5}  # fmt: skip
    assert {verdicts: exit_code(verdicts) for verdicts in table} == table


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "w97*"], 5, "no case matches 'w97*'"),
        (["run", "--suite", "absent"], 2, "unknown suite 'absent'; allowed: "),
        (["run", "--format", "pdf"], 2, "'pdf' is not one of"),
        (["run", "--resume", "absent"], 2, "no run directory"),
        (["run", "w4*", "--resume", "absent"], 2, "--resume takes selection"),
        (["run", "absent.toml"], 2, "cannot be read"),
        (["show", "w4*"], 2, "show takes one"),
        (["report", "absent"], 2, "no run directory"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_usage_errors_are_one_message(arguments: list[str], code: int, says: str) -> None:
    """A mistake of the user ends with its own code and a message on stderr, no traceback."""
    judge = FakeJudge()
    done = parity(*arguments, judge=judge)
    assert done.exit_code == code
    assert says in done.stderr
    assert done.stdout == ""
    assert judge.opened == []


def test_a_bad_case_is_refused_before_any_rank(folder: Path) -> None:
    """Exit code 2, file, case, key, value and allowed values, no rank and no run directory."""
    bad = 'suite = "s"\n[[case]]\nshape = { world = 8, ep = 3 }\n'
    (folder / "bad.toml").write_text(bad)
    judge = FakeJudge()
    done = parity("run", "bad.toml", judge=judge)
    assert (done.exit_code, judge.opened) == (2, [])
    assert done.stderr == (
        "parity: bad.toml: case w8-ep3-sgd-fp32: shape.ep: ep*etp = 3 does not divide world 8 "
        "(got 3); allowed: 1, 2, 4\n"
    )
    assert not (folder / "reports").exists()


def test_an_unknown_implementation_leaves_no_directory(folder: Path) -> None:
    """What cannot start is a usage error, not a run."""

    def refuse(_case: Case) -> Sequence[Row]:
        raise UsageError("no implementation 'x'; allowed: fold_impl")

    done = parity("run", FOUR, judge=FakeJudge({"": refuse}))
    assert (done.exit_code, done.stderr) == (
        2, "parity: no implementation 'x'; allowed: fold_impl\n",
    )  # fmt: skip
    assert list((folder / "reports").iterdir()) == []


def full(*_anything: object) -> None:
    """Fill the disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_infrastructure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 in one line, never 1, which would be a finding."""
    parity("run", FOUR, "--out", "a", judge=FakeJudge())
    done = parity("compare", "a", "a", "--out", "/dev/full")
    assert (done.exit_code, done.stderr) == (
        3, "parity: cannot write --out /dev/full: No space left on device\n",
    )  # fmt: skip
    monkeypatch.setattr(RunDirectory, "append", full)
    done = parity("run", FOUR, judge=FakeJudge())
    assert (done.exit_code, done.stderr) == (3, "parity: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "a", "a", "--out", "/proc/x/y"], "cannot write --out /proc/x/y: "),
        (["faults", "run", "--out", "/proc/x/y"], "cannot write --out /proc/x/y: "),
        (["calibrate", "--out", "/proc/x/y"], "cannot write --out /proc/x/y: "),
        (["versions", "a==1", "--out", "/proc/x/y"], "cannot write --out /proc/x/y: "),
        (["report", "a", "--format", "github"], "cannot write GITHUB_STEP_SUMMARY=/proc/x/y: "),
    ],
)
def test_a_path_that_cannot_be_written_is_usage(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and before anything ran that takes time."""
    parity("run", FOUR, "--out", "a", judge=FakeJudge())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/proc/x/y")
    done = parity(*words)
    assert (done.exit_code, done.stderr[: len(says) + 8]) == (2, f"parity: {says}")


@pytest.mark.parametrize("words", [["report", "a"], ["compare", "a", "a"], ["history", "a"]])
@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("results.jsonl", b'{"schema": 1, "case": "\xff"}', "a/results.jsonl:1: "),
        ("results.jsonl", b'{"schema": 1, "verdict": "ok"}', "a/results.jsonl:1: "),
        ("run.json", b'{"selection": "x"}', "a/run.json: no record of a run: selection: "),
        ("run.json", b'{"started": "yesterday"}', "a/run.json: no record of a run: started: "),
    ],
)
def test_damage_is_named_by_file(
    folder: Path, words: list[str], file: str, damage: bytes, says: str
) -> None:
    """Exit code 2, with the line where there are lines."""
    parity("run", FOUR, "--out", "a", judge=FakeJudge())
    (folder / "a" / file).write_bytes(damage + b"\n")
    done = parity(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr


def test_a_defect_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 and the traceback."""
    monkeypatch.setattr(cli, "commit", lambda: 1 // 0)
    done = parity("run", FOUR, judge=FakeJudge())
    assert done.exit_code == 3
    assert "parity: a defect of the harness\nTraceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_130_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In explain, and before the first case."""
    judge = FakeJudge({"": interrupt})
    done = parity("explain", "w4-tp2-ep4-gas2-aux-sgd-fp32", judge=judge)
    assert (done.exit_code, done.stderr) == (130, "parity: interrupted\n")

    def pressed() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "commit", pressed)
    assert parity("run", FOUR, judge=FakeJudge()).exit_code == 130

    def swallowed() -> str:
        with contextlib.suppress(KeyboardInterrupt):  # as an import does that then is half done
            signal.raise_signal(signal.SIGINT)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    monkeypatch.setattr(cli, "commit", swallowed)
    done = parity("run", FOUR, judge=FakeJudge())
    assert (done.exit_code, done.stderr) == (130, "parity: interrupted\n")


def test_text_that_is_no_text_loses_no_report(folder: Path) -> None:
    """A lone surrogate in an error's words stands in every report by its number."""

    def strange(case: Case) -> list[Row]:
        return [Row.of_case(case, "fold_impl", verdict="error", reason="a \ud800 b")]

    done = parity("run", FOUR, "--out", "a", judge=FakeJudge({"clip-sgd": strange}))
    assert done.exit_code == 3
    assert "a \\ud800 b" in done.stdout
    for name in ("report.md", "report.html", "ctrf.json"):
        assert "ud800" in (folder / "a" / name).read_text(), name
    assert 'errors="1"' in (folder / "a" / "junit.xml").read_text()  # XML has no number for it


# --- run: what it does --------------------------------------------------------------------------


def test_the_judge_is_asked_in_gang_order_with_the_options() -> None:
    """Ranks are opened once, for the first case, with implementation and device."""
    judge = FakeJudge()
    done = parity(
        "run", "w8-tp2-ep4-steps2-*", "w4-tp2-ep4-steps2-*", "--implementation", TRAINER,
        "--device", "cuda", "--out", "out", judge=judge,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert judge.opened == [(TRAINER, "cuda", "w4-tp2-ep4-steps2-adam-fp32", 32)]
    assert [name[:2] for name in judge.seen] == ["w4", "w4", "w8", "w8"]
    assert not judge.is_open


def test_a_failing_case_ends_with_its_rerun_command(folder: Path) -> None:
    """The command runs just that case, with what is not default."""
    judge = FakeJudge({"": scaled})
    done = parity("run", FOUR, "--implementation", TRAINER, judge=judge)
    assert (
        f"  rerun: parity run w4-tp2-ep4-gas2-aux-sgd-fp32 --implementation {TRAINER}\n"
        in done.stdout
    )
    (folder / "own case.toml").write_text('suite = "s"\n[[case]]\nshape.world = 2\n')
    done = parity("run", "own case.toml", judge=judge)
    assert "  rerun: parity run 'own case.toml::w2-sgd-fp32'\n" in done.stdout


def test_a_rerun_is_of_the_same_implementation(folder: Path) -> None:
    """What the case's file names needs no word, what was asked for in its place does."""
    judge = FakeJudge({"": scaled})
    text = f'suite = "s"\nimplementation = "{TRAINER}"\n[[case]]\nshape.world = 2\n'
    (folder / "own.toml").write_text(text)
    done = parity("run", "own.toml", judge=judge)
    assert "  rerun: parity run own.toml::w2-sgd-fp32\n" in done.stdout
    done = parity("run", "own.toml", "--implementation", "fold_impl", "--out", "out", judge=judge)
    command = "  rerun: parity run own.toml::w2-sgd-fp32 --implementation fold_impl\n"
    assert command in done.stdout
    assert command in parity("report", "out").stdout
    assert [opened[0] for opened in judge.opened] == [TRAINER, "fold_impl"]


@pytest.mark.parametrize("words", [["run", FOUR], ["explain", "w4-tp2-ep4-gas2-aux-sgd-fp32"]])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nope", "unknown implementation 'nope'; allowed: deepspeed, fold_impl, megatron_core, m"),
        ("nope.module:X", "No module named 'nope'"),
        ("json:X", "has no attribute 'X'"),
        ("json:loads", "lacks build, step"),
        (":X", "Empty module name"),
    ],
)
def test_an_implementation_is_looked_for_first(
    folder: Path, words: list[str], name: str, says: str
) -> None:
    """No rank starts and no directory is made for what cannot be found."""
    judge = FakeJudge()
    done = parity(*words, "--implementation", name, judge=judge)
    assert (done.exit_code, judge.opened, done.stdout) == (2, [], "")
    assert says in done.stderr
    assert not (folder / "reports").exists()


def test_a_case_is_explained_as_its_file_says(folder: Path) -> None:
    """`explain` runs the implementation of the case file, or what the run was of."""
    text = f'suite = "s"\nimplementation = "{TRAINER}"\n[[case]]\nshape.world = 2\n'
    (folder / "own.toml").write_text(text)
    judge = FakeJudge()
    assert parity("explain", "own.toml", judge=judge).exit_code == 0
    assert judge.opened[0][0] == TRAINER


def test_selections_write_their_rerun_command() -> None:
    """A folder given by the user is part of the command, as is the device."""
    selection = Selection(cases="my cases", device="cuda")
    assert selection.rerun("a") == "parity run a --cases 'my cases' --device cuda"


def test_rows_are_on_disk_case_by_case(folder: Path) -> None:
    """While a case runs, the rows of the one before it can be read."""
    on_disk: list[int] = []

    def look(case: Case) -> list[Row]:
        (path,) = (folder / "reports").glob("*/results.jsonl")
        on_disk.append(len(path.read_text().splitlines()))
        return passing(case)

    parity("run", FOUR, judge=FakeJudge({"": look}))
    assert on_disk == [0, 9, 18, 27]


def test_ctrl_c_leaves_a_report_and_can_be_resumed(folder: Path) -> None:
    """What has finished is kept, reported and linked; --resume does the rest, errors again."""
    judge = FakeJudge({"gas2-clip-sgd": interrupt, "gas2-clip-adam": die})
    done = parity("run", FOUR, "--implementation", TRAINER, judge=judge)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    latest = folder / "reports" / "latest"
    assert json.loads((latest / "run.json").read_text())["state"] == "interrupted"
    assert "1 of 1 cells errored" in (latest / "report.md").read_text()

    again = FakeJudge()
    done = parity("run", "--resume", str(latest), judge=again)
    assert done.exit_code == 0, done.output
    assert "4 of 4 cells passed" in done.stdout
    assert again.opened[0][0] == TRAINER
    assert sorted(again.seen) == sorted(
        f"w4-tp2-ep4-gas2-{what}-fp32" for what in ("clip-adam", "clip-sgd", "aux-adam", "aux-sgd")
    )
    run = json.loads((latest / "run.json").read_text())
    assert (run["state"], run["counts"]["pass"]) == ("finished", 4)

    nothing_left = FakeJudge()
    done = parity("run", "--resume", str(latest), judge=nothing_left)
    assert (done.exit_code, nothing_left.opened) == (0, [])


def test_sigterm_is_ctrl_c(folder: Path) -> None:
    """A job's time limit leaves a report behind, and the handler goes away again."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(case: Case) -> list[Row]:
        os.kill(os.getpid(), signal.SIGTERM)
        return passing(case)

    done = parity("run", FOUR, judge=FakeJudge({"clip-sgd": terminate}))
    assert done.exit_code == 130
    assert (folder / "reports" / "latest" / "report.md").is_file()
    assert signal.getsignal(signal.SIGTERM) == before


def test_run_json_says_where_and_how_long(folder: Path) -> None:
    """The record holds selection, command, versions, devices, counts and times."""
    parity("run", FOUR, judge=FakeJudge({"clip-sgd": scaled}))
    run = json.loads((folder / "reports" / "latest" / "run.json").read_text())
    assert run["selection"]["selectors"] == [FOUR]
    assert run["counts"] == {
        "cells": 4, "error": 0, "fail": 1, "leak": 0, "pass": 3, "skipped": 0, "rows": 36,
    }  # fmt: skip
    assert run["versions"]["torch"]
    assert run["devices"]["cores"] >= 1
    assert run["seconds"]["total"] >= run["seconds"]["cold"] > 0
    assert list(run["seconds"]["median_by_world"]) == ["4"]


def test_a_machine_whose_host_kept_the_cores_is_said_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, so that other formats stay whole, and in run.json; nothing on a quiet machine."""
    for share, said in ((0.6, True), (0.1, False)):
        monkeypatch.setattr(fingerprint.HostClock, "share", lambda _, share=share: share)
        done = parity("run", FOUR, "--out", f"kept-{said}", judge=FakeJudge())
        assert ("the host kept 60% of the cores' time during this run" in done.stderr) == said
        run = json.loads((folder / f"kept-{said}" / "run.json").read_text())
        assert run["seconds"]["stolen_share"] == share


def test_what_is_not_offered_is_said(folder: Path) -> None:
    """Optional members that an implementation lacks stand in run.json, report and terminal."""
    done = parity("run", FOUR, "--out", "a", judge=FakeJudge(absent=("replay", "grad_norm")))
    assert "not offered by fold_impl: grad_norm, replay\n" in done.stdout
    assert json.loads((folder / "a" / "run.json").read_text())["absent"] == ["grad_norm", "replay"]
    assert "- not offered by it: grad_norm, replay\n" in (folder / "a" / "report.md").read_text()
    done = parity("run", FOUR, "--out", "b", judge=FakeJudge())
    assert "not offered" not in done.stdout + (folder / "b" / "report.md").read_text()


def test_a_missing_package_is_named_where_it_is_needed(folder: Path) -> None:
    """Cases that do without it are judged; the others say what to install, and end with 3."""
    for name in ("deepspeed", "transformers"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (folder / f"{name}.py").write_text(text)
    shape = "[[case]]\nshape.world = 1\n"
    others = f'{shape}engine.name = "deepspeed"\n{shape}model.name = "mixtral"\n'
    (folder / "own.toml").write_text(f'suite = "s"\n{shape}{others}')
    done = subprocess.run(
        [sys.executable, "-m", "parity", "run", "own.toml", "--out", "out"], cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}, text=True,
        capture_output=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    rows = by_case(RunDirectory.open(folder / "out").rows())
    told = sorted((of[0].verdict, (of[0].reason or "").split("\n")[0]) for of in rows.values())
    assert told == [
        ("error", "the case needs the package deepspeed: pip install deepspeed"),
        ("error", "the case needs the package transformers: pip install 'foldparity[models]'"),
        ("pass", ""),
    ]


def test_out_names_the_directory_and_is_never_mixed(folder: Path) -> None:
    """--out is the run directory itself; a second run into it is refused."""
    assert parity("run", FOUR, "--out", "mine", judge=FakeJudge()).exit_code == 0
    assert sorted(p.name for p in (folder / "mine").iterdir()) == [
        "ctrf.json", "junit.xml", "report.html", "report.md", "results.jsonl", "run.json",
    ]  # fmt: skip
    assert not (folder / "reports").exists()
    done = parity("run", FOUR, "--out", "mine", judge=FakeJudge())
    assert (done.exit_code, "--resume mine" in done.stderr) == (2, True)


# --- run: formats -------------------------------------------------------------------------------


def test_json_is_one_document_on_stdout() -> None:
    """Another program reads the summary, the exit code and the failing rows."""
    done = parity("run", FOUR, "--format", "json", judge=FakeJudge({"clip-sgd": scaled}))
    found = json.loads(done.stdout)
    assert (found["exit_code"], found["counts"]["fail"]) == (1, 1)
    assert found["families"][0]["verdict"] == "fail"
    assert found["families"][0]["gradient_scale"] == 2.0
    (failure,) = found["failures"]
    assert failure["causes"] == ["tp"]
    assert failure["rows"][0]["worst"] == {"rank": 3, "expert": 1, "row": 17}


def test_md_prints_the_report(folder: Path) -> None:
    """--format md is report.md."""
    done = parity("run", FOUR, "--format", "md", judge=FakeJudge())
    assert done.stdout == (folder / "reports" / "latest" / "report.md").read_text()


def test_github_annotates_and_sums_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failing cells become annotations of one line, the report goes to the step summary."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    done = parity("run", FOUR, "--format", "github", judge=FakeJudge({"clip-sgd": scaled}))
    first, last = done.stdout.splitlines()
    assert first.startswith("::error title=w4-tp2-ep4-gas2-clip-sgd-fp32::FAIL w4")
    assert "%0A" in first
    assert last.startswith("1 of 4 cells failed")
    assert "# Parity report" in (folder / "summary.md").read_text()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are coloured on a terminal, unless NO_COLOR is set."""
    judge = FakeJudge()
    assert "\x1b[" in parity("run", FOUR, judge=judge, color=True).stdout
    assert "\x1b[" not in parity("run", FOUR, judge=judge).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in parity("run", FOUR, judge=judge, color=True).stdout


def test_quiet_says_nothing_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --quiet only results are printed, on a machine whose host keeps its cores, too."""
    said = "the host kept 32% of the cores' time"
    monkeypatch.setattr(fingerprint.HostClock, "note", lambda _: said)
    assert "kept 32%" in parity("run", FOUR, judge=FakeJudge()).stderr
    assert parity("run", FOUR, "--quiet", judge=FakeJudge()).stderr == ""


# --- the other commands -------------------------------------------------------------------------


def test_list_shows_every_case() -> None:
    """All suites by default, as a table or as JSON with the derived sizes."""
    done = parity("list", "--suite", "seed")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2 + 64
    listed = json.loads(parity("list", FOUR, "--format", "json").stdout)
    assert len(listed) == 4
    assert listed[0]["shape"]["tp"] == 2
    assert listed[0]["derived"] == {"stage_size": 4, "dp": 2, "edp": 1}


def test_show_resolves_a_case() -> None:
    """Every default, the derived sizes and both rank tables of world 8 tp4 ep2."""
    done = parity("show", "w8-tp4-ep2-steps2-sgd-fp32")
    assert "  model.hidden = 48\n" in done.stdout
    assert "derived: dp = 2, edp = 4" in done.stdout
    assert "    tp  0 1 2 3 | 4 5 6 7\n" in done.stdout
    assert "    edp 0 2 4 6 | 1 3 5 7\n" in done.stdout
    shown = json.loads(parity("show", "w8-tp4-ep2-steps2-sgd-fp32", "--format", "json").stdout)
    assert shown["groups"]["dense"]["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert shown["groups"]["expert"]["ep"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_show_matrix_counts_axes_and_pairs() -> None:
    """The 8 shapes of seed with 8 cells each; 4 axes of 8, 2, 2, 2 entries have 60 pairs."""
    done = parity("show", "--matrix", "--suite", "seed")
    assert "world = 4, tp = 2, ep = 4" in done.stdout
    assert "60 of 60 possible ones occur" in done.stdout
    (shown,) = json.loads(parity("show", "--matrix", "--suite", "seed", "--format", "json").stdout)
    assert {*shown["axes"]["shape"].values()} == {8}
    assert parity("show", "--matrix", "--suite", "none").exit_code == 2
    assert parity("show").exit_code == 2


def test_report_is_rebuilt_from_results(folder: Path) -> None:
    """report.md follows from results.jsonl alone, run.json or not; rebuilding is no verdict."""
    parity("run", FOUR, "--out", "mine", judge=FakeJudge({"clip-sgd": scaled}))
    before = (folder / "mine" / "report.md").read_text()
    (folder / "mine" / "report.md").unlink()
    done = parity("report", "mine")
    assert done.exit_code == 0
    assert "1 of 4 cells failed" in done.stdout
    assert (folder / "mine" / "report.md").read_text() == before
    (folder / "mine" / "run.json").unlink()
    assert "1 of 4 cells failed" in parity("report", "mine", "--format", "md").stdout


def test_schema_is_json_schema() -> None:
    """`parity schema` prints a valid schema."""
    jsonschema.Draft202012Validator.check_schema(json.loads(parity("schema").stdout))


def test_doctor_ends_with_3_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing extras are said, broken needs decide the exit code."""
    found = [doctor.Check("torch", True, "2.13"), doctor.Check("gpus", None, "none")]
    monkeypatch.setattr(doctor, "checks", lambda *_: iter(found))
    done = parity("doctor")
    assert (done.exit_code, "--  gpus             none" in done.stdout) == (0, True)
    found.append(doctor.Check("gloo", False, "missing"))
    done = parity("doctor", "--format", "json")
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (3, False)


def test_doctor_asks_about_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases and reports are found broken where they are; nothing is left behind."""
    monkeypatch.setattr(doctor, "_ranks", lambda: iter(()))
    good = {check.name: check for check in doctor.checks(None, tmp_path / "reports")}
    assert {"python", "torch", "gloo", "nccl", "cores", "gpus", "deepspeed"} <= set(good)
    assert good["python"].ok
    assert good["cases"].ok
    assert good["reports"].ok
    assert not (tmp_path / "reports").exists()
    (tmp_path / "file").touch()
    bad = {check.name: check.ok for check in doctor.checks(tmp_path / "no", tmp_path / "file/x")}
    assert (bad["cases"], bad["reports"]) == (False, False)


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    """Help and lists answer at once, from `python -m parity` too."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['parity', *{arguments!r}]\n"
        "try: runpy.run_module('parity', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'pandas', 'rich', 'deepspeed'} & {*sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
