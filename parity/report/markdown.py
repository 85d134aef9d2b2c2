"""Rows and run.json -> report.md.

Owns the order of the sections. Must not know files. Easy to get wrong: a `|` or a line break in a
reason breaks a table, so reasons stand in lists and tracebacks in fences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parity.known import Assessment
from parity.report import tables
from parity.report.tables import Failure, Rerun
from parity.store import Row

_MARGIN_HEADERS = {
    "quantity": "quantity", "dtype": "dtype", "error": "largest passing error",
    "threshold": "threshold", "used": "used", "tensor": "tensor", "case": "case",
}  # fmt: skip


def render(
    rows: Sequence[Row], run: Mapping[str, Any], rerun: Rerun, known: Assessment | None = None
) -> str:
    """Write the report of one run.

    Args:
        rows: every row of the run.
        run: run.json; what it lacks is left out.
        rerun: case id -> the command that runs just that case again.
        known: what of its failures is known.
    """
    parts = ["# Parity report", f"**{tables.headline(rows, known)}**", _facts(run)]
    if said := tables.known_lines(known):
        parts += ["## Known findings", "\n".join(f"- {_line(line)}" for line in said)]
    failing = tables.failures(rows, rerun, known=known)
    if failing:
        parts += ["## Failing cases", *map(_failure, failing)]
    families, model = tables.family_lines(rows, known), tables.model_lines(rows, known)
    if families:
        parts += ["## Families", _FAMILY_LEGEND, _grid(families, tables.FAMILY_HEADERS)]
    if model:
        parts += ["## Whole model", _grid(model, tables.MODEL_HEADERS)]
    if margins := tables.margin_lines(rows):
        parts += ["## Margins", _grid(margins, _MARGIN_HEADERS)]
    if skipped := tables.skips(rows):
        parts += ["## Skipped", "\n".join(f"- {_line(reason)}" for reason in skipped)]
    return "\n\n".join(part for part in parts if part) + "\n"


_FAMILY_LEGEND = (
    "One line per shape, optimizer and family over all of its cases: the scale farthest from 1, "
    "the largest error, against the one-process reference and the non-folded baseline."
)


def _grid(lines: Sequence[Mapping[str, Any]], headers: Mapping[str, str]) -> str:
    shown = tables.shown_headers(headers, lines) if "finding" in headers else headers
    return tables.grid(lines, shown, style="github")


def _facts(run: Mapping[str, Any]) -> str:
    """List what ran, where, and how long it took."""
    versions, devices = run.get("versions") or {}, run.get("devices") or {}
    seconds, selection = run.get("seconds") or {}, run.get("selection") or {}
    gpus = devices.get("gpus") or []
    facts = {
        "state": run.get("state"),
        "command": f"`{run['command']}`" if run.get("command") else None,
        "implementation": selection.get("implementation"),
        "not offered by it": ", ".join(run.get("absent") or ()),
        "commit": run.get("commit"),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
        "devices": f"{devices['cores']} cores, {devices.get('cpu')}" if devices else None,
        "gpus": ", ".join(gpus),
        "seconds": ", ".join(f"{name} {value}" for name, value in _flat(seconds)),
    }
    return "\n".join(f"- {name}: {_line(str(fact))}" for name, fact in facts.items() if fact)


def _flat(seconds: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write the times of a run as pairs, medians per world size one by one."""
    found = []
    for name, value in seconds.items():
        if isinstance(value, Mapping):
            found += [(f"median world {world}:", f"{v:.3f}") for world, v in value.items()]
        elif value is not None:
            found.append((f"{name}:", f"{value:.3f}"))
    return found


def _failure(failure: Failure) -> str:
    parts = [f"### {failure.verdict}{failure.known}: `{failure.case}`"]
    parts += ["\n".join(f"- {_line(tables.describe(row, failure.shape))}" for row in failure.rows)]
    parts += [f"```text\n{trace}\n```" for trace in map(_traceback, failure.rows) if trace]
    if failure.causes:
        parts.append(f"Causes that fit: {', '.join(f'`{cause}`' for cause in failure.causes)}")
    return "\n\n".join([*parts, f"```sh\n{failure.rerun}\n```"])


def _traceback(row: Row) -> str:
    return str((row.detail or {}).get("traceback") or "").rstrip().replace("```", "'''")


def _line(text: str) -> str:
    return " ".join(text.split())
