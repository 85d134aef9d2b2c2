"""Rows -> the lines of a report: one per shape x optimizer x family, failing lines first.

Owns what is summed up and how numbers read. Must not know files, processes or torch. Easy to get
wrong: a baseline's own rows carry the baseline's shape; they count against their case, and they
show as a line of their own only where they fail. The worst scale is the one farthest from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parity.store import FAILING, VERDICTS, Row, by_case, case_verdict

if TYPE_CHECKING:
    from parity.known import Assessment

NEW = "new"
"""Stands among findings for a failing row that none of them accounts for."""
_MOST_FACTORS = 3
ORDER = ("routing", "loss", "gradient", "replica", "grad_norm", "update", "checkpoint")
"""Quantities in the order in which one being wrong makes the later ones wrong."""
Rerun = Callable[[str], str]
"""Case id -> the one command that runs just that case again."""
_SHORT_DTYPES = {"float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
_NONE = "-"
_COLUMNS = ("scale", "error", "threshold")

FAMILY_HEADERS = {
    "shape": "shape", "optimizer": "optimizer", "family": "family", "cases": "cases",
    "gradient_scale": "grad scale", "gradient_error": "grad error",
    "update_scale": "update scale", "update_error": "update error",
    "replica": "replica diffs", "threshold": "threshold", "verdict": "verdict",
    "finding": "finding",
}  # fmt: skip
MODEL_HEADERS = {
    "shape": "shape", "optimizer": "optimizer", "cases": "cases", "routing": "routing diffs",
    "loss_error": "loss error", "norm_scale": "norm scale", "norm_error": "norm error",
    "verdict": "verdict", "finding": "finding",
}  # fmt: skip
ROW_HEADERS = {
    "quantity": "quantity", "family": "family", "tensor": "tensor", "run": "run",
    "against": "against", "step": "step", "scale": "scale", "error": "error",
    "threshold": "allowed", "worst": "worst at", "verdict": "verdict",
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """One failing case: its worst rows, what may have caused it, how to run it again."""

    case: str
    verdict: str
    shape: dict[str, int]
    rows: tuple[Row, ...]
    causes: tuple[str, ...]
    rerun: str
    marks: tuple[str, ...] = ()
    """Known findings it shows, and `NEW` where it fails in more; empty: it shows none."""

    @property
    def is_known(self) -> bool:
        """Tell whether it fails in nothing but known findings."""
        return bool(self.marks) and NEW not in self.marks

    @property
    def known(self) -> str:
        """Say in brackets what is known of it; empty where nothing is."""
        ids = ", ".join(mark for mark in self.marks if mark != NEW)
        if not ids:
            return ""
        return f" (known: {ids})" if self.is_known else f" (new, beside known: {ids})"


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Count cells by verdict, and rows."""
    rows = list(rows)
    verdicts = [case_verdict(of_case) for of_case in by_case(rows).values()]
    found = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    return {"cells": len(verdicts), **found, "rows": len(rows)}


# --- lines --------------------------------------------------------------------------------------


def family_lines(rows: Sequence[Row], known: Assessment | None = None) -> list[dict[str, Any]]:
    """Give one line per shape x optimizer x family; numbers are the worst of their cases.

    Returns:
        Records with the keys of `FAMILY_HEADERS`, numbers as numbers, failing ones first.
    """
    frame = _frame([r for r in rows if r.family is not None or r.quantity is None], known)
    return _lines(frame, ["shape", "optimizer", "family"], {
        "gradient_scale": ("gradient_scale", worst_scale),
        "gradient_error": ("gradient_error", "max"),
        "update_scale": ("update_scale", worst_scale),
        "update_error": ("update_error", "max"),
        "replica": ("replica_error", "max"),
        "threshold": ("gradient_threshold", "max"),
    })  # fmt: skip


def model_lines(rows: Sequence[Row], known: Assessment | None = None) -> list[dict[str, Any]]:
    """Give one line per shape x optimizer of what is about the whole model.

    Returns:
        Records with the keys of `MODEL_HEADERS`.
    """
    frame = _frame([r for r in rows if r.quantity in ("routing", "loss", "grad_norm")], known)
    return _lines(frame, ["shape", "optimizer"], {
        "routing": ("routing_error", "max"),
        "loss_error": ("loss_error", "max"),
        "norm_scale": ("grad_norm_scale", worst_scale),
        "norm_error": ("grad_norm_error", "max"),
    })  # fmt: skip


