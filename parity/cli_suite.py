"""What a suite covers (`parity show --matrix`) and the command `parity calibrate`.

Owns their printing. Must not import torch before a command needs it. Easy to get wrong: a pair that
an exclusion forbids is not missing, one that no third entry goes with is forbidden, too.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from parity.case import Flat
from parity.case_files import (
    DEFAULT_SUITE,
    Matrix,
    find_folder,
    is_case_file,
    load_file,
    load_matrix,
    parse_file,
    select,
)
from parity.errors import UsageError, writing
from parity.fingerprint import cores, devices, versions
from parity.report import tables
from parity.session import DEFAULT_IMPLEMENTATION, MAX_LIVE_RANKS, open_judge

REPORT = Path("reports/calibration.md")
FEWEST_RUNS = 16
"""Runs that leave some for every variation."""


def matrices(suite: str | None, folder: Path | None) -> dict[Path, Matrix]:
    """Load the matrix of every file of a suite.

    Raises:
        UsageError: no file declares the suite.
    """
    name = suite or DEFAULT_SUITE
    files = [p for p in sorted(find_folder(folder).glob("*.toml")) if is_case_file(p)]
    found = {path: load_matrix(path) for path in files if parse_file(path).suite == name}
    if not found:
        suites = ", ".join(sorted({parse_file(path).suite for path in files}))
        raise UsageError(f"unknown suite {name!r}; allowed: {suites}")
    return found


def print_matrix(suite: str | None, folder: Path | None, style: str) -> None:
    """Print axes, cells per entry and how many pairs of entries occur."""
    described = [_described(path, matrix) for path, matrix in matrices(suite, folder).items()]
    if style == "json":
        click.echo(json.dumps(described, indent=2))
        return
    click.echo("\n\n".join(_text(about) for about in described))


def _described(path: Path, matrix: Matrix) -> dict[str, Any]:
    parsed = parse_file(path)
    uses = Counter((axis, at) for cell in matrix.choices for axis, at in enumerate(cell))
    covered, possible, impossible = matrix.coverage if len(matrix.axes) > 1 else (0, 0, 0)
    return {
        "suite": parsed.suite,
        "file": str(path),
        "sample": parsed.sample,
        "cells": len(matrix.choices),
        "product": math.prod(len(entries) for entries in matrix.axes.values()),
        "single_cases": len(load_file(path)) - len(matrix.choices),
        "axes": {
            name: {_label(entry): uses[axis, at] for at, entry in enumerate(entries)}
            for axis, (name, entries) in enumerate(matrix.axes.items())
        },
        "pairs": {"covered": covered, "possible": possible, "excluded": impossible},
    }


def _label(entry: Flat) -> str:
    """Name an entry by what it sets; the section is left out where there is only one."""
    sections = {key.rpartition(".")[0] for key in entry}
    short = {k.rpartition(".")[2] if len(sections) == 1 else k: v for k, v in entry.items()}
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in short.items())


def _text(about: dict[str, Any]) -> str:
    pairs, lines = about["pairs"], []
    for axis, entries in about["axes"].items():
        for number, (entry, cells) in enumerate(entries.items()):
            lines.append({"axis": "" if number else axis, "entry": entry, "cells": str(cells)})
    table = tables.grid(lines, {"axis": "axis", "entry": "entry", "cells": "cells"})
    return (
        f"suite {about['suite']} ({about['file']}): {about['cells']} cells of a product of "
        f"{about['product']:,}, and {about['single_cases']} single cases\n\n{table}\n\n"
        f"pairs of entries: {pairs['covered']} of {pairs['possible']} possible ones occur "
        f"({pairs['excluded']} more are excluded)"
    )


@click.command()
@click.option(
    "--runs", type=click.IntRange(min=FEWEST_RUNS), default=1000, show_default=True,
    help="Benign runs per dtype, at least.",
)  # fmt: skip
@click.option("--suite", default="default", show_default=True, help="Whose cases are varied.")
@click.option(
    "--cases", "folder", type=click.Path(path_type=Path), metavar="DIR", help="As for `run`."
)
@click.option(
    "--implementation", metavar="NAME|module:attr", default=DEFAULT_IMPLEMENTATION,
    show_default=True, help="What runs on ranks.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", default=REPORT,
    show_default=True,
)  # fmt: skip
@click.pass_context
def calibrate(
    ctx: click.Context, /, runs: int, suite: str, folder: Path | None, implementation: str,
    out: Path,
) -> None:  # fmt: skip
    """Count false alarms of right runs and find the smallest fault that is seen; write a report.

    Exits 1 where a right run alarmed or a planted loss was missed.
    """
    from parity import calibrate as calibration

    cases = [c for c in select(suite=suite, folder=folder) if c.engine.name == "native"]
    with writing(f"--out {out}"):  # before hours of runs, not after
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a", encoding="utf-8").close()
    with open_judge(implementation, "cpu", cases[0], max_live_ranks=MAX_LIVE_RANKS) as judge:
        say = functools.partial(click.echo, err=True)
        found = calibration.calibrate(runs, cases, judge, say)
    command = f"parity calibrate --runs {runs} --suite {suite}"
    out.write_text(calibration.render(found, command, _machine()), encoding="utf-8")
    click.echo(f"report: {out}")
    ctx.exit(0 if calibration.holds(found) else 1)


def _machine() -> dict[str, str]:
    """Name kind and versions of what a report was made on, and no date."""
    installed = versions()
    kept = {name: installed[name] for name in ("python", "torch") if installed.get(name)}
    return {"machine": f"{devices().get('cpu')}, {cores()} cores", "versions": json.dumps(kept)}
