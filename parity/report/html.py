"""Cells and run.json -> report.html: one file, no network, nothing to install.

Owns what the page is given; how it looks and answers is in templates/. Must not know files. Easy
to get wrong: the data is an island of JSON inside HTML, so `<` must never stand in it; and one
line per row would make a page of 2,000 cells half a gigabyte, so each entry carries its worst row
alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from parity.known import Assessment
from parity.report import tables
from parity.report.cells import Cell, Entry
from parity.report.tables import Rerun
from parity.store import VERDICTS, Row

FAMILIES = ("router", "expert", "shared_expert", "attention", "dense", "layernorm", "embedding")
"""Families in the order of the columns; the whole model comes last."""
MODEL = "model"
_MOST_ROWS = 8
"""Failing rows of a cell told in full; the rest is counted, and all of it is in results.jsonl."""
_MOST_TRACE = 6_000
_PICTURES = ("expert_scales", "expert_errors", "classes", "ranks", "distance", "kind")
"""Keys of a row's detail that the page draws."""


def render(
    cells: Sequence[Cell], run: Mapping[str, Any], rerun: Rerun, headline: str,
    known: Assessment | None = None,
) -> str:  # fmt: skip
    """Write the page of one run.

    Args:
        cells: every cell of the run.
        run: run.json; what it lacks is left out.
        rerun: case id -> the command that runs just that case again.
        headline: the one sentence above everything.
        known: what of its failures is known.
    """
    known = known or Assessment()
    told = sorted(cells, key=lambda c: (known.is_known(c.case), VERDICTS.index(c.verdict)))
    verdicts = [cell.verdict for cell in told]
    template = _environment().get_template("report.html.j2")
    return str(template.render(
        headline=headline, facts=facts(run), island=_island(page_data(told, rerun, known)),
        counts={verdict: verdicts.count(verdict) for verdict in VERDICTS}, total=len(told),
        known=sum(known.is_known(cell.case) for cell in told), notes=known.notes,
        failing=[(c.case, c.verdict, tables.finding_of(c.bad)) for c in told if c.bad][:50],
        style=_static("report.css"), script=_static("report.js"),
    ))  # fmt: skip


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only where a page is made

    return Environment(
        loader=PackageLoader("parity.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _static(name: str) -> Any:
    """Read a file of ours that goes into the page as it is."""
    from markupsafe import Markup

    folder = resources.files("parity.report") / "templates"
    return Markup((folder / name).read_text(encoding="utf-8"))


def _island(value: Any) -> Any:
    """Write JSON that cannot end the element it stands in."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def facts(run: Mapping[str, Any]) -> dict[str, str]:
    """Say what ran, where, and for how long."""
    versions, devices = run.get("versions") or {}, run.get("devices") or {}
    seconds, selection = run.get("seconds") or {}, run.get("selection") or {}
    known = {
        "state": run.get("state"),
        "implementation": selection.get("implementation"),
        "commit": run.get("commit"),
        "command": run.get("command"),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
        "machine": devices and f"{devices.get('cores')} cores, {devices.get('cpu')}",
        "GPUs": ", ".join(devices.get("gpus") or []),
        "seconds": seconds.get("total") and f"{seconds['total']:.1f}",
    }
    return {name: str(fact) for name, fact in known.items() if fact}


class _Table:
    """Words, each written once; a cell refers to them by number."""

    def __init__(self, first: Sequence[str] = ()) -> None:
        self.words: list[str] = []
        self._number: dict[str, int] = {}
        for word in first:
            self(word)

    def __call__(self, word: str | None) -> int:
        """Give the number of a word; None is -1."""
        if word is None:
            return -1
        if word not in self._number:
            self._number[word] = len(self.words)
            self.words.append(word)
        return self._number[word]


def page_data(
    cells: Sequence[Cell], rerun: Rerun, known: Assessment | None = None
) -> dict[str, Any]:
    """Build the JSON of the page: tables of words, and cells that refer to them.

    Returns:
        `words`: name -> list; `cells`: lists, as templates/report.js reads them in `cellOf` and
        `entryOf`.
    """
    seen = {entry.family for cell in cells for entry in cell.entries}
    words = {
        "verdict": _Table(VERDICTS), "quantity": _Table(tables.ORDER),
        "family": _Table([f for f in FAMILIES if f in seen]),
        **{name: _Table() for name in ("implementation", "shape", "stage", "optimizer", "dtype",
                                       "run", "against", "tensor", "cause", "reason", "finding")},
    }  # fmt: skip
    marks = {} if known is None else known.marks
    packed = [
        [*_packed_cell(cell, words, rerun), [words["finding"](m) for m in marks.get(cell.case, ())]]
        for cell in cells
    ]
    words["family"](MODEL)
    return {"words": {name: table.words for name, table in words.items()}, "cells": packed}


def _packed_cell(cell: Cell, words: Mapping[str, _Table], rerun: Rerun) -> list[Any]:
    engine = cell.engine
    sizes = {k: v for k, v in cell.shape.items() if k != "pp" or v > 1}
    settings = {k: engine[k] for k in ("gas", "clip", "backend", "strategy") if k in engine}
    bad = [_packed_bad(row, cell, words) for row in _chosen(cell.bad)]
    return [
        cell.case, words["implementation"](cell.implementation),
        words["shape"](tables.plain_shape(cell.shape)), words["stage"](cell.stage),
        words["optimizer"](str(engine.get("optimizer"))), words["dtype"](str(engine.get("dtype"))),
        words["verdict"](cell.verdict), [words["cause"](cause) for cause in cell.causes],
        [words["reason"](reason) for reason in cell.reasons],
        _short(cell.seconds, 3), rerun(cell.case), {**sizes, **settings},
        [_packed_entry(entry, words) for entry in cell.entries],
        bad, len(cell.bad),
    ]  # fmt: skip


def _packed_entry(entry: Entry, words: Mapping[str, _Table]) -> list[Any]:
    row = entry.row
    return [
        words["quantity"](entry.quantity), words["family"](entry.family or MODEL),
        words["run"](entry.run), words["against"](entry.against), words["verdict"](entry.verdict),
        entry.count, _short(row.scale, 8), _short(row.error, 3), _short(row.threshold, 3),
        _short(row.ratio, 8), _short(row.residual, 3), words["tensor"](row.tensor), row.step,
        _place(row),
    ]  # fmt: skip


def _place(row: Row) -> list[Any]:
    worst = row.worst or {}
    return [worst.get(key) for key in ("rank", "expert", "row")] if worst else []


def _chosen(bad: Sequence[Row]) -> list[Row]:
    """Tell rows with a picture first, one of each tensor's quantity, else the worst."""
    drawn = sorted(bad, key=lambda row: not any(key in (row.detail or {}) for key in _PICTURES[:3]))
    return drawn[:_MOST_ROWS]


def _packed_bad(row: Row, cell: Cell, words: Mapping[str, _Table]) -> dict[str, Any]:
    """Write one failing row in full: what a reader needs who will not open results.jsonl."""
    detail = row.detail or {}
    drawn = {key: _rounded(detail[key]) for key in _PICTURES if detail.get(key) is not None}
    trace = str(detail.get("traceback") or "")[-_MOST_TRACE:]
    found = {
        "what": tables.describe(row, cell.shape), "verdict": row.verdict,
        "tensor": row.tensor, "step": row.step, "quantity": row.quantity,
        "causes": [words["cause"](cause) for cause in row.causes], **drawn, "trace": trace,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (None, "", [])}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value, 7)
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: float | None, digits: int) -> float | int | None:
    """Round to significant digits: 17 of them would double the page."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short
