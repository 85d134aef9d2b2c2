"""Known findings: which failing rows a list in TOML accounts for, and what of a run is new.

Owns the form of the list and the matching of rows. Must not know how a report looks. Easy to get
wrong: a cell is known only if *every* failing row of it is accounted for, and it still fails.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from parity.case import Part
from parity.case_files import display, load_toml
from parity.errors import CaseError
from parity.report.tables import NEW, folded_shape
from parity.store import FAILING, Row, by_case, case_verdict

Quantity = Literal["routing", "loss", "gradient", "replica", "grad_norm", "update", "checkpoint"]
Family = Literal[
    "router", "layernorm", "dense", "attention", "embedding", "expert", "shared_expert"
]
Run = Literal["folded", "baseline"]
FailOn = Literal["any", "new"]
_Cases = Mapping[str, Sequence[Row]]
_MOST_NAMES = 3


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError('version specifiers such as "==0.19.8" or ">=0.19.3,<0.20"') from None
    return text


class Known(Part):
    """What one finding does to the rows of some cells."""

    finding: Annotated[str, Field(min_length=1)]
    """Number of docs/findings/NNNN-*, or whatever the reader finds it by."""
    implementation: str
    package: str | None = None
    """Distribution whose version counts; None: named like the implementation."""
    versions: Annotated[str, AfterValidator(_specifier)] = ""
    """Of the package, as in PEP 440; empty: every one."""
    cases: Annotated[tuple[str, ...], Field(min_length=1)]
    """Globs over case ids."""
    exceptions: Annotated[tuple[str, ...], Field(alias="except")] = ()
    """Globs over case ids that are none of it."""
    quantities: tuple[Quantity, ...] = ()
    families: tuple[Family, ...] = ()
    """Of the rows that are about a family; empty: every one."""
    runs: Annotated[tuple[Run, ...], Field(min_length=1)] = ("folded",)
    """Whose numbers."""
    error: Annotated[str, Field(min_length=1)] | None = None
    """Words in the reason of a case that errored."""

    @model_validator(mode="after")
    def _names_something(self) -> Known:
        if not (self.quantities or self.error):
            raise ValueError("quantities of the failing rows, or error: words in the reason")
        if self.families and not self.quantities:
            raise ValueError("families only beside quantities")
        return self

    @property
    def judged(self) -> str:
        """Name the distribution whose version counts."""
        return self.package or self.implementation

    def is_about(self, case: str) -> bool:
        """Tell whether it is about a case."""
        return _any(self.cases, case) and not _any(self.exceptions, case)

    def covers(self, version: str | None) -> bool:
        """Tell whether a version is one it was seen in; an unknown one is in no range."""
        if version is None:
            return not self.versions
        return SpecifierSet(self.versions).contains(Version(version), prereleases=True)

    def accounts_for(self, row: Row, run: str) -> bool:
        """Tell whether it is why a failing row of a case it is about fails.

        Args:
            row: the failing row.
            run: whose numbers: folded or baseline.
        """
        if row.quantity is None:
            return self.error is not None and self.error in (row.reason or "")
        is_named = row.quantity in self.quantities and run in self.runs
        return is_named and (not self.families or row.family in (None, *self.families))


class _File(BaseModel, extra="forbid"):
    known: list[Known]


@dataclass(frozen=True)
class KnownFindings:
    """A list of known findings, and their titles where their pages lie beside it."""

    entries: tuple[Known, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def packages(self) -> set[str]:
        """Name the distributions whose versions count."""
        return {entry.judged for entry in self.entries}


def load(path: Path | None = None) -> KnownFindings:
    """Read a list; by default the one of this project, where it came with the package.

    Raises:
        CaseError: the file cannot be read, or an entry is malformed.
    """
    path = path or _shipped()
    if path is None:
        return KnownFindings()
    file = display(path)
    try:
        table = load_toml(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise CaseError(f"cannot be read: {problem.strerror}", file=file) from None
    except ValueError as problem:  # TOML or UTF-8
        raise CaseError(f"malformed TOML: {problem}", file=file) from None
    try:  # strict JSON mode: no 3 for "0003"
        parsed = _File.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as problems:
        raise _refusal(problems, file) from None
    ids = dict.fromkeys(entry.finding for entry in parsed.known)
    titles = {name: title for name in ids if (title := _title(path.parent, name))}
    return KnownFindings(tuple(parsed.known), titles)


def _shipped() -> Path | None:
    package = Path(__file__).resolve().parent
    places = (package.parent / "docs" / "findings", package / "findings")
    return next((p for folder in places if (p := folder / "known.toml").is_file()), None)


def _title(folder: Path, finding: str) -> str | None:
    """Read the heading of the finding's page, without its number."""
    for page in sorted(folder.glob(f"{finding}-*.md")):
        first = page.read_text(encoding="utf-8").partition("\n")[0]
        return re.sub(rf"^#\s*{re.escape(finding)}:?\s*", "", first)
    return None


def _refusal(problems: ValidationError, file: str) -> CaseError:
    """Word pydantic's first complaint; a mistyped key also leaves the right one missing."""
    errors = problems.errors()
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in error["loc"])[1:]
    if error["type"] == "missing":
        return CaseError("required key is missing", file=file, key=key)
    where = {"file": file, "key": key, "value": error["input"]}
    if error["type"] == "extra_forbidden":
        part = Known if len(error["loc"]) > 1 else _File
        keys = [entry.alias or name for name, entry in part.model_fields.items()]
        return CaseError("unknown key", **where, allowed=keys)
    expected = (error.get("ctx") or {}).get("expected") or error["msg"]
    allowed = str(expected).removeprefix("Input should be ").removeprefix("Value error, ")
    return CaseError("value not allowed", **where, allowed=allowed)


