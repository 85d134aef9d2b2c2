"""pytest's own options on cases, in a foreign repository that only has the plugin installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.test_plugin import CASES, CONFTEST, REPOSITORY

pytest_plugins = ["pytester"]


@pytest.fixture
def foreign(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give a project with strict markers and two cases of its own, one of them failing."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\naddopts = --strict-markers\nparity_suite = own\n")
    pytester.mkdir("cases").joinpath("own.toml").write_text(CASES.format("own", [2, 4]))
    pytester.makepyfile(test_other="def test_other():\n    pass\n")
    return pytester


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest with the plugin loaded once, installed or not."""
    plugin = ["-p", "no:parity", "-p", "parity.plugin"]
    return pytester.runpytest_subprocess(*plugin, *arguments)


def test_two_cases_of_its_own(foreign: pytest.Pytester) -> None:
    """The failing one shows its table, cause and command; the summary has headline and page."""
    done = run(foreign, "cases", "test_other.py")
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines(
        [
            "FAIL w2-sgd-fp32: expert gradient x2.000 = tp",
            "*quantity*family*tensor*scale*error*allowed*",
            "*causes: tp",
            "*rerun: parity run w2-sgd-fp32",
            "*= parity =*",
            "1 of 2 cells failed: expert gradient x2.000 = tp on 1 shape.",
            "report: *report.md",
            "page: *report.html",
        ]
    )
    done.stdout.no_fnmatch_line("*session.py*")
    latest = Path(foreign.path / "reports" / "latest")
    assert "x2.000 = tp" in (latest / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "outcomes"),
    [
        (["-m", "parity"], {"passed": 1, "failed": 1, "deselected": 1}),
        (["-m", "not parity"], {"passed": 1, "deselected": 2}),
        (["-k", "w4"], {"passed": 1, "deselected": 2}),
        (["-k", "own and sgd"], {"passed": 1, "failed": 1, "deselected": 1}),
        (["-k", "adam"], {"deselected": 3}),
        (["-x"], {"failed": 1}),
    ],
)
def test_cases_are_chosen_as_tests_are(
    foreign: pytest.Pytester, arguments: list[str], outcomes: dict[str, int]
) -> None:
    """-m, -k (id, suite, engine, optimizer) and -x work as on any test."""
    done = run(foreign, *arguments, "cases", "test_other.py")
    assert done.parseoutcomes() == outcomes


def test_the_last_failure_runs_alone(foreign: pytest.Pytester) -> None:
    """--lf knows the failing case again."""
    run(foreign, "cases", "test_other.py")
    done = run(foreign, "--lf", "cases", "test_other.py")
    assert done.parseoutcomes()["failed"] == 1
    assert "passed" not in done.parseoutcomes()
