"""Limits of GitHub: annotations, step summary, comment."""

from __future__ import annotations

import pytest

from parity.report import github, markdown, tables
from parity.report.github import Section
from tests.parity.example_runs import RUN, case_of, errored, many, rerun, scaled


def test_the_worst_ten_are_annotated() -> None:
    """Errors come before failures, and no more than GitHub shows."""
    cases = [case_of(4, 2, 4, data_length=n) for n in range(6, 18)]
    rows = [r for case in cases for r in scaled(case)] + errored(case_of(8))
    lines = github.annotation_lines(tables.failures(rows, rerun))
    assert len(lines) == 10
    assert lines[0].startswith("::error title=w8-sgd-fp32::ERROR w8-sgd-fp32")
    assert "%0A" in lines[1]
    assert "\n" not in "".join(lines)


def test_an_annotation_is_cut() -> None:
    """A traceback of a megabyte is folded by GitHub; ours ends before."""
    lines = github.annotation_lines(tables.failures(errored(case_of(8), "é" * 10**6), rerun))
    assert len(lines[0].encode()) < 4_200


@pytest.mark.parametrize(
    ("text", "is_property", "escaped"),
    [("50%\r\n", False, "50%25%0D%0A"), ("a:b,c", True, "a%3Ab%2Cc"), ("a:b,c", False, "a:b,c")],
)
def test_commands_are_escaped(text: str, is_property: bool, escaped: str) -> None:
    """As the runner's own toolkit does it."""
    assert github.escape(text, is_property=is_property) == escaped


def test_a_short_report_is_the_summary() -> None:
    """Nothing is cut where nothing must be."""
    assert github.summary("one\n\ntwo\n") == "one\n\ntwo\n"


def test_a_long_report_is_cut_between_blocks() -> None:
    """2,000 cells stay below 900 kB; an open fence is closed; what is gone is counted."""
    report = markdown.render(many(2000, every=2), RUN, rerun)
    assert len(report.encode()) > github.MOST_SUMMARY_BYTES
    text = github.summary(report)
    assert 800_000 < len(text.encode()) <= github.MOST_SUMMARY_BYTES
    assert text.count("```") % 2 == 0
    assert text.rstrip().endswith("more parts were cut to fit; see report.md._")


def test_rows_are_cut_whole_and_counted() -> None:
    """The heavier section is filled first; a row is there or counted."""
    rows = [f"| row {n:04} |" for n in range(1000)]
    sections = [Section("# head"), Section("first", list(rows), "tail", 1),
                Section("second", list(rows), "", 2)]  # fmt: skip
    text = github.fitted(sections, 8_000, "see the artifact")
    assert 7_000 < len(text.encode()) <= 8_000
    first, second = text.split("second")
    assert "| row 0000 |" in second
    shown = first.count("| row"), second.count("| row")
    assert shown[0] < shown[1]
    for part, count in zip((first, second), shown, strict=True):
        assert f"_{1000 - count} more rows were cut to fit; see the artifact._" in part
    assert "tail" in first


def test_nothing_is_cut_where_there_is_room() -> None:
    """All rows, no note."""
    assert github.fitted([Section("a", ["b", "c"], "d")], 4_000, "x") == "a\nb\ncd\n"
