"""Cells -> ctrf.json, the Common Test Report Format (ctrf.io).

Owns the mapping to its schema. Must not know files. Easy to get wrong: times are whole
milliseconds, and an id must stay the same for the same cell in every run.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from parity import __version__
from parity.report import tables
from parity.report.cells import Cell
from parity.report.junit import about, told
from parity.report.tables import Rerun

SPEC_VERSION = "0.0.0"
"""The schema is published as 0.0; the format asks for three numbers."""
_STATUS = {"pass": "passed", "skipped": "skipped"}
_SPACE = uuid.UUID("6f2b6c5e-7a0d-5d0b-9f8a-3d6f0c1e4b27")


def document(cells: Sequence[Cell], run: Mapping[str, Any], rerun: Rerun) -> dict[str, Any]:
    """Build the document of one run.

    Args:
        cells: every cell of the run.
        run: run.json; without its times, start and stop are 0.
        rerun: case id -> the command that runs just that case again.
    """
    statuses = [_STATUS.get(cell.verdict, "failed") for cell in cells]
    kinds = {kind: statuses.count(kind) for kind in ("passed", "failed", "skipped")}
    start = _milliseconds(run.get("started"))
    total = round(1000 * float((run.get("seconds") or {}).get("total") or 0.0))
    return {
        "reportFormat": "CTRF", "specVersion": SPEC_VERSION, "generatedBy": "parity",
        **({"reportId": run["id"]} if run.get("id") else {}),
        **({"timestamp": run["started"]} if run.get("started") else {}),
        "results": {
            "tool": {"name": "parity", "version": __version__},
            "summary": {"tests": len(cells), **kinds, "pending": 0, "other": 0,
                        "start": start, "stop": start + total},
            "tests": [_test(cell, run, rerun) for cell in cells],
            "environment": _environment(run),
        },
    }  # fmt: skip


def _test(cell: Cell, run: Mapping[str, Any], rerun: Rerun) -> dict[str, Any]:
    status = _STATUS.get(cell.verdict, "failed")
    test: dict[str, Any] = {
        "id": str(uuid.uuid5(_SPACE, f"{cell.implementation}::{cell.case}")),
        "name": cell.case, "status": status, "duration": round(1000 * (cell.seconds or 0.0)),
        "suite": ["parity", cell.implementation], "rawStatus": cell.verdict, "type": "parity",
        "labels": {key: value for key, value in about(cell, run).items() if value is not None},
    }  # fmt: skip
    if status != "passed":
        test["message"] = tables.finding_of(cell.bad) or "; ".join(cell.reasons)
        test["trace"] = told(cell, rerun)
    return test


def _environment(run: Mapping[str, Any]) -> dict[str, Any]:
    devices, versions = run.get("devices") or {}, run.get("versions") or {}
    known = {"commit": run.get("commit"), "osPlatform": devices.get("system")}
    given = {key: str(value) for key, value in known.items() if value}
    return {**given, "extra": {"versions": versions, "devices": devices}}


def _milliseconds(stamp: object) -> int:
    return round(1000 * datetime.fromisoformat(stamp).timestamp()) if isinstance(stamp, str) else 0
