"""The command `parity explain`: why a run or a case failed.

Owns its options and printing. Must not import torch before a case is run. Easy to get wrong: a run
directory is explained from its rows alone; only a CASE, --taps or --tokens starts ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from parity import explain as explaining
from parity import registry
from parity.case import Case
from parity.case_files import find_folder, load_folder, select
from parity.errors import UsageError
from parity.evidence import observe
from parity.report import explanation
from parity.session import OpenJudge, Selection, implementation_of, open_judge
from parity.store import RESULTS, Row, RunDirectory, by_case

_MOST_CASES = 10


@click.command()
@click.argument("target", metavar="CASE|RUN_DIR")
@click.option("--case", "only", metavar="ID", help="Explain this case of the run directory only.")
@click.option("--taps", is_flag=True, help="Run the case again and compare inside its MoE layers.")
@click.option("--tokens", is_flag=True, help="Run it again and split gradients over single tokens.")
@click.option(
    "--cases", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Folder of cases."
)
@click.option(
    "--implementation",
    metavar="NAME|module:attr",
    help="What a CASE is run with; default: as it ran, else what its file names.",
)
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
@click.pass_context
def explain(
    ctx: click.Context, /, target: str, only: str | None, taps: bool, tokens: bool,
    folder: Path | None, implementation: str | None, style: str,
) -> None:  # fmt: skip
    """Say why cases fail: sets of causes, over all shapes what is left, and where it begins.

    RUN_DIR is read; a CASE is run. Exit code 1 where something fails.
    """
    opener: OpenJudge = ctx.obj or open_judge
    directory = Path(target)
    if (directory / RESULTS).is_file():
        run = RunDirectory.open(directory)
        selection = Selection.from_run(run.run())
        folder = folder or (Path(selection.cases) if selection.cases else None)
        known = _loaded(folder, selection.files or {})
        loaded = dict(zip(known, selection.seeded(known.values()), strict=True))
        results = by_case(run.rows())
        if only is not None and only not in results:
            raise UsageError(f"--case {only}: not in {target}; allowed: {', '.join(results)}")
    else:
        chosen = select([target], folder=folder)
        if len(chosen) > 1:
            raise UsageError(f"{target!r} names {len(chosen)} cases, explain takes one")
        loaded = {**_loaded(folder, {}), chosen[0].id: chosen[0]}
        results, only = {}, chosen[0].id
    further: dict[str, list[str]] = {}
    if taps or tokens or not results:
        case = _case_to_run(results, loaded, only)
        if implementation is None and case.id in results:
            implementation = results[case.id][0].implementation
        implementation = implementation or implementation_of([case])
        registry.check(implementation)
        rows, further = _rerun(opener, implementation, case, taps, tokens)
        results = {**results, case.id: rows} if results else {case.id: rows}
    shown = {k: v for k, v in results.items() if only in (None, k)}
    if style == "json":
        click.echo(json.dumps(_answer(shown, loaded, further), indent=2))
    else:
        click.echo("\n".join(_text(shown, results, loaded, further)))
    ctx.exit(1 if _failing(shown) else 0)


def _loaded(folder: Path | None, files: Mapping[str, str]) -> dict[str, Case]:
    """Load the cases at hand by id; without a folder only those named by a run."""
    try:
        cases = load_folder(find_folder(folder))
    except UsageError:
        cases = []
    for case, file in files.items():
        cases = [*cases, *select([f"{file}::{case}"])]
    return {case.id: case for case in cases}


def _failing(results: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    return {id: rows for id, rows in results.items() if explaining.failing_cases(rows)}


def _case_to_run(
    results: Mapping[str, Sequence[Row]], loaded: Mapping[str, Case], only: str | None
) -> Case:
    wanted = only or next(iter(_failing(results)), None)
    if wanted is None:
        raise UsageError("nothing fails in this run; name a case to tap")
    if wanted not in loaded:
        raise UsageError(f"case {wanted} is in no folder of cases; give it with --cases")
    return loaded[wanted]


def _rerun(
    opener: OpenJudge, implementation: str, case: Case, taps: bool, tokens: bool
) -> tuple[list[Row], dict[str, list[str]]]:
    """Run a case, and give what was asked for beside its rows: title -> lines."""
    further: dict[str, list[str]] = {}
    with opener(implementation, "cpu", case, max_live_ranks=2 * case.shape.world) as judge:
        rows = list(judge.rows(case))
        if tokens:
            from parity import tokens as splitting

            found = splitting.fits(judge, case, rows)  # type: ignore[arg-type]
            further[f"over the tokens of {case.id}"] = splitting.lines(found)
        if taps:
            from parity import taps as tapping

            borders = tapping.findings(judge, case)  # type: ignore[arg-type]
            title = f"inside the MoE layers of {case.id}"
            further[title] = tapping.lines(borders, case.layout)
    return rows, further


def _text(
    shown: Mapping[str, Sequence[Row]], results: Mapping[str, Sequence[Row]],
    loaded: Mapping[str, Case], further: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """Write failing cases, what was asked for beside them, and what is left over all of them."""
    failing = _failing(shown)
    said: list[str] = []
    for id, rows in list(failing.items())[:_MOST_CASES]:
        said += [*explanation.case_lines(rows, loaded.get(id), [*loaded.values()]), ""]
    if len(failing) > _MOST_CASES:
        said += [f"... and {len(failing) - _MOST_CASES} more failing cases", ""]
    for title, lines in further.items():
        said += [title, *lines, ""]
    if not failing:
        return [*said, "nothing to explain: every case that was compared passed"]
    if len(results) > 1:
        return [*said, *explanation.summary_lines(results, loaded, [*loaded.values()])]
    return said[:-1]


def _answer(
    shown: Mapping[str, Sequence[Row]], loaded: Mapping[str, Case],
    further: Mapping[str, Sequence[str]],
) -> dict[str, Any]:  # fmt: skip
    """Give the same for another program."""
    cases = {}
    for id, rows in _failing(shown).items():
        found = explaining.causes(rows, loaded.get(id))
        about = next(o for o in observe(rows, loaded.get(id)) if o.failing)
        cases[id] = {
            "causes": [cause.id for cause in found],
            "sentences": [explaining.sentence(cause, about) for cause in found],
            "ambiguous": list(explaining.ambiguity(found, loaded.values(), loaded.get(id))),
        }
    left = explaining.intersect([*shown.values()], loaded)
    return {"schema": 1, "cases": cases, "left": [c.id for c in left], "further": dict(further)}
