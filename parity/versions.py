"""The same cases on several versions of a judged package -> one table: versions across, cells down.

Owns running a version in its own process and the table. Must not know how an environment is made.
Easy to get wrong: a version that could not be installed or run has no verdicts, which is neither a
pass nor a failure, and must not cost what other versions have shown.
"""

from __future__ import annotations

import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.errors import InfrastructureError, UsageError
from parity.known import FailOn, KnownFindings, assess
from parity.report import tables
from parity.report.cells import cells
from parity.session import Selection, exit_code_of
from parity.store import FAILING, RESULTS, VERDICTS, RunDirectory

_LAST_LINES = 12
_NOTHING = "-"
_SAME = ("suite", "selectors", "cases", "implementation", "device")
"""Of a selection: what a run found in the folder must have been asked for as well."""


@dataclass(frozen=True)
class Column:
    """What one version showed."""

    version: str
    directory: Path | None = None
    exit_code: int = InfrastructureError.exit_code
    problem: str | None = None
    """Why it has no verdicts, or not all of them."""
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """Case -> verdict."""
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Failing case -> known findings, and `NEW` where it fails in more."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Skipped or failing case -> why, in a few words."""

    def text(self, case: str) -> str:
        """Write a cell: the verdict, and what is known of it."""
        return " ".join((self.verdicts.get(case, _NOTHING), *self.marks.get(case, ())))


def is_finished(directory: Path, selection: Selection) -> bool:
    """Tell whether a folder holds a finished run of the selection.

    Raises:
        UsageError: it holds a run of something else.
    """
    if not (directory / RESULTS).is_file():
        return False
    run = RunDirectory.open(directory).run()
    before, asked = Selection.from_run(run), selection
    for name in _SAME:
        if getattr(before, name) != getattr(asked, name):
            problem = f"holds a run with {name} = {getattr(before, name)!r}"
            raise UsageError(
                f"{directory}: {problem}, not {getattr(asked, name)!r}; give another --out"
            )
    return run.get("state") == "finished"


