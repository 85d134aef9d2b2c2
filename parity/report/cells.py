"""Rows -> cells: what a page, a comparison of two runs and a history need of each case.

Owns the choice of the one row that stands for many. Must not know files, formats or pandas. Easy
to get wrong: a baseline's own rows belong to its case but carry another shape; scale and error of
an entry come from the *same* row, so that the pair can be found again in the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parity.report.tables import ORDER, excess, folded_shape, shape_label
from parity.store import FAILING, VERDICTS, Row, case_verdict


@dataclass(frozen=True)
class Entry:
    """One quantity of one family in one comparison; `row` is the worst of its rows."""

    quantity: str
    family: str | None
    run: str
    """Whose numbers: folded or baseline."""
    against: str | None
    verdict: str
    count: int
    row: Row

    @property
    def used(self) -> float | None:
        """Give the error in thresholds; None where nothing may differ, or nothing was compared."""
        row = self.row
        return row.error / row.threshold if row.threshold and row.error is not None else None


@dataclass(frozen=True)
class Cell:
    """One case of one implementation."""

    case: str
    implementation: str
    shape: dict[str, int]
    engine: dict[str, Any]
    verdict: str
    entries: tuple[Entry, ...]
    causes: tuple[str, ...]
    reasons: tuple[str, ...]
    """Why rows were skipped or errored, each once."""
    bad: tuple[Row, ...]
    """Rows that fail, the earliest wrong quantity first, the worst of it first."""
    seconds: float | None

    @property
    def label(self) -> str:
        """Write the shape as `w8 tp2 ep4`."""
        return shape_label(self.shape, self.engine)

    @property
    def stage(self) -> str:
        """Name what holds the optimizer state: the native engine, or a ZeRO stage."""
        if self.engine.get("name", "native") == "native":
            return "native"
        return f"ZeRO-{self.engine.get('zero', 0)}"

    @property
    def worst(self) -> Entry | None:
        """Give the entry to show first: the earliest wrong one, else the nearest its threshold."""
        wrong = [entry for entry in self.entries if entry.verdict in FAILING]
        if wrong:
            return wrong[0]
        return max(self.entries, key=lambda entry: entry.used or 0.0, default=None)


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Sum rows up, one cell per case and implementation, in the order they were run."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.case, row.implementation), []).append(row)
    return [_cell(of_case) for of_case in grouped.values()]


def _cell(rows: Sequence[Row]) -> Cell:
    folded = folded_shape(rows)
    entries = sorted(_entries(rows, folded), key=_order)
    bad = [row for row in rows if row.verdict in FAILING]
    bad.sort(key=lambda row: (_rank(row.quantity), -excess(row)))
    spoken = (row for row in rows if row.verdict in ("skipped", "error"))
    first = rows[0]
    return Cell(
        case=first.case, implementation=first.implementation, shape=folded, engine=first.engine,
        verdict=case_verdict(rows), entries=tuple(entries),
        causes=tuple(dict.fromkeys(cause for row in bad for cause in row.causes)),
        reasons=tuple(dict.fromkeys(row.reason or "no reason given" for row in spoken)),
        bad=tuple(bad), seconds=first.seconds,
    )  # fmt: skip


def _entries(rows: Iterable[Row], folded: dict[str, int]) -> Iterable[Entry]:
    grouped: dict[tuple[str, str | None, str, str | None], list[Row]] = {}
    for row in rows:
        if row.quantity is not None:
            run = "folded" if row.shape == folded else "baseline"
            grouped.setdefault((row.quantity, row.family, run, row.against), []).append(row)
    for (quantity, family, run, against), members in grouped.items():
        worst = min(members, key=lambda row: (_severity(row), -excess(row)))
        yield Entry(quantity, family, run, against, case_verdict(members), len(members), worst)


def _severity(row: Row) -> int:
    return VERDICTS.index(row.verdict)


def _rank(quantity: str | None) -> int:
    return ORDER.index(quantity) if quantity in ORDER else -1


def _order(entry: Entry) -> tuple[int, str, str, str]:
    return _rank(entry.quantity), entry.family or "", entry.run, entry.against or ""
