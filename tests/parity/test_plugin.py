"""The pytest plugin, in pytest processes of its own, with a judge that needs no ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity.case_files import select

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFTEST = """
import sys
import parity.session
from parity.store import Row
from tests.parity.example_rows import FakeJudge, scaled

def hang(case):
    detail = {"traceback": "File rank.py, line 7"}
    return [Row.of_case(case, "fold_impl", verdict="error", reason="rank 3 hung", detail=detail)]

def skip(case):
    return [Row.of_case(case, "fold_impl", verdict="skipped", reason="needs a GPU")]

judge = FakeJudge({"w2-": scaled, "w3-": hang, "w5-": skip})
parity.session.open_judge = judge.open

def pytest_unconfigure(config):
    assert not judge.is_open
"""
CASES = 'suite = "{}"\n[axes]\nshape.world = {}\n'
TRAINER = "examples.two_rank_mlp:TwoRankMLP"
TEST = "def test_own():\n    pass\n"


@pytest.fixture
def folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give a project with one test, a folder of cases, and another TOML file in it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.mkdir("tests").joinpath("test_own.py").write_text(TEST)
    cases = pytester.mkdir("cases")
    cases.joinpath("good.toml").write_text(CASES.format("good", [1, 4]))
    cases.joinpath("mixed.toml").write_text(CASES.format("mixed", [1, 2, 3, 5]))
    cases.joinpath("other.toml").write_text("[tool]\nkey = 1\n")
    return pytester


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest with the plugin loaded once, installed or not."""
    plugin = ["-p", "no:parity", "-p", "parity.plugin", "-p", "no:cacheprovider"]
    return pytester.runpytest_subprocess(*plugin, *arguments)


@pytest.mark.parametrize("arguments", [[], ["."], ["-n", "1"]])
def test_nothing_is_collected_unasked(folder: pytest.Pytester, arguments: list[str]) -> None:
    """Without an option or a path, a project with a folder `cases` is left alone."""
    done = run(folder, *arguments)
    done.assert_outcomes(passed=1)
    assert not (folder.path / "reports").exists()
    done.stdout.no_fnmatch_line("*= parity =*")


def test_torch_stays_out_where_nothing_is_selected(folder: pytest.Pytester) -> None:
    """The plugin costs a foreign project no import of torch, click or pydantic."""
    folder.makeconftest(
        "import sys\n"
        "def pytest_sessionfinish():\n"
        "    assert not {'torch', 'click', 'pydantic', 'parity.case'} & {*sys.modules}\n"
    )
    run(folder, "tests").assert_outcomes(passed=1)


def test_a_suite_is_collected_besides_the_tests(folder: pytest.Pytester) -> None:
    """--parity-suite adds its cases, one item each, and writes a run directory."""
    done = run(folder, "tests", "--parity-suite", "good", "-v")
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(["*cases/good.toml::w4-sgd-fp32 PASSED*"])
    done.stdout.fnmatch_lines(["*= parity =*", "2 of 2 cells passed (18 rows).", "report: *"])
    latest = folder.path / "reports" / "latest"
    assert len((latest / "results.jsonl").read_text().splitlines()) == 18
    assert json.loads((latest / "run.json").read_text())["state"] == "finished"
    assert "2 of 2 cells passed" in (latest / "report.md").read_text()


def test_the_suite_may_stand_in_the_configuration(folder: pytest.Pytester) -> None:
    """A project that always wants its cases says so once."""
    folder.makeini("[pytest]\nparity_suite = good\ntestpaths = tests\n")
    run(folder).assert_outcomes(passed=3)


def test_an_unknown_folder_of_cases_is_a_usage_error(folder: pytest.Pytester) -> None:
    """A suite that no file holds is refused with those there are, whatever is collected."""
    for arguments in (["cases"], ["tests"], ["tests", "-n", "1"]):
        done = run(folder, *arguments, "--parity-suite", "absent")
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        done.stderr.fnmatch_lines(["ERROR: unknown suite 'absent'; allowed: good, mixed"])


@pytest.mark.parametrize(
    ("path", "passed"),
    [("cases/good.toml", 2), ("cases/good.toml::w4-sgd-fp32", 1), ("cases", 3)],
)
def test_paths_of_cases_are_enough(folder: pytest.Pytester, path: str, passed: int) -> None:
    """A file, one id in it, or the folder `cases` is collected when named."""
    done = run(folder, path)
    assert done.parseoutcomes()["passed"] == passed


def test_a_case_file_may_lie_anywhere(folder: pytest.Pytester) -> None:
    """A file named explicitly need not be in a folder `cases`; its rerun names it."""
    folder.path.joinpath("own.toml").write_text(CASES.format("own", [2]))
    done = run(folder, "own.toml")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*rerun: parity run own.toml::w2-sgd-fp32"])


