"""Known findings: what a list accounts for, what stays new beside it, what no longer shows."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result

from parity import cli, known
from parity.case import Case
from parity.case_files import load_folder
from parity.errors import CaseError
from parity.implementation import FAMILIES
from parity.known import Assessment, assess, load
from parity.report import html, markdown, tables
from parity.report.cells import cells
from parity.session import exit_code_of
from parity.store import Row
from tests.parity.example_rows import FakeJudge, passing, row, scaled
from tests.parity.example_runs import RUN, case_of, errored, rerun, skipped
from tests.parity.test_plugin import CASES, CONFTEST, REPOSITORY

pytest_plugins = ["pytester"]

FOUR, EIGHT = case_of(4, 2, 4), case_of(8, 2, 4)
ENTRY: Mapping[str, Any] = {
    "finding": "0042", "implementation": "fold_impl", "versions": "==1.2", "cases": ["w4-*"],
    "quantities": ["gradient", "update"], "families": ["expert"],
}  # fmt: skip
NOW: Mapping[str, str | None] = {"fold_impl": "1.2", "python": "3.12"}


def listed(folder: Path, *entries: Mapping[str, Any]) -> Path:
    """Write a list; JSON's values are TOML's."""
    told = ["[[known]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in entry.items())
            for entry in entries]  # fmt: skip
    path = folder / "known.toml"
    path.write_text("\n".join(told))
    return path


def judged(
    folder: Path, rows: Sequence[Row], *entries: Mapping[str, Any],
    versions: Mapping[str, str | None] = NOW,
) -> Assessment:  # fmt: skip
    """Hold rows against a list."""
    return assess(rows, load(listed(folder, *(entries or (ENTRY,)))), versions)


# --- what is known, what is new -----------------------------------------------------------------


def test_a_cell_that_fails_only_as_its_finding_says_is_known(tmp_path: Path) -> None:
    """Its verdict stays fail; only with fail_on new it does not count."""
    rows = [*scaled(FOUR), *passing(EIGHT)]
    found = judged(tmp_path, rows)
    assert found.marks == {FOUR.id: ("0042",)}
    assert found.is_known(FOUR.id)
    assert not found.is_known(EIGHT.id)
    assert (exit_code_of(rows, found), exit_code_of(rows, found, "new")) == (1, 0)
    assert exit_code_of(scaled(FOUR), found, "new") == 0


def test_a_new_failure_is_not_hidden_by_a_known_one(tmp_path: Path) -> None:
    """In another cell, or in the same cell in another family, quantity or run."""
    rows = [*scaled(FOUR), *scaled(EIGHT)]
    found = judged(tmp_path, rows)
    assert (found.is_known(FOUR.id), found.is_known(EIGHT.id)) == (True, False)
    assert exit_code_of(rows, found, "new") == 1
    plain = next(r for r in passing(FOUR) if r.shape["world"] == 2)  # the baseline's own
    for other in (
        row(FOUR, family="router", error=1.0, verdict="fail"),
        row(FOUR, "replica", "expert", error=3.0, verdict="fail"),
        row(FOUR, "grad_norm", None, error=1.0, verdict="fail"),
        replace(plain, verdict="fail"),
    ):
        rows = [*scaled(FOUR), other]
        found = judged(tmp_path, rows)
        assert found.marks == {FOUR.id: ("0042", "new")}
        assert not found.is_known(FOUR.id)
        assert exit_code_of(rows, found, "new") == 1
    named = {**ENTRY, "families": [], "runs": ["folded", "baseline"], "finding": "0043"}
    assert judged(tmp_path, rows, ENTRY, named).is_known(FOUR.id)


def test_a_row_about_the_whole_model_needs_its_quantity_only(tmp_path: Path) -> None:
    """A norm has no family: an entry that names families accounts for it by its quantity."""
    rows = [*scaled(FOUR), row(FOUR, "grad_norm", None, error=1.0, verdict="fail")]
    both = {**ENTRY, "quantities": ["gradient", "update", "grad_norm"]}
    assert judged(tmp_path, rows, both).is_known(FOUR.id)


def test_an_error_is_known_by_its_words(tmp_path: Path) -> None:
    """Another crash of the same cell is new, and quantities say nothing about a crash."""
    entry = {k: v for k, v in ENTRY.items() if k not in ("quantities", "families")}
    entry |= {"error": "hung in all_reduce"}
    assert judged(tmp_path, errored(FOUR), entry).is_known(FOUR.id)
    for rows in (errored(FOUR, "rank 1 died of SIGSEGV"), scaled(FOUR)):
        assert judged(tmp_path, rows, entry).marks == {}
    assert judged(tmp_path, errored(FOUR)).marks == {}
    found = judged(tmp_path, errored(FOUR), entry)
    assert (exit_code_of(errored(FOUR), found), exit_code_of(errored(FOUR), found, "new")) == (3, 0)


@pytest.mark.parametrize(
    "change",
    [{"implementation": "deepspeed"}, {"cases": ["w8-*"]}, {"except": ["*-sgd-*"]},
     {"versions": "!=1.2"}, {"package": "absent"}],
)  # fmt: skip
def test_what_an_entry_is_not_about_stays_new(tmp_path: Path, change: dict[str, Any]) -> None:
    """Another implementation, another cell, an exception, another version, one not installed."""
    assert judged(tmp_path, scaled(FOUR), {**ENTRY, **change}).marks == {}
    assert judged(tmp_path, scaled(FOUR), ENTRY).marks


# --- notes --------------------------------------------------------------------------------------


def test_a_known_cell_that_passes_becomes_a_note(tmp_path: Path) -> None:
    """Within the range: in all of its cells, or in some; a skipped or errored cell says nothing."""
    other = case_of(4, 4, 4)
    found = judged(tmp_path, passing(FOUR))
    assert found.notes == (f"0042 does not show in fold_impl 1.2: {FOUR.id}. Is it fixed?",)
    found = judged(tmp_path, [*scaled(FOUR), *passing(other)])
    assert found.notes == (f"0042 does not show in 1 of 2 cells: {other.id}",)
    for rows in (skipped(FOUR), errored(FOUR), passing(EIGHT), scaled(FOUR)):
        assert judged(tmp_path, rows).notes == ()


def test_a_version_outside_the_range_becomes_a_note(tmp_path: Path) -> None:
    """Where the finding shows it is new; where it does not, a release has fixed it."""
    later = {"fold_impl": "1.3"}
    found = judged(tmp_path, scaled(FOUR), versions=later)
    assert found.notes == (f"0042, known of ==1.2, shows in fold_impl 1.3 too: {FOUR.id}",)
    assert exit_code_of(scaled(FOUR), found, "new") == 1
    found = judged(tmp_path, passing(FOUR), versions=later)
    assert found.notes == (f"0042, known of ==1.2, does not show in fold_impl 1.3: {FOUR.id}",)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"versions": "0.19.8"}, 'known[0].versions: value not allowed (got \'0.19.8\'); '
         'allowed: version specifiers such as "==0.19.8"'),
        ({"quantities": ["gradients"]}, "known[0].quantities[0]: value not allowed (got 'gradients"
         "'); allowed: 'routing', 'loss', 'gradient'"),
        ({"families": ["experts"]}, "known[0].families[0]: value not allowed (got 'experts')"),
        ({"runs": []}, "known[0].runs: value not allowed (got [])"),
        ({"finding": 42}, "known[0].finding: value not allowed (got 42); allowed: a valid string"),
        ({"case": ["w4"]}, "known[0].case: unknown key (got ['w4']); allowed: finding, implementa"),
        ({"quantities": [], "families": []}, "allowed: quantities of the failing rows, or error"),
        ({"quantities": [], "error": "x"}, "allowed: families only beside quantities"),
        ({"cases": []}, "known[0].cases: value not allowed (got [])"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused_by_file_key_and_value(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    """The message says where, what, and what would do."""
    path = listed(tmp_path, {**ENTRY, **change})
    with pytest.raises(CaseError) as problem:
        load(path)
    assert f"{path}: known[0]" in str(problem.value)
    assert says in str(problem.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[[known", "malformed TOML"), ('known = "x"', "known: value not allowed"),
     ("[[knwon]]", "knwon: unknown key"),
     ('[[known]]\nfinding = "1"', "known[0].implementation: required key is missing"),
     (None, "cannot be read")],
)  # fmt: skip
def test_a_bad_file_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, says: str
) -> None:
    """Before any rank, without a run directory."""
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("known.toml").write_text(text)
    judge = FakeJudge()
    done = parity("run", "w4-tp2-ep4-gas2-aux-*", "--known", "known.toml", judge=judge)
    assert (done.exit_code, judge.opened) == (2, [])
    assert f"parity: known.toml: {says}" in done.stderr
    assert not Path("reports").exists()


def test_the_names_are_those_of_the_rows() -> None:
    """Two spellings of one vocabulary: the Protocol's would bring torch along."""
    assert get_args(known.Family) == FAMILIES
    assert get_args(known.Quantity) == tables.ORDER


