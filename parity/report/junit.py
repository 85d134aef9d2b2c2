"""Cells -> junit.xml, for the test tabs of CI services.

Owns the mapping of verdicts: fail and leak are failures, error is an error. Must not know files.
Easy to get wrong: the published schema (junit-10.xsd of Jenkins' xunit plugin) has properties on a
suite and none on a test case, so every cell is a suite of one test case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from parity.report import tables
from parity.report.cells import Cell
from parity.report.tables import Rerun

_ELEMENTS = {"fail": "failure", "leak": "failure", "error": "error", "skipped": "skipped"}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, such as the escape that begins a terminal's colour."""


def render(cells: Sequence[Cell], run: Mapping[str, Any], rerun: Rerun) -> str:
    """Write the XML of one run.

    Args:
        cells: every cell of the run.
        run: run.json, for the time stamp and the suite's properties.
        rerun: case id -> the command that runs just that case again.
    """
    root = ElementTree.Element("testsuites", {"name": "parity", **_sums(cells)})
    for cell in cells:
        root.append(_suite(cell, run, rerun))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _sums(cells: Sequence[Cell]) -> dict[str, str]:
    kinds = [_ELEMENTS.get(cell.verdict) for cell in cells]
    return {
        "tests": str(len(cells)), "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "time": _time(sum(cell.seconds or 0.0 for cell in cells)),
    }  # fmt: skip


def _suite(cell: Cell, run: Mapping[str, Any], rerun: Rerun) -> ElementTree.Element:
    sums = {**_sums([cell]), "skipped": str(int(cell.verdict == "skipped"))}
    stamp = {"timestamp": str(run["started"])} if run.get("started") else {}
    suite = ElementTree.Element("testsuite", {"name": _clean(cell.case), **sums, **stamp})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in about(cell, run).items():
        ElementTree.SubElement(properties, "property", name=name, value=_clean(str(value)))
    case = ElementTree.SubElement(
        suite, "testcase", name=_clean(cell.case), time=_time(cell.seconds or 0.0),
        classname=_clean(f"parity.{cell.implementation}"),
    )  # fmt: skip
    if kind := _ELEMENTS.get(cell.verdict):
        message = tables.finding_of(cell.bad) or "; ".join(cell.reasons)
        found = ElementTree.SubElement(case, kind, type=cell.verdict, message=_clean(message))
        found.text = _clean(told(cell, rerun))
    return suite


def about(cell: Cell, run: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a cell is, as flat properties."""
    nearest = max((entry.used or 0.0 for entry in cell.entries), default=0.0)
    engine = {f"engine.{key}": value for key, value in cell.engine.items()}
    shape = {f"shape.{key}": value for key, value in cell.shape.items()}
    causes = {"causes": ", ".join(cell.causes)} if cell.causes else {}
    return {
        "implementation": cell.implementation, "verdict": cell.verdict, **shape, **engine,
        "commit": run.get("commit", "unknown"), "margin_used": f"{nearest:.3g}", **causes,
    }  # fmt: skip


def told(cell: Cell, rerun: Rerun) -> str:
    """Tell a cell that did not pass: findings, causes, the rank's traceback, the rerun."""
    shown = tables.failure_of(cell.case, cell.verdict, cell.shape, cell.bad, rerun)
    return tables.block(shown) if cell.bad else "\n".join(cell.reasons)


def _time(seconds: float) -> str:
    return f"{seconds:.3f}"


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)