def run_version(
    python: Path, environ: Mapping[str, str], directory: Path, selection: Selection,
    options: Sequence[str], say: Callable[[str], None],
) -> str | None:  # fmt: skip
    """Run the cases with another interpreter, going on where a run was cut off.

    Args:
        python: the interpreter.
        environ: its variables.
        directory: run directory.
        selection: what is run.
        options: further words for `parity run`.
        say: is given every line of its progress.

    Returns:
        Its last words where it wrote no results or did not end by itself, else None.
    """
    begun = (directory / RESULTS).is_file()
    words = ["--resume", str(directory)] if begun else [*_words(selection), "--out", str(directory)]
    command = [str(python), "-m", "parity", "run", *words, *options]
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with subprocess.Popen(
        command, env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                last.append(line.rstrip())
                say(line.rstrip())
        except BaseException:
            process.terminate()  # it writes the report of what has finished
            raise
    is_verdict = process.returncode in (0, 1, 3, 5) and (directory / RESULTS).is_file()
    return None if is_verdict else "\n".join([f"exit code {process.returncode}", *last])


def _words(selection: Selection) -> list[str]:
    options = {
        "--suite": selection.suite, "--cases": selection.cases, "--device": selection.device,
        "--implementation": selection.implementation,
    }  # fmt: skip
    given = [word for key, value in options.items() if value for word in (key, value)]
    return [*selection.selectors, *given]


def column_of(
    version: str, directory: Path, listed: KnownFindings, fail_on: FailOn,
    problem: str | None = None,
) -> Column:  # fmt: skip
    """Read what a version showed off its run directory."""
    if not (directory / RESULTS).is_file():
        return Column(version, problem=problem)
    opened = RunDirectory.open(directory)
    rows = opened.rows()
    known = assess(rows, listed, opened.run().get("versions") or {})
    judged = {cell.case: cell for cell in cells(rows)}
    verdicts = {case: cell.verdict for case, cell in judged.items()}
    reasons = {
        case: tables.finding_of(cell.bad) or "; ".join(cell.reasons)
        for case, cell in judged.items()
        if cell.verdict != "pass"
    }
    code = InfrastructureError.exit_code if problem else exit_code_of(rows, known, fail_on)
    return Column(version, directory, code, problem, verdicts, known.marks, reasons)


def exit_code(columns: Iterable[Column]) -> int:
    """Give the exit code of all versions together: 3 wins over 1, and nothing but skips is 5."""
    codes = {column.exit_code for column in columns}
    return next((code for code in (3, 1, 0) if code in codes), 5)


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One cell over all versions."""

    case: str
    texts: tuple[str, ...]
    first_good: str | None
    first_bad: str | None

    @property
    def changes(self) -> bool:
        """Tell whether versions that ran it differ."""
        return len({text for text in self.texts if text != _NOTHING}) > 1


def lines_of(columns: Sequence[Column]) -> list[Line]:
    """Give one line a cell, those that change first."""
    cases = dict.fromkeys(case for column in columns for case in column.verdicts)
    lines = []
    for case in cases:
        verdicts = [(column.version, column.verdicts.get(case)) for column in columns]
        good = [version for version, verdict in verdicts if verdict == "pass"]
        bad = [version for version, verdict in verdicts if verdict in FAILING]
        texts = tuple(column.text(case) for column in columns)
        lines.append(Line(case, texts, next(iter(good), None), next(iter(bad), None)))
    return sorted(lines, key=lambda line: not line.changes)


def markdown(columns: Sequence[Column], package: str, command: str) -> str:
    """Write the table with its counts, and why versions have no verdicts."""
    versions = [column.version for column in columns]
    heads = {"verdict": "cells", **{v: v for v in versions}}
    counts = [
        {
            "verdict": verdict,
            **{c.version: str([*c.verdicts.values()].count(verdict)) for c in columns},
        }
        for verdict in VERDICTS
    ]
    parts = [f"# Versions of {package}", f"`{command}`", tables.grid(counts, heads, "github")]
    parts += [
        f"{package} {column.version}:\n\n```text\n{column.problem}\n```"
        for column in columns
        if column.problem
    ]
    heads = {"case": "cell", **{v: v for v in versions},
             "first_good": "first good", "first_bad": "first bad"}  # fmt: skip
    lines = lines_of(columns)
    told = [
        {"case": f"`{line.case}`", **dict(zip(versions, line.texts, strict=True)),
         "first_good": line.first_good, "first_bad": line.first_bad}
        for line in lines
    ]  # fmt: skip
    parts += ["\n".join(said)] if (said := list(_reasons(columns))) else []
    changing = sum(line.changes for line in lines)
    for title, some in (("differ", told[:changing]), ("do not differ", told[changing:])):
        if some:
            parts += [f"## Cells that {title}", tables.grid(some, heads, "github")]
    return "\n\n".join(parts) + "\n"


def _reasons(columns: Sequence[Column], most: int = 3) -> Iterable[str]:
    """Say why cells were skipped, and how they fail where that is not known."""
    versions: dict[tuple[str, str, str], list[str]] = {}
    for column in columns:
        for case, reason in column.reasons.items():
            if tables.NEW in column.marks.get(case, (tables.NEW,)):
                about = (case, column.verdicts[case], _brief(reason))
                versions.setdefault(about, []).append(column.version)
    cases: dict[tuple[str, str, str], list[str]] = {}
    ordered = [column.version for column in columns]
    for (case, verdict, reason), where in versions.items():
        cases.setdefault((_span(where, ordered), verdict, reason), []).append(f"`{case}`")
    for (span, verdict, reason), some in sorted(cases.items()):
        more = f" and {len(some) - most} more" if len(some) > most else ""
        yield f"- {span} {verdict}: {reason}: {', '.join(some[:most])}{more}"


def _span(versions: Sequence[str], ordered: Sequence[str]) -> str:
    """Write neighbours as `first to last`."""
    first = ordered.index(versions[0])
    if len(versions) > 2 and [*versions] == [*ordered[first : first + len(versions)]]:
        return f"{versions[0]} to {versions[-1]}"
    return ", ".join(versions)


def _brief(reason: str) -> str:
    """Cut what differs from one version to the next: which rank it was, and in which file."""
    said = re.sub(r"^rank \d+ raised ", "", " ".join(reason.split()))
    return said.partition("; folded away")[0].partition(" at /")[0].rstrip(".")


def to_dict(columns: Sequence[Column], package: str, command: str, code: int) -> dict[str, Any]:
    """Give everything for another program."""
    return {
        "schema": 1, "package": package, "command": command, "exit_code": code,
        "versions": [
            {"version": c.version, "directory": c.directory and str(c.directory),
             "exit_code": c.exit_code, "problem": c.problem, "reasons": dict(c.reasons)}
            for c in columns
        ],
        "cells": [
            {"case": line.case, "verdicts": {c.version: c.verdicts.get(line.case) for c in columns},
             "known": {c.version: [*c.marks.get(line.case, ())] for c in columns},
             "first_good": line.first_good, "first_bad": line.first_bad, "changes": line.changes}
            for line in lines_of(columns)
        ],
    }  # fmt: skip
