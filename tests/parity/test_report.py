"""Tables, headline and report.md."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from parity.case import Case
from parity.case_files import select
from parity.report import markdown, tables
from parity.store import Row
from tests.parity.example_rows import THRESHOLD, passing, row, scaled

CASES = Path(__file__).resolve().parents[2] / "cases"


def rerun(case: str) -> str:
    """Stand in for the command that runs a case again."""
    return f"parity run {case}"


@pytest.fixture
def cases() -> list[Case]:
    """Give two cases of one shape and optimizer, and one of another shape."""
    ids = ["w4-tp2-ep4-steps2-sgd-fp32", "w4-tp2-ep4-gas2-aux-sgd-fp32", "w8-tp4-ep2-gas2-clip-*"]
    return select(ids, folder=CASES)[:3]


def test_lines_are_shape_by_optimizer_by_family(cases: list[Case]) -> None:
    """Cases of one shape and optimizer share a line; their worst numbers show."""
    first, second, other = cases
    rows = [*passing(first), *passing(second), *passing(other)]
    rows[2] = replace(rows[2], scale=0.999999, error=1.1e-6)
    rows.append(row(second, scale=1.0000005, error=5e-7, against="baseline"))
    lines = tables.family_lines(rows)
    assert [(x["shape"], x["family"], x["cases"]) for x in lines] == [
        ("w4 tp2 ep4", "router", 2),
        ("w4 tp2 ep4", "expert", 2),
        ("w8 tp4 ep2", "router", 1),
        ("w8 tp4 ep2", "expert", 1),
    ]
    router = lines[0]
    assert (router["gradient_scale"], router["gradient_error"]) == (0.999999, 1.1e-6)
    assert (router["threshold"], router["replica"], router["verdict"]) == (THRESHOLD, 0.0, "pass")
    assert router["update_scale"] is None
    assert lines[1]["update_scale"] == 1.0


def test_failing_lines_come_first(cases: list[Case]) -> None:
    """A failure is not looked for between passes, and errors precede it."""
    first, _, other = cases
    errored = Row.of_case(other, "fold_impl", verdict="error", reason="rank 2 died")
    lines = tables.family_lines([*passing(first), *scaled(other), errored])
    assert [(x["shape"], x["family"], x["verdict"]) for x in lines[:3]] == [
        ("w8 tp4 ep2", "-", "error"),
        ("w8 tp4 ep2", "expert", "fail"),
        ("w4 tp2 ep4", "router", "pass"),
    ]
    assert lines[1]["gradient_scale"] == 2.0


def test_a_failing_baseline_has_its_own_line(cases: list[Case]) -> None:
    """The baseline's own run shows only where it fails, under the case's shape."""
    good = passing(cases[0])
    assert {x["shape"] for x in tables.family_lines(good)} == {"w4 tp2 ep4"}
    bad = [replace(r, verdict="fail") if r.shape["world"] == 2 else r for r in good]
    assert tables.family_lines(bad)[0]["shape"] == "w4 tp2 ep4 (baseline)"


def test_the_update_scale_is_the_one_a_user_meets(cases: list[Case]) -> None:
    """The end-to-end scale of an update stands in the line, what was skipped does not."""
    update = row(cases[0], "update", scale=1.0, detail={"end_to_end_scale": 1.01})
    skipped = replace(
        update, verdict="skipped", reason="below resolution", error=0.5,
        detail={"end_to_end_scale": 0.25},
    )  # fmt: skip
    (line,) = tables.family_lines([update, skipped])
    assert (line["update_scale"], line["update_error"], line["verdict"]) == (1.01, 1e-7, "pass")


def test_whole_model_lines(cases: list[Case]) -> None:
    """Routing differences, loss and norm have a table of their own."""
    rows = passing(cases[0])
    rows[0] = replace(rows[0], error=3.0, verdict="fail")
    (line,) = tables.model_lines(rows)
    assert (line["routing"], line["loss_error"], line["norm_scale"]) == (3.0, 1e-7, 1.0)
    assert line["verdict"] == "fail"


@pytest.mark.parametrize(
    ("scales", "worst"),
    [
        ([1.0, 0.5, 1.9], 0.5),
        ([1.0, 2.1, 0.5], 2.1),
        ([1e6, -1.0], -1.0),
        ([1e6, 0.0], 0.0),
        ([None, math.nan, 1.0], 1.0),
        ([None], None),
    ],
)
def test_the_worst_scale_is_farthest_as_a_factor(
    scales: list[float | None], worst: float | None
) -> None:
    """A half is as far from one as a two; a sign or a zero is farther than any factor."""
    assert tables.worst_scale(scales) == worst


def test_the_headline_says_what_and_how_often(cases: list[Case]) -> None:
    """One sentence: cells, the first wrong quantity of each, its factor, cause and shapes."""
    first, second, other = cases
    assert tables.headline([*passing(first), *passing(second)]) == "2 of 2 cells passed (18 rows)."
    rows = [*scaled(first), *passing(second), *scaled(other)]
    assert tables.headline(rows) == (
        "2 of 3 cells failed: expert gradient x2.000 = tp on 2 shapes."
    )
    assert tables.headline([]) == "No cell was run."


def test_the_headline_tells_errors_and_skips(cases: list[Case]) -> None:
    """An errored cell is not called failed, and skips are counted."""
    first, second, _ = cases
    rows = [
        Row.of_case(first, "fold_impl", verdict="error", reason="rank 3 hung.\nmore"),
        Row.of_case(second, "fold_impl", verdict="skipped", reason="no GPU"),
    ]
    assert tables.headline(rows) == "1 of 2 cells errored: rank 3 hung. 1 skipped."


def test_a_leak_is_named(cases: list[Case]) -> None:
    """Lost precision is a finding of its own kind."""
    said = tables.headline([row(cases[0], verdict="leak", error=1e-4)])
    assert said == "1 of 1 cells failed: router gradient leaks precision on 1 shape."


def test_failures_start_with_what_was_wrong_first(cases: list[Case]) -> None:
    """Wrong routing explains wrong gradients, so it stands before them; the worst row is kept."""
    case = cases[0]
    rows = [
        row(case, "update", verdict="fail", error=9.0),
        row(case, "gradient", verdict="fail", error=0.1, tensor="mild"),
        row(case, "gradient", verdict="fail", error=0.2, tensor="worst", causes=("tp",)),
        row(case, "routing", None, verdict="fail", error=2.0),
    ]
    (failure,) = tables.failures(rows, rerun)
    assert [r.quantity for r in failure.rows] == ["routing", "gradient", "update"]
    assert failure.rows[1].tensor == "worst"
    assert (failure.causes, failure.rerun) == (("tp",), f"parity run {case.id}")


def test_a_block_ends_with_the_command(cases: list[Case]) -> None:
    """A failing case shows tensor, place and causes, and ends with how to run it again."""
    (failure,) = tables.failures(scaled(cases[0]), rerun)
    said = tables.block(failure)
    for part in ("layers.0.expert", "2.000000", "rank 3 expert 1 row 17", "causes: tp"):
        assert part in said
    assert said.splitlines()[-1].strip() == f"rerun: parity run {cases[0].id}"


def test_a_block_shows_the_traceback_of_the_rank_once(cases: list[Case]) -> None:
    """The rank's own traceback is shown, but not twice where the reason holds it."""
    detail = {"traceback": "Traceback: here\n  line 3"}
    apart = Row.of_case(cases[0], "x", verdict="error", reason="rank 1 raised", detail=detail)
    within = Row.of_case(
        cases[0], "x", verdict="error", reason=f"rank 1 raised\n{detail['traceback']}",
        detail=detail,
    )  # fmt: skip
    for errored in (apart, within):
        (failure,) = tables.failures([errored], rerun)
        assert tables.block(failure).count("line 3") == 1