def _any(patterns: Iterable[str], case: str) -> bool:
    return any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns)


# --- a run against the list ---------------------------------------------------------------------


@dataclass(frozen=True)
class Assessment:
    """What of a run's failures is known; by default nothing is."""

    about: Mapping[str, Sequence[Known]] = field(default_factory=dict)
    """Case -> entries that are about it."""
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Failing case that shows findings -> the findings, and `NEW` last if it fails in more."""
    notes: tuple[str, ...] = ()
    """Findings that no longer show, or show in other versions."""
    titles: Mapping[str, str] = field(default_factory=dict)

    def is_known(self, case: str) -> bool:
        """Tell whether a case fails in nothing but known findings."""
        return NEW not in self.marks.get(case, (NEW,))

    def marks_of(self, row: Row, folded: Mapping[str, int]) -> tuple[str, ...]:
        """Give the findings that account for a failing row, or `NEW`.

        Args:
            row: a failing row.
            folded: the shape of its case; a row of another one is of the baseline's own run.
        """
        run = "folded" if row.shape == folded else "baseline"
        entries = self.about.get(row.case, ())
        return tuple(sorted({e.finding for e in entries if e.accounts_for(row, run)})) or (NEW,)

    def known_cells(self) -> dict[str, list[str]]:
        """Map each finding to the known cases that show it."""
        cells: dict[str, list[str]] = {}
        for case in filter(self.is_known, self.marks):
            for finding in self.marks[case]:
                cells.setdefault(finding, []).append(case)
        return dict(sorted(cells.items()))

    def to_dict(self) -> dict[str, Any]:
        """Give it as a part of run.json."""
        cells = {case: list(marks) for case, marks in self.marks.items()}
        return {"cells": cells, "notes": list(self.notes)}


def assess(
    rows: Iterable[Row], listed: KnownFindings, versions: Mapping[str, str | None]
) -> Assessment:
    """Hold a run's rows against a list.

    Args:
        rows: of the whole run.
        listed: the list.
        versions: distribution -> version, as run.json has them.
    """
    if not listed.entries:
        return Assessment()
    cases = by_case(rows)
    current = [e for e in listed.entries if e.covers(versions.get(e.judged))]
    others = [e for e in listed.entries if e not in current and versions.get(e.judged)]
    held = _held_against(cases, current)
    unexplained = {case: rows for case, rows in cases.items() if not held.is_known(case)}
    notes = [*_quiet(cases, held, current, versions), *_elsewhere(unexplained, others, versions)]
    return replace(held, notes=tuple(notes), titles=listed.titles)


def _held_against(cases: _Cases, entries: Sequence[Known]) -> Assessment:
    about = {
        case: [
            e for e in entries if e.is_about(case) and e.implementation == rows[0].implementation
        ]
        for case, rows in cases.items()
    }
    found = Assessment(about)
    marks = {case: _marks(rows, found) for case, rows in cases.items() if found.about[case]}
    return replace(found, marks={c: shown for c, shown in marks.items() if set(shown) - {NEW}})


def _marks(rows: Sequence[Row], found: Assessment) -> tuple[str, ...]:
    """Give the findings that failing rows of a case show, `NEW` last where one shows none."""
    bad = [row for row in rows if row.verdict in FAILING]
    folded = folded_shape(rows) if bad else {}
    marks = {mark for row in bad for mark in found.marks_of(row, folded)}
    return tuple(sorted(marks, key=lambda mark: (mark == NEW, mark)))


def _quiet(
    cases: _Cases, held: Assessment, entries: Iterable[Known], versions: Mapping[str, str | None]
) -> Iterable[str]:
    """Say which findings do not show where they are expected."""
    for finding, package in _distinct(entries, versions).items():
        judged = _judged(finding, cases, held)
        quiet = [case for case in judged if finding not in held.marks.get(case, ())]
        if judged and len(quiet) == len(judged):
            yield f"{finding} does not show in {package}: {_names(quiet)}. Is it fixed?"
        elif quiet:
            yield f"{finding} does not show in {len(quiet)} of {len(judged)} cells: {_names(quiet)}"


def _elsewhere(
    cases: _Cases, entries: Sequence[Known], versions: Mapping[str, str | None]
) -> Iterable[str]:
    """Say which findings show, or do not, in a version that they are not about.

    Of cells that no finding of this version explains: two may fail in the same rows.
    """
    held = _held_against(cases, entries)
    for finding, package in _distinct(entries, versions).items():
        span = next(entry.versions for entry in entries if entry.finding == finding)
        shown = [case for case, marks in held.marks.items() if finding in marks]
        judged = _judged(finding, cases, held)
        if shown:
            yield f"{finding}, known of {span}, shows in {package} too: {_names(shown)}"
        elif judged:
            yield f"{finding}, known of {span}, does not show in {package}: {_names(judged)}"


def _distinct(entries: Iterable[Known], versions: Mapping[str, str | None]) -> dict[str, str]:
    """Map each finding to the package it is about, with its version."""
    return {e.finding: " ".join(filter(None, (e.judged, versions.get(e.judged)))) for e in entries}


def _judged(finding: str, cases: _Cases, held: Assessment) -> list[str]:
    """List the cells a finding is about that ran far enough to show it."""
    found = []
    for case, rows in cases.items():
        verdict = case_verdict(rows)
        about = [entry for entry in held.about[case] if entry.finding == finding]
        if any(verdict != "error" or e.error for e in about) and verdict != "skipped":
            found.append(case)
    return found


def _names(cases: Sequence[str]) -> str:
    more = len(cases) - _MOST_NAMES
    return ", ".join(cases[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