def shown_headers(
    headers: Mapping[str, str], lines: Iterable[Mapping[str, Any]]
) -> Mapping[str, str]:
    """Leave the column of findings out where no line shows a known one."""
    if any(set(line["finding"].split(", ")) - {"", NEW} for line in lines):
        return headers
    return {key: header for key, header in headers.items() if key != "finding"}


def _frame(rows: Sequence[Row], known: Assessment | None) -> Any:
    """Make a data frame: a row's metrics stand in columns of its own quantity, the rest empty."""
    import pandas as pd  # half a second, only where a report is made

    records = []
    for case, of_case in by_case(rows).items():
        folded = folded_shape(of_case)
        label = shape_label(folded, of_case[0].engine)
        for row in of_case:
            failed, name = row.verdict in FAILING, label
            if row.shape != folded:
                if not failed:
                    continue  # the baseline's own
                name = f"{label} (baseline)"
            marks = known.marks_of(row, folded) if known is not None and failed else ()
            scale = _end_to_end_scale(row) if row.quantity == "update" else row.scale
            records.append((
                case, name, str(row.engine.get("optimizer")), row.family or _NONE,
                VERDICTS.index(row.verdict), marks, row.quantity,
                row.verdict != "skipped",  # what is below resolution has no number to show
                row.ratio if scale is None else scale, row.error, row.threshold,
            ))  # fmt: skip
    keys = ["case", "shape", "optimizer", "family", "verdict", "finding", "quantity", "judged"]
    frame = pd.DataFrame(records, columns=[*keys, *_COLUMNS])
    frame = frame.astype(dict.fromkeys(_COLUMNS, "float64"))
    for quantity in ORDER:
        is_its = frame["quantity"] == quantity
        for metric in _COLUMNS:
            shown = is_its if metric == "threshold" else is_its & frame["judged"]
            frame[f"{quantity}_{metric}"] = frame[metric].where(shown)
    return frame