def test_the_terminal_ends_with_the_headline(cases: list[Case]) -> None:
    """The last line is the sentence one looks for; verdicts are painted."""
    rows = scaled(cases[0])
    said = tables.terminal(rows, rerun, paint=str.upper)
    assert said.splitlines()[-1] == tables.headline(rows)
    assert "FAIL" in said
    limited = tables.terminal([*rows, *scaled(cases[1])], rerun, most=1)
    assert "and 1 more failing cases" in limited


def test_skips_are_said_once_per_reason(cases: list[Case]) -> None:
    """Nothing is skipped silently, and nothing is said sixty times."""
    rows = [Row.of_case(case, "x", verdict="skipped", reason="needs a GPU") for case in cases]
    assert tables.skips(rows) == ["skipped in 3 cases: needs a GPU"]


def test_margins_show_the_row_nearest_its_threshold(cases: list[Case]) -> None:
    """A shrinking margin is visible although everything passes."""
    rows = [row(cases[0]), row(cases[0], error=1.9e-6, tensor="near")]
    (line,) = tables.margin_lines(rows)
    assert (line["quantity"], line["tensor"], line["used"]) == ("gradient", "near", "50 %")


def test_report_md_reads_top_down(cases: list[Case]) -> None:
    """Headline, facts, failing cases, tables, margins, skips: in this order."""
    rows = [
        *scaled(cases[0]),
        *passing(cases[2]),
        Row.of_case(cases[1], "x", verdict="skipped", reason="needs | two\nlines"),
    ]
    run = {"command": "parity run", "commit": "abc", "state": "finished",
           "versions": {"torch": "2.13", "deepspeed": None},
           "seconds": {"total": 2.0, "cold": None, "median_by_world": {"4": 0.1}}}  # fmt: skip
    text = markdown.render(rows, run, rerun)
    parts = [
        "# Parity report", "**1 of 3 cells failed", "- commit: abc", "- versions: torch 2.13\n",
        "- seconds: total: 2.000, median world 4: 0.100", "## Failing cases",
        "Causes that fit: `tp`", f"parity run {cases[0].id}", "## Families", "## Whole model",
        "## Margins", "## Skipped", "needs | two lines",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.endswith("\n")


def test_report_md_of_nothing(cases: list[Case]) -> None:
    """A run without rows still has a report."""
    assert "No cell was run." in markdown.render([], {}, rerun)
    assert cases
