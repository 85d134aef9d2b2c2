"""Runs made up by hand out of example rows: one cell of each verdict, or thousands of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity.case import Case, make
from parity.report import tables
from parity.report.cells import Cell, cells
from parity.store import Row, RunDirectory
from tests.parity.example_rows import THRESHOLD, passing, row, scaled

RUN: Mapping[str, Any] = {
    "schema": 1, "id": "0b7f4c52-94a4-4d1e-8f0c-1f6f3a0b9c11", "state": "finished",
    "started": "2026-03-01T02:00:00.000+00:00", "commit": "abc123def",
    "command": "parity run --suite seed",
    "selection": {"selectors": [], "suite": "seed", "implementation": "fold_impl"},
    "seconds": {"total": 12.5, "cold": 4.0},
    "versions": {"python": "3.12.1", "torch": "2.9.0"},
    "devices": {"machine": "11aa22bb", "system": "Linux 6.1 x86_64", "cpu": "A CPU", "cores": 2,
                "gpus": []},
    "environment": {"OMP_NUM_THREADS": "1"},
}  # fmt: skip
TRACEBACK = 'Traceback (most recent call last):\n  File "dispatch.py", line 211, in restore'


def case_of(world: int, tp: int = 1, ep: int = 1, **fields: Any) -> Case:
    """Make a case; `engine_zero=2` sets `engine.zero`."""
    dotted = {key.replace("_", ".", 1): value for key, value in fields.items()}
    shape = {"shape.world": world, "shape.tp": tp, "shape.ep": ep}
    return make({**shape, **dotted}, suite="example", file="example.toml")


def rerun(case: str) -> str:
    """Stand in for the command that runs a case again."""
    return f"parity run {case}"


def pictured(case: Case) -> list[Row]:
    """Make a failing case whose rows carry what the page draws."""
    rows = [
        replace(r, detail={"expert_scales": [2.0, None, 1.0, 2.0], "expert_errors": [1.0, 0, 0, 1]})
        if r.verdict == "fail"
        else r
        for r in scaled(case)
    ]
    classes = {"kind": "gradient", "classes": [[0, 2], [1, 3]], "ranks": [0, 1], "distance": 3e-5}
    differing = row(
        case, "replica", error=12.0, threshold=0.0, scale=None, ratio=None, residual=None,
        verdict="fail", reason="12 entries differ", detail=classes,
    )  # fmt: skip
    return [*rows, differing]


def errored(case: Case, reason: str = "rank 3 hung in all_reduce at dispatch.py:211") -> list[Row]:
    """Make the one row of a case that errored."""
    detail = {"rank": 3, "traceback": TRACEBACK}
    return [Row.of_case(case, "fold_impl", verdict="error", reason=reason, detail=detail)]


def skipped(case: Case, reason: str = "needs a GPU") -> list[Row]:
    """Make the one row of a case that was skipped."""
    return [Row.of_case(case, "fold_impl", verdict="skipped", reason=reason)]


def one_of_each() -> list[Row]:
    """Give five cells: fail, leak, error, skipped, pass."""
    failing, leaking, hung, refused, good = (
        case_of(4, 2, 4), case_of(8, 2, 4), case_of(8, 4, 4), case_of(6, 3, 2),
        case_of(8, 4, 2, optimizer_name="adam"),
    )  # fmt: skip
    leak = [replace(r, verdict="leak", error=1e-4) if r.family == "router" else r
            for r in passing(leaking)]  # fmt: skip
    return [*pictured(failing), *leak, *errored(hung), *skipped(refused), *passing(good)]


def many(count: int, *, every: int = 40) -> list[Row]:
    """Give many cells in as many entries each as a real run has; each `every`-th one fails."""
    shapes = [(w, tp, ep) for w in (4, 8, 12, 24) for tp in (1, 2, 4) for ep in (1, 2, 4)]
    made = [
        case_of(*shape, optimizer_name=name) for shape in shapes for name in ("sgd", "adam", "lion")
    ]
    families = ("router", "expert", "attention", "dense", "layernorm", "embedding")
    rows: list[Row] = []
    for number in range(count):
        case = made[number % len(made)]
        engine = {**passing(case)[0].engine, "name": "deepspeed", "zero": number % 3}
        of_case = pictured(case) if number % every == 0 else passing(case)
        for family in families:
            of_case += [row(case, quantity, family, error=1e-7 / (1 + number % 97))
                        for quantity in ("gradient", "update", "replica")]  # fmt: skip
            of_case.append(row(case, "gradient", family, against="baseline"))
        rows += [replace(r, case=f"{case.id}-{number}", engine=engine) for r in of_case]
    return rows


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Sum rows up."""
    return cells(rows)


def headline(rows: Sequence[Row]) -> str:
    """Give the one sentence."""
    return tables.headline(rows)


def directory(path: Path, rows: Sequence[Row], **about: Any) -> Path:
    """Write a run directory."""
    made = RunDirectory.create(path, root=path.parent, commit="abc123def")
    made.append(rows)
    made.write_run({**RUN, **about})
    return path


__all__ = ["RUN", "THRESHOLD", "TRACEBACK", "passing", "row", "scaled"]