def test_every_entry_that_is_shipped_is_about_a_case_and_has_its_page() -> None:
    """A glob that matches nothing, or a finding without a page, would be dead."""
    shipped = load()
    cells = load_folder(REPOSITORY / "cases")
    assert len(shipped.entries) > 10
    for entry in shipped.entries:
        ids = {case.id for case in cells if case.implementation == entry.implementation}
        for pattern in (*entry.cases, *entry.exceptions):
            assert fnmatch.filter(ids, pattern), f"{entry.finding}: {pattern}"
    assert set(shipped.titles) == {entry.finding for entry in shipped.entries}
    assert shipped.titles["0003"].startswith("ZeRO-0 with experts: ")


# --- how it is shown ----------------------------------------------------------------------------


def parity(*arguments: str, judge: FakeJudge) -> Result:
    """Run a command with a judge that needs no ranks."""
    return CliRunner().invoke(cli.main, arguments, obj=judge.open)


def half(case: Case) -> list[Row]:
    """Fail as known and in the router besides."""
    return [*scaled(case), row(case, "update", "router", error=1.0, verdict="fail")]


@pytest.mark.parametrize(
    ("answers", "options", "code"),
    [({"aux-sgd": scaled}, [], 1), ({"aux-sgd": scaled}, ["--fail-on", "new"], 0),
     ({"aux-sgd": half}, ["--fail-on", "new"], 1),
     ({"aux-sgd": scaled, "aux-adam": scaled}, ["--fail-on", "new"], 1)],
)  # fmt: skip
def test_the_exit_code_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], options: list[str],
    code: int,
) -> None:  # fmt: skip
    """0 only with --fail-on new, and only where nothing is new."""
    monkeypatch.chdir(tmp_path)
    mine = {**ENTRY, "package": "foldparity", "versions": ">=0", "cases": ["*-sgd-*"]}
    path = str(listed(tmp_path, mine))
    done = parity("run", "w4-tp2-ep4-gas2-aux-*", "--known", path, *options,
                  judge=FakeJudge(answers))  # fmt: skip
    assert done.exit_code == code, done.output
    sgd = "w4-tp2-ep4-gas2-aux-sgd-fp32"
    run = json.loads(Path("reports/latest/run.json").read_text())
    assert run["known"]["cells"][sgd] == ["0042"] + ["new"] * (answers["aux-sgd"] is half)
    assert run["versions"]["foldparity"]
    again = parity("report", "reports/latest", "--known", path, judge=FakeJudge())
    assert again.stdout.partition("\nreport: ")[0] == done.stdout.partition("\nreport: ")[0]
    assert "0042" not in parity("report", "reports/latest", judge=FakeJudge()).stdout