def _lines(frame: Any, keys: list[str], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Sum groups up, failing ones first, otherwise in the order in which they were run."""
    always = {
        "cases": ("case", "nunique"),
        "verdict": ("verdict", "min"),
        "finding": ("finding", _joined),
    }
    lines = frame.groupby(keys, sort=False).agg(**always, **summary).reset_index()
    records = lines.astype(object).where(lines.notna(), None).to_dict("records")
    for record in records:
        record["verdict"] = VERDICTS[int(record["verdict"])]
    return sorted(records, key=lambda record: VERDICTS.index(record["verdict"]))


def _joined(marks: Iterable[tuple[str, ...]]) -> str:
    """Join the findings of rows, what is new last."""
    found = {mark for of_row in marks for mark in of_row}
    return ", ".join(sorted(found, key=lambda mark: (mark == NEW, mark)))


def margin_lines(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Give the passing row nearest its threshold, per quantity and dtype."""
    nearest: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.verdict == "pass" and row.quantity and row.threshold and row.error is not None:
            key = (row.quantity, str(row.engine.get("dtype")))
            if key not in nearest or excess(row) > excess(nearest[key]):
                nearest[key] = row
    ordered = sorted(nearest.items(), key=lambda item: (_rank(item[0][0]), item[0][1]))
    return [
        {"quantity": quantity, "dtype": dtype, "error": row.error, "threshold": row.threshold,
         "used": f"{100 * excess(row):.0f} %", "tensor": row.tensor or row.family or _NONE,
         "case": row.case}
        for (quantity, dtype), row in ordered
    ]  # fmt: skip


def folded_shape(rows: Iterable[Row]) -> dict[str, int]:
    """Give the folded shape of a case: the largest of its rows', the others are the baseline's."""
    shapes = {id(row.shape): row.shape for row in rows}  # hundreds of rows share them
    return max(shapes.values(), key=_folding)


def _folding(shape: Mapping[str, int]) -> tuple[int, int]:
    return shape.get("world", 1), shape.get("tp", 1) * shape.get("ep", 1) * shape.get("etp", 1)


def plain_shape(shape: Mapping[str, int]) -> str:
    """Write a shape as `w8 tp2 ep4`; sizes of 1 are left out."""
    axes = [f"{axis}{shape[axis]}" for axis in ("tp", "ep", "etp") if shape.get(axis, 1) > 1]
    return " ".join([f"w{shape.get('world')}", *axes])


def shape_label(shape: Mapping[str, int], engine: Mapping[str, Any]) -> str:
    """Write a shape as `w8 tp2 ep4`, and what is not native float32 on Gloo behind it."""
    parts = [plain_shape(shape)]
    if engine.get("name", "native") != "native":
        parts += [f"{engine['name']} z{engine.get('zero', 0)}"]
    if engine.get("dtype") in _SHORT_DTYPES:
        parts += [_SHORT_DTYPES[engine["dtype"]]]
    if engine.get("backend", "gloo") != "gloo":
        parts += [str(engine["backend"])]
    return " ".join(parts)


def _end_to_end_scale(row: Row) -> float | None:
    """Prefer the scale of the update as a user meets it; the row's own is of its two-step rule."""
    scale = (row.detail or {}).get("end_to_end_scale")
    return float(scale) if isinstance(scale, int | float) else row.scale


def worst_scale(scales: Iterable[float | None]) -> float | None:
    """Choose the scale farthest from 1 as a factor; one that is not positive is farther yet.

    Empty places, None or NaN, are passed over.
    """

    def distance(scale: float) -> float:
        return abs(math.log(scale)) if scale > 0 else math.inf

    return max((s for s in scales if s is not None and s == s), key=distance, default=None)


def excess(row: Row) -> float:
    """Measure an error in thresholds; what has no error is as bad as it gets."""
    if row.error is None:
        return math.inf
    return row.error / row.threshold if row.threshold else (math.inf if row.error else 0.0)


def _rank(quantity: str | None) -> int:
    return ORDER.index(quantity) if quantity in ORDER else -1


# --- failures and the headline ------------------------------------------------------------------


def failures(
    rows: Iterable[Row], rerun: Rerun, *, worst: int = 5, known: Assessment | None = None
) -> list[Failure]:
    """Give every failing case with its worst rows, the earliest wrong quantity first.

    Known ones come last.
    """
    found = []
    for case, of_case in by_case(rows).items():
        bad = [row for row in of_case if row.verdict in FAILING]
        if not bad and of_case:
            continue
        bad.sort(key=lambda row: (_rank(row.quantity), -excess(row)))
        shape = folded_shape(of_case)
        marks = () if known is None else known.marks.get(case, ())
        shown = failure_of(case, case_verdict(of_case), shape, bad, rerun, worst=worst)
        found.append(replace(shown, marks=marks))
    return sorted(found, key=lambda f: (f.is_known, VERDICTS.index(f.verdict)))


def failure_of(
    case: str, verdict: str, shape: dict[str, int], bad: Sequence[Row], rerun: Rerun, *,
    worst: int = 5,
) -> Failure:  # fmt: skip
    """Choose what is shown of one failing case.

    Args:
        case: its id.
        verdict: its verdict.
        shape: its folded shape.
        bad: its failing rows, earliest wrong quantity first, the worst of it first.
        rerun: case id -> the command that runs just that case again.
        worst: rows shown at most.
    """
    causes = dict.fromkeys(cause for row in bad for cause in row.causes)
    return Failure(
        case, verdict, shape, tuple(_first_of_each(bad)[:worst]), tuple(causes), rerun(case)
    )


def _first_of_each(bad: Sequence[Row]) -> list[Row]:
    """Keep the worst row of each quantity, family and run."""
    kept: dict[tuple[object, ...], Row] = {}
    for row in bad:
        kept.setdefault((row.quantity, row.family, row.against, row.shape.get("world")), row)
    return list(kept.values())


def headline(rows: Sequence[Row], known: Assessment | None = None) -> str:
    """Say in one sentence how it went: how many cells failed, and the main findings."""
    count = counts(rows)
    cells = count["cells"]
    if not cells:
        return "No cell was run."
    verdicts = {case: case_verdict(of_case) for case, of_case in by_case(rows).items()}
    new = [row for row in rows if known is None or not known.is_known(row.case)]
    said = []
    if failed := count["fail"] + count["leak"]:
        found = [*_known_ones(verdicts, ("fail", "leak"), known), *findings(new)]
        said.append(f"{failed} of {cells} cells failed: {'; '.join(found)}.")
    if count["error"]:
        found = _known_ones(verdicts, ("error",), known)
        found += [first_error(new)] if any(row.verdict == "error" for row in new) else []
        said.append(f"{count['error']} of {cells} cells errored: {'; '.join(found)}.")
    if not said:
        said.append(f"{count['pass']} of {cells} cells passed ({count['rows']} rows).")
    if count["skipped"]:
        said.append(f"{count['skipped']} skipped.")
    return " ".join(said)


def _known_ones(
    verdicts: Mapping[str, str], kinds: Sequence[str], known: Assessment | None
) -> list[str]:
    """Say how many cells fail as known, if any, and of what."""
    if known is None:
        return []
    cells = [
        case for case, verdict in verdicts.items() if verdict in kinds and known.is_known(case)
    ]
    ids = sorted({mark for case in cells for mark in known.marks[case]})
    return [f"{len(cells)} as known ({', '.join(ids)})"] if cells else []


def findings(rows: Sequence[Row], most: int = 3) -> list[str]:
    """Sum up, per failing case, the earliest quantity that is wrong; the commonest first.

    What differs in nothing but its factor, as a factor tp does from shape to shape, is one finding.
    """
    where: dict[tuple[str, str], set[str]] = {}
    factors: dict[tuple[str, str], list[str]] = {}
    for failure in failures(rows, lambda case: case):
        if failure.verdict == "error":
            continue
        first = failure.rows[0].quantity
        for row in (r for r in failure.rows if r.quantity == first):
            what, factor, causes = _said(row)
            where.setdefault((what, causes), set()).add(shape_label(failure.shape, row.engine))
            held = factors.setdefault((what, causes), [])
            held += [factor] if factor not in held else []
    ordered = sorted(where.items(), key=lambda item: -len(item[1]))
    said = []
    for key, on in ordered[:most]:
        shown = factors[key][:_MOST_FACTORS]
        more = [" and others"] if len(factors[key]) > len(shown) else []
        seen = ", ".join(shown) + "".join(more)
        said.append(f"{key[0]} {seen}{key[1]} on {len(on)} shape{'s' * (len(on) > 1)}")
    rest = len(ordered) - most
    return [*said, f"and {rest} more finding{'s' * (rest > 1)}"] if rest > 0 else said


def finding_of(bad: Sequence[Row]) -> str:
    """Say in a few words what is wrong with a case, given its failing rows, earliest first."""
    if not bad:
        return ""
    compared = [row for row in bad if row.quantity is not None]
    if not compared:
        return (bad[0].reason or "no reason given").strip().splitlines()[0]
    return _finding(compared[0])


def _finding(row: Row) -> str:
    what, factor, causes = _said(row)
    return f"{what} {factor}{causes}"


def _said(row: Row) -> tuple[str, str, str]:
    """Say what is wrong in a row, how, and why."""
    what = f"{row.family} {row.quantity}" if row.family else str(row.quantity)
    if row.verdict == "leak":
        return what, "leaks precision", ""
    causes = f" = {' or '.join(row.causes)}" if row.causes else ""
    if row.scale is not None and abs(row.scale - 1) >= 5e-4:
        return what, f"x{row.scale:.3f}", causes
    return what, "differs", causes


def first_error(rows: Iterable[Row]) -> str:
    """Give the first line of the first error."""
    reasons = [row.reason or "no reason given" for row in rows if row.verdict == "error"]
    first = reasons[0].strip().splitlines()[0] if reasons else "no row"
    return first.rstrip(".")


# --- how numbers and lines read -----------------------------------------------------------------


def number(value: object, header: str = "") -> str:
    """Write a number so that a column of them can be read down: scales plain, errors short."""
    if value is None:
        return _NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if header in ("replica", "routing", "cases") and float(value).is_integer():
        return str(int(value))
    return f"{value:.6f}" if header.endswith("scale") else f"{value:.2e}"


def grid(
    lines: Sequence[Mapping[str, Any]],
    headers: Mapping[str, str],
    style: str = "simple",
    paint: Callable[[str], str] = str,
) -> str:
    """Lay lines out as a table of text; `paint` colours the verdicts."""
    from tabulate import tabulate

    def cell(key: str, value: object) -> str:
        text = number(value, key)
        return paint(text) if key == "verdict" else text

    body = [[cell(key, line.get(key)) for key in headers] for line in lines]
    right = [any(isinstance(line.get(key), int | float) for line in lines) for key in headers]
    align = ["right" if is_right else "left" for is_right in right]
    return str(tabulate(body, headers=list(headers.values()), tablefmt=style, colalign=align,
                        disable_numparse=True))  # fmt: skip


def describe(row: Row, folded: Mapping[str, int]) -> str:
    """Say what is wrong in one row: what, against what, by how much, and where it is worst.

    Args:
        row: of a failing case.
        folded: the case's shape; a row of another one is of the baseline's own run.
    """
    if row.quantity is None:
        return row.reason or row.verdict
    name = " ".join(str(p) for p in (row.family, row.quantity, row.tensor) if p)
    step = f", step {row.step}" if row.step is not None else ""
    run = "folded" if row.shape == folded else "baseline"
    said = [f"{name}: {run} run against {row.against}{step}: {row.verdict}"]
    if row.scale is not None:
        said.append(f"scale {row.scale:.6f}")
    said.append(f"error {number(row.error)} (allowed {number(row.threshold)})")
    if row.residual is not None:
        said.append(f"residual {row.residual:.1e}")
    if row.worst:
        said.append(f"worst at {_worst_place(row)}")
    if row.reason:
        said.append(row.reason)
    return ", ".join(said)


def block(failure: Failure) -> str:
    """Write one failing case for a terminal: findings, causes, the rank's traceback, the rerun."""
    compared = [row for row in failure.rows if row.quantity is not None]
    finding = f": {_finding(compared[0])}" if compared else ""
    said = [f"{failure.verdict.upper()}{failure.known} {failure.case}{finding}"]
    if compared:
        said.append(grid([_row_line(row, failure.shape) for row in compared], ROW_HEADERS))
    said += dict.fromkeys(row.reason for row in failure.rows if row.reason)
    said += ["\n".join(_traceback(row)) for row in failure.rows if _traceback(row)]
    if failure.causes:
        said.append(f"causes: {', '.join(failure.causes)}")
    said.append(f"rerun: {failure.rerun}")
    return "\n".join([said[0], *(f"  {line}" for text in said[1:] for line in text.splitlines())])


def _row_line(row: Row, folded: Mapping[str, int]) -> dict[str, Any]:
    run = "folded" if row.shape == folded else "baseline"
    return {
        "quantity": row.quantity, "tensor": row.tensor or row.family or _NONE,
        "family": row.family or _NONE, "run": run, "against": row.against or _NONE,
        "step": _NONE if row.step is None else str(row.step), "scale": row.scale,
        "error": row.error, "threshold": row.threshold, "worst": _worst_place(row),
        "verdict": row.verdict,
    }  # fmt: skip


def _worst_place(row: Row) -> str:
    worst = {k: v for k, v in (row.worst or {}).items() if v is not None}
    return " ".join(f"{key} {value}" for key, value in worst.items()) or _NONE


def _traceback(row: Row) -> list[str]:
    traceback = (row.detail or {}).get("traceback")
    if not traceback or (row.reason and str(traceback).strip() in row.reason):
        return []
    return str(traceback).rstrip().splitlines()


def terminal(
    rows: Sequence[Row], rerun: Rerun, *, paint: Callable[[str], str] = str, most: int = 20,
    known: Assessment | None = None,
) -> str:  # fmt: skip
    """Write the whole report for a terminal: tables, failing cases, skips, the headline last."""
    halves = [
        (family_lines(rows, known), FAMILY_HEADERS), (model_lines(rows, known), MODEL_HEADERS),
    ]  # fmt: skip
    parts = [
        grid(lines, shown_headers(heads, lines), paint=paint) for lines, heads in halves if lines
    ]
    failing = [f for f in failures(rows, rerun, known=known) if not f.is_known]
    parts += [block(failure) for failure in failing[:most]]
    if len(failing) > most:
        parts.append(f"... and {len(failing) - most} more failing cases, see the report")
    if said := known_lines(known):
        parts.append("\n".join(said))
    parts += skips(rows)
    return "\n\n".join([*parts, headline(rows, known)])


def known_lines(known: Assessment | None, most: int = 3) -> list[str]:
    """Say which cells fail as known, a line per finding; then which findings show otherwise."""
    if known is None:
        return []
    said = []
    for finding, cells in known.known_cells().items():
        title = f" ({known.titles[finding]})" if finding in known.titles else ""
        more = f" and {len(cells) - most} more" if len(cells) > most else ""
        said.append(f"known {finding}{title}: {', '.join(cells[:most])}{more}")
    return [*said, *(f"note: {note}" for note in known.notes)]


def skips(rows: Iterable[Row]) -> list[str]:
    """Say what was skipped and why, once per reason."""
    cases: dict[str, set[str]] = {}
    for row in rows:
        if row.verdict == "skipped":
            cases.setdefault(row.reason or "no reason given", set()).add(row.case)
    return [
        f"skipped in {len(ids)} case{'s' * (len(ids) > 1)}: {reason}"
        for reason, ids in cases.items()
    ]