def test_failures_show_findings_alone(folder: pytest.Pytester) -> None:
    """A failing item shows rows, causes, the rank's traceback and the rerun, none of ours."""
    done = run(folder, "cases/mixed.toml", "-rs")
    done.assert_outcomes(passed=1, failed=2, skipped=1)
    done.stdout.fnmatch_lines(
        [
            "FAIL w2-sgd-fp32: expert gradient x2.000 = tp",
            "*gradient*expert*layers.0.expert*folded*2.000000*rank 3 expert 1 row 17*fail",
            "*causes: tp",
            "*rerun: parity run w2-sgd-fp32",
            "ERROR w3-sgd-fp32",
            "*rank 3 hung",
            "*File rank.py, line 7",
            "SKIPPED*cases/mixed.toml:1: needs a GPU",
        ],
    )
    done.stdout.fnmatch_lines(["1 of 4 cells failed: *1 of 4 cells errored: rank 3 hung. 1 skip*"])
    done.stdout.no_fnmatch_line("*plugin.py*")
    assert done.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("text", ['suite = "s"\n[base', 'suite = "s"\n[[case]]\nshape.wrld = 1'])
def test_a_bad_case_file_is_one_message(folder: pytest.Pytester, text: str) -> None:
    """A refused file is a collection error of one line, no traceback."""
    folder.path.joinpath("cases", "bad.toml").write_text(text)
    done = run(folder, "cases/bad.toml")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["cases/bad.toml: *"])
    done.stdout.no_fnmatch_line("*Traceback*")
    done.stdout.no_fnmatch_line("*case.py*")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_rows_travel_to_the_one_writer(folder: pytest.Pytester, workers: str) -> None:
    """Under xdist every row arrives once, in one run directory named by --parity-out."""
    done = run(folder, "cases/mixed.toml", "cases/good.toml", "-n", workers, "--parity-out", "out")
    done.assert_outcomes(passed=3, failed=2, skipped=1)
    results = (folder.path / "out" / "results.jsonl").read_text()
    rows = [json.loads(line) for line in results.splitlines()]
    assert len(rows) == 9 + 9 + 1 + 1 + 9 + 9
    # both suites hold w1: one cell, run twice, as asked for
    assert {row["case"] for row in rows} == {f"w{n}-sgd-fp32" for n in (1, 2, 3, 4, 5)}
    assert not (folder.path / "reports").exists()
    done.stdout.fnmatch_lines(["FAIL w2-sgd-fp32: expert*", "*causes: tp"])
    done.stdout.fnmatch_lines(["report: out/report.md"])


def test_the_implementation_reaches_the_judge(folder: pytest.Pytester) -> None:
    """--parity-implementation is what is judged, and what the rerun command says."""
    done = run(folder, "cases/mixed.toml", "--parity-implementation", TRAINER)
    done.stdout.fnmatch_lines([f"*rerun: parity run w2-sgd-fp32 --implementation {TRAINER}"])
    run_json = json.loads((folder.path / "reports" / "latest" / "run.json").read_text())
    assert run_json["selection"]["implementation"] == TRAINER


def test_what_cannot_work_is_refused_at_once(folder: pytest.Pytester) -> None:
    """A directory with results, and an implementation that is none, before anything is run."""
    run(folder, "cases/good.toml", "--parity-out", "out").assert_outcomes(passed=2)
    done = run(folder, "tests", "--parity-out", "out")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: run directory out: holds results already, go on with *"])
    done = run(folder, "cases", "--parity-implementation", "nope")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: unknown implementation 'nope'; allowed: deepspeed, *"])
    folder.path.joinpath("cases", "good.toml").write_text(
        'implementation = "nope"\n' + CASES.format("good", [1, 4])
    )
    done = run(folder, "cases/good.toml")
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["unknown implementation 'nope'; allowed: *"])


def test_a_place_that_cannot_be_written_is_refused_before_any_case(
    folder: pytest.Pytester,
) -> None:
    """Not after the first one has run."""
    folder.path.joinpath("taken").touch()
    done = run(folder, "cases/good.toml", "--parity-out", "taken/out")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: cannot write taken/out: Not a directory"])


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("arguments", "selectors"),
    [
        (["cases/good.toml"], ["w1-sgd-fp32", "w4-sgd-fp32"]),
        (["--parity-suite", "good", "tests"], ["w1-sgd-fp32", "w4-sgd-fp32"]),
        (["cases/good.toml", "-k", "w4"], ["w4-sgd-fp32"]),
        (["own.toml"], ["own.toml::w1-sgd-fp32", "own.toml::w4-sgd-fp32"]),
    ],
)
def test_the_run_can_be_gone_on_with(
    folder: pytest.Pytester, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], selectors: list[str], workers: str,
) -> None:  # fmt: skip
    """run.json names its cases and what was judged, so that --resume does what was lost."""
    named = "fold_impl.adapter:FoldImplementation"
    about = f'implementation = "{named}"\n'
    for name in ("cases/good.toml", "own.toml"):
        folder.path.joinpath(name).write_text(about + CASES.format("good", [1, 4]))
    run(folder, *arguments, "-n", workers)
    latest = folder.path / "reports" / "latest"
    selection = json.loads((latest / "run.json").read_text())["selection"]
    assert selection["selectors"] == selectors
    assert (selection["implementation"], selection["is_given"]) == (named, False)
    monkeypatch.chdir(folder.path)
    chosen = select(selection["selectors"], suite=selection["suite"])  # as --resume does
    assert [case.id for case in chosen] == [name.rpartition("::")[2] for name in selectors]