def test_the_terminal_tells_known_from_new(tmp_path: Path) -> None:
    """New cells in full, known ones on one line, a column of findings, both in the headline."""
    rows = [*scaled(FOUR), *half(EIGHT)]
    both = {**ENTRY, "cases": ["*"]}
    (tmp_path / "0042-factor.md").write_text("# 0042: A factor of tp\n")
    found = judged(tmp_path, rows, both)
    said = tables.terminal(rows, rerun, known=found)
    assert f"known 0042 (A factor of tp): {FOUR.id}\n" in f"{said}\n"
    assert f"FAIL (new, beside known: 0042) {EIGHT.id}: expert gradient x2.000 = tp" in said
    assert f"FAIL (known: 0042) {FOUR.id}" not in said
    assert said.endswith("2 of 2 cells failed: 1 as known (0042); expert gradient x2.000 = tp on "
                         "1 shape.")  # fmt: skip
    lines = {(x["shape"], x["family"]): x["finding"] for x in tables.family_lines(rows, found)}
    assert lines["w4 tp2 ep4", "expert"] == "0042"
    assert lines["w8 tp2 ep4", "router"] == "new"
    assert "finding\n" in said
    assert "finding\n" not in tables.terminal(rows, rerun)


def test_the_reports_tell_known_from_new(tmp_path: Path) -> None:
    """report.md: new cells first, marks in headings; report.html: marks as data, notes as text."""
    rows = [*scaled(FOUR), *scaled(EIGHT), *passing(case_of(4, 4, 4))]
    found = judged(tmp_path, rows)
    text = markdown.render(rows, RUN, rerun, found)
    assert f"### fail (known: 0042): `{FOUR.id}`" in text
    assert text.index(f"### fail: `{EIGHT.id}`") < text.index("### fail (known")
    assert "## Known findings\n\n- known 0042: " in text
    assert "- note: 0042 does not show in 1 of 2 cells" in text
    data = html.page_data(cells(rows), rerun, found)
    marks = {cell[0]: [data["words"]["finding"][i] for i in cell[15]] for cell in data["cells"]}
    assert (marks[FOUR.id], marks[EIGHT.id]) == (["0042"], [])
    page = html.render(cells(rows), RUN, rerun, "headline", found)
    assert "<b>1</b> of them known" in page
    assert '<p class="note">0042 does not show in 1 of 2 cells' in page


def test_a_known_case_is_an_expected_failure_of_pytest(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--parity-fail-on new: xfailed with the finding's number; else a failure that says so."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makeconftest(CONFTEST)
    pytester.mkdir("cases").joinpath("own.toml").write_text(CASES.format("own", [2, 4]))
    mine = {**ENTRY, "package": "foldparity", "versions": "", "cases": ["w2-*"]}
    path = listed(pytester.path, mine)
    plugin = ["-p", "no:parity", "-p", "parity.plugin", "-rx", "cases", f"--parity-known={path}"]
    done = pytester.runpytest_subprocess(*plugin, "--parity-fail-on=new")
    done.assert_outcomes(passed=1, xfailed=1)
    done.stdout.fnmatch_lines(["1 of 2 cells failed: 1 as known (0042).",
                               "XFAIL *w2-sgd-fp32 - known: 0042"])  # fmt: skip
    done = pytester.runpytest_subprocess(*plugin)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["FAIL (known: 0042) w2-sgd-fp32: expert gradient x2.000 = tp"])
    path.write_text("[[known")
    done = pytester.runpytest_subprocess(*plugin)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*known.toml: malformed TOML*"])
