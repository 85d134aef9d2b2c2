"""What got worse between two runs: kinds of change, order, warnings, size, exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parity import cli
from parity.report import compare
from parity.report.compare import Comparison, Run
from parity.store import Row
from tests.parity.example_rows import THRESHOLD, passing, row, scaled
from tests.parity.example_runs import (
    RUN,
    case_of,
    cells_of,
    directory,
    errored,
    many,
    rerun,
    skipped,
)

FOUR, EIGHT, SIX = case_of(4, 2, 4), case_of(8, 2, 4), case_of(6, 3, 2)


def compared(
    base: Sequence[Row], head: Sequence[Row], base_about: Any = None, head_about: Any = None
) -> Comparison:
    """Compare rows; the run.json of both sides is the same unless given."""
    sides = (base, base_about), (head, head_about)
    runs = [Run(cells_of(rows), {**RUN, **(about or {})}) for rows, about in sides]
    return compare.compare(runs[0], runs[1], rerun)


def kinds(found: Comparison) -> list[tuple[str, str]]:
    """List what became of each cell that changed."""
    return [(change.kind, change.case) for change in found.changes]


# --- what is worse ------------------------------------------------------------------------------


def test_equal_runs_have_nothing_to_say() -> None:
    """Green stays green: exit 0, passes collapsed by family."""
    rows = [*passing(FOUR), *passing(EIGHT)]
    found = compared(rows, rows)
    assert found.headline == "Nothing got worse: 2 of 2 cells pass."
    assert (found.changes, found.warnings, found.exit_code()) == ((), (), 0)
    text = compare.markdown(found)
    assert "<details><summary>2 cells pass</summary>" in text
    assert "| expert | 2 | 2.6 % | 2.6 % |" in text  # 1e-7 of 3.8e-6


def test_a_new_failure_leads_with_family_and_cause() -> None:
    """The first line says how many, what, by which factor, why and where."""
    found = compared([*passing(FOUR), *passing(EIGHT)], [*scaled(FOUR), *passing(EIGHT)])
    assert kinds(found) == [("worse", FOUR.id)]
    assert found.exit_code() == 1
    said = "1 of 2 cells got worse: expert gradient x2.000 = tp on 1 shape."
    assert found.headline == said
    lines = compare.markdown(found, github=True).splitlines()
    assert lines[0] == compare.MARKER
    assert lines[1] == f"### Parity: {said}"
    (line,) = [line for line in lines if line.startswith(f"| `{FOUR.id}`")]
    assert line == (
        f"| `{FOUR.id}` | expert gradient and 2 more | 1.000000 / 1.00e-07 | 2.000000 / 1.00e+00 "
        f"| pass → **fail** | tp | ÷1e+07 | `parity run {FOUR.id}` |"
    )


def test_a_cause_that_fits_every_cell_is_the_one_in_the_headline() -> None:
    """Two causes fit one shape, one of them the other too: the headline names that one."""
    ambiguous = [replace(r, causes=("dp", *r.causes) if r.causes else ()) for r in scaled(FOUR)]
    found = compared([*passing(FOUR), *passing(EIGHT)], [*ambiguous, *scaled(EIGHT)])
    assert found.headline == "2 of 2 cells got worse: expert gradient x2.000 = tp on 2 shapes."
    assert {change.causes for change in found.changes} == {("dp", "tp"), ("tp",)}


def test_what_failed_before_is_not_worse() -> None:
    """A cell that fails alike is named and does not fail the pull request."""
    found = compared(scaled(FOUR), scaled(FOUR))
    assert kinds(found) == [("still", FOUR.id)]
    assert found.exit_code() == 0
    assert "1 still failing: expert gradient x2.000 = tp on 1 shape." in found.headline


def _larger(rows: list[Row]) -> list[Row]:
    return [replace(r, error=3.0, scale=4.0) if r.verdict == "fail" else r for r in rows]


def _further(rows: list[Row]) -> list[Row]:
    return [replace(r, verdict="fail", error=1.0) if r.family == "router" else r for r in rows]


def _leaking(rows: list[Row]) -> list[Row]:
    return [replace(r, verdict="leak") if r.verdict == "fail" else r for r in rows]


def _alike(rows: list[Row]) -> list[Row]:
    return [replace(r, error=1.9) if r.verdict == "fail" else r for r in rows]


@pytest.mark.parametrize(
    ("base", "head", "kind"),
    [
        (lambda r: r, _larger, "worse"),  # error 1 -> 3
        (lambda r: r, _alike, "still"),  # error 1 -> 1.9: less than twice
        (lambda r: r, _further, "worse"),  # the router as well
        (_leaking, lambda r: r, "worse"),  # leak -> fail
        (lambda r: r, _leaking, "still"),  # fail -> leak
    ],
)
def test_a_failing_cell_may_get_worse(
    base: Callable[[list[Row]], list[Row]], head: Callable[[list[Row]], list[Row]], kind: str
) -> None:
    """More families, a worse verdict, or an error more than twice as large."""
    assert kinds(compared(base(scaled(FOUR)), head(scaled(FOUR)))) == [(kind, FOUR.id)]


def test_a_cell_that_errors_is_worse_than_one_that_fails() -> None:
    """fail -> error is worse, error -> fail is not."""
    assert kinds(compared(scaled(FOUR), errored(FOUR))) == [("worse", FOUR.id)]
    assert "rank 3 hung in all_reduce" in compared(passing(FOUR), errored(FOUR)).headline


def test_an_error_that_turns_into_a_wrong_number_shows_it() -> None:
    """error -> fail: a new failing entry, which nobody had seen before."""
    (change,) = compared(errored(FOUR), scaled(FOUR)).changes
    assert (change.kind, change.what) == ("worse", "expert gradient")


def test_a_new_cell_that_fails_is_worse() -> None:
    """It is named as new, and it fails the pull request."""
    found = compared(passing(EIGHT), [*passing(EIGHT), *scaled(FOUR)])
    assert kinds(found) == [("worse", FOUR.id)]
    assert found.new == (FOUR.id,)
    assert "new → **fail**" in compare.markdown(found)


def test_fixed_cells_are_named() -> None:
    """fail -> pass is said, with both numbers."""
    found = compared(scaled(FOUR), passing(FOUR))
    assert kinds(found) == [("fixed", FOUR.id)]
    assert found.exit_code() == 0
    assert "1 fixed." in found.headline


def test_a_pass_that_is_skipped_now_is_lost() -> None:
    """Coverage that goes is worse, in the words of whoever refused."""
    found = compared(passing(FOUR), skipped(FOUR, "ep_size 3 is not supported"))
    assert kinds(found) == [("lost", FOUR.id)]
    assert found.exit_code() == 1
    text = compare.markdown(found)
    assert "Skipped cells: 1" in text
    assert "ep_size 3 is not supported" in text


def test_skipped_before_and_after_is_no_change() -> None:
    """A missing device is no regression; the cell is named all the same."""
    found = compared([*passing(EIGHT), *skipped(FOUR)], [*passing(EIGHT), *skipped(FOUR)])
    assert (found.changes, found.exit_code()) == ((), 0)
    assert found.skipped == ((FOUR.id, "needs a GPU"),)


def test_a_vanished_cell_is_named() -> None:
    """A cell taken out on purpose is no failure, but nobody can overlook it."""
    found = compared([*passing(FOUR), *passing(EIGHT)], passing(EIGHT))
    assert (found.vanished, found.exit_code()) == ((FOUR.id,), 0)
    assert "Vanished cells, in the base only: 1" in compare.markdown(found)


def test_a_vanished_cell_of_an_unfinished_run_is_lost() -> None:
    """A run cut short must not be green."""
    found = compared(
        [*passing(FOUR), *passing(EIGHT)], passing(EIGHT), head_about={"state": "interrupted"}
    )
    assert kinds(found) == [("lost", FOUR.id)]
    assert found.exit_code() == 1
    assert "the head run is interrupted, its cells are not all there" in found.warnings


def test_nothing_judged_is_not_green() -> None:
    """An empty head run ends with 5, as `parity run` does."""
    found = compared(passing(FOUR), [])
    assert found.exit_code() == 5
    assert found.headline == "The head run judged no cell."


# --- margins ------------------------------------------------------------------------------------


def _with_error(error: float, quantity: str = "gradient") -> list[Row]:
    family = None if quantity == "loss" else "dense"
    return [*passing(FOUR), row(FOUR, quantity, family, error=error, against="baseline")]


@pytest.mark.parametrize(
    ("before", "after", "quantity", "noted"),
    [
        (1e-16, 1e-9, "gradient", True),
        (1e-10, 0.9e-7, "gradient", False),  # 900x
        (0.0, 1e-9, "gradient", True),
        (0.0, 0.0, "gradient", False),
        (1e-9, 1e-16, "gradient", False),
        (1e-16, 1e-8, "loss", False),  # one number below one round-off of another is luck
    ],
)
def test_a_margin_that_shrinks_is_a_note(
    before: float, after: float, quantity: str, noted: bool
) -> None:
    """More than 1,000x nearer to the threshold: a note, and a failure only if asked for."""
    found = compared(_with_error(before, quantity), _with_error(after, quantity))
    assert kinds(found) == ([("margin", FOUR.id)] if noted else [])
    assert (found.exit_code(), found.exit_code(fail_on_margin=True)) == (0, int(noted))
    if noted:
        assert "#### Closer to the limit (1)" in compare.markdown(found)


# --- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "warning"),
    [
        ({"devices": {**RUN["devices"], "machine": "99", "cores": 64}},
         "machines differ: machine 11aa22bb -> 99, cores 2 -> 64"),
        ({"versions": {**RUN["versions"], "torch": "2.10.0"}},
         "versions differ: torch 2.9.0 -> 2.10.0"),
        ({"environment": {}}, "environment differ: OMP_NUM_THREADS 1 -> none"),
        ({"definitions": {FOUR.id: "b"}},
         f"case definitions differ in 1 cell ({FOUR.id}): not the same cells, whatever their id"),
    ],
)  # fmt: skip
def test_runs_that_are_not_alike_are_said(about: dict[str, Any], warning: str) -> None:
    """Another machine, version or definition stands above the numbers."""
    base = {"definitions": {FOUR.id: "a"}} if "definitions" in about else None
    found = compared(passing(FOUR), passing(FOUR), base, about)
    assert found.warnings == (warning,)
    assert "> [!WARNING]" in compare.markdown(found, github=True)


def test_another_implementation_is_said() -> None:
    """Two implementations can be compared, knowingly."""
    other = [replace(r, implementation="deepspeed") for r in passing(FOUR)]
    found = compared(passing(FOUR), other)
    assert found.warnings == ("implementations differ: fold_impl -> deepspeed",)
    assert found.total == found.passed == 1


# --- text ---------------------------------------------------------------------------------------


def test_text_of_a_run_cannot_break_the_table() -> None:
    """Pipes, markup and mentions in a reason stay in their cell."""
    reason = "a | b `c` <img src=x> @somebody"
    text = compare.markdown(compared(passing(FOUR), skipped(FOUR, reason)))
    (line,) = [line for line in text.splitlines() if line.startswith("| `w4")]
    assert line.count("|") - line.count("\\|") == 9
    assert "a \\| b 'c' &lt;img src=x> @\u200bsomebody" in line


@pytest.mark.parametrize("count", [0, 2000])
def test_the_comment_fits(count: int) -> None:
    """2,000 cells, half of them new failures: 60 kB at most, and the rest is counted."""
    base = many(max(count, 1), every=10**9)[40:] + passing(SIX)
    head = many(max(count, 1), every=2) + passing(SIX)
    found = compared(base, head)
    text = compare.markdown(found, github=True)
    assert len(text.encode()) <= 60_000
    if count:
        assert len(text.encode()) > 50_000
        assert "#### Got worse (1000)" in text
        shown = sum(line.startswith("| `w") for line in text.splitlines())
        assert f"_{1000 - shown} more rows were cut to fit; the whole is in" in text
        assert text.count("<details>") == text.count("</details>")


# --- the command --------------------------------------------------------------------------------


def parity(*arguments: object) -> Any:
    """Run a command."""
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_the_command_ends_with_its_exit_code(tmp_path: Path) -> None:
    """Worse: 1; the other way round: 0; no directory: 2."""
    base = directory(tmp_path / "base", passing(FOUR))
    head = directory(tmp_path / "head", scaled(FOUR))
    done = parity("compare", base, head)
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("### Parity: 1 of 1 cells got worse: expert gradient x2.000 = tp")
    assert parity("compare", head, base).exit_code == 0
    assert parity("compare", base, tmp_path / "none").exit_code == 2


def test_json_has_the_numbers(tmp_path: Path) -> None:
    """Another program gets kinds, numbers, causes and the rerun command."""
    base = directory(tmp_path / "base", passing(FOUR))
    head = directory(tmp_path / "head", scaled(FOUR), selection={"implementation": "my:Own"})
    found = json.loads(parity("compare", base, head, "--format", "json").stdout)
    (change,) = found["changes"]
    assert change["head"] == {
        "verdict": "fail", "scale": 2.0, "error": 1.0, "threshold": THRESHOLD,
        "tensor": "layers.0.expert",
    }  # fmt: skip
    assert (change["family"], change["causes"]) == ("expert", ["tp"])
    assert change["rerun"] == f"parity run {FOUR.id} --implementation my:Own"


def test_a_margin_fails_only_if_asked_for(tmp_path: Path) -> None:
    """--fail-on-margin turns the note into exit 1."""
    base = directory(tmp_path / "base", _with_error(1e-16))
    head = directory(tmp_path / "head", _with_error(1e-9))
    assert parity("compare", base, head).exit_code == 0
    assert parity("compare", base, head, "--fail-on-margin").exit_code == 1


def test_the_comment_goes_to_a_file(tmp_path: Path) -> None:
    """--out writes the text; the headline stays on stdout."""
    base = directory(tmp_path / "base", passing(FOUR))
    done = parity("compare", base, base, "--format", "github", "--out", tmp_path / "comment.md")
    assert done.stdout == "Nothing got worse: 1 of 1 cells pass.\n"
    assert (tmp_path / "comment.md").read_text().startswith(compare.MARKER)
