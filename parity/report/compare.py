"""Two runs -> what got worse: the regression table of a pull request.

Owns what counts as worse and the order in which a reader meets it. Must not know files. Easy to
get wrong: a cell that no longer runs is no pass, and a comparison across machines, versions or
changed cases says so before it says anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parity.report import tables
from parity.report.cells import Cell, Entry
from parity.report.github import MOST_COMMENT_BYTES, Section, fitted
from parity.report.tables import Rerun
from parity.store import FAILING, VERDICTS, Row

MARKER = "<!-- parity-comment -->"
"""First line of the comment, by which the next run finds it again."""
MARGIN_SHRINK = 1_000.0
"""A passing error that grew by more than this is worth a note: 1e-16 -> 1e-9 still passes."""
GROWTH = 2.0
"""A failing error that grew by more than this got worse."""
ROUNDOFFS = 64.0
"""Thresholds are 64 round-offs; one number alone below one round-off of another is luck."""
_TINY = 1e-17
"""Stands for an error of exactly zero, in thresholds."""
_SINGLE = ("loss", "grad_norm")
_MACHINE = ("machine", "cpu", "cores", "gpus", "system")
_MOST_NAMES = 5

Kind = str
KINDS: Mapping[Kind, str] = {
    "worse": "Got worse", "lost": "No longer run", "still": "Still failing",
    "margin": "Closer to the limit", "fixed": "Fixed",
}  # fmt: skip
WORSE = ("worse", "lost")


@dataclass(frozen=True)
class Run:
    """One side: its cells, its run.json."""

    cells: Sequence[Cell]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """What became of one cell."""

    kind: Kind
    case: str
    label: str
    base_verdict: str | None
    head_verdict: str
    base: Entry | None
    head: Entry | None
    more: int
    """Further entries of the cell that fail as well."""
    causes: tuple[str, ...]
    reason: str
    margin: float | None
    """How many times nearer to its threshold the error is now."""
    rerun: str
    bad: tuple[Row, ...]

    @property
    def what(self) -> str:
        """Name what the numbers are of."""
        entry = self.head or self.base
        if entry is None:
            return self.reason.strip().split("\n")[0]
        run = " (baseline run)" if entry.run == "baseline" else ""
        return f"{entry.family or 'model'} {entry.quantity}{run}"


@dataclass(frozen=True)
class Comparison:
    """Everything found between two runs."""

    headline: str
    warnings: tuple[str, ...]
    changes: tuple[Change, ...]
    new: tuple[str, ...]
    vanished: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """case id, reason."""
    families: tuple[Mapping[str, Any], ...]
    """Passing cells, one line a family."""
    base: Mapping[str, Any]
    head: Mapping[str, Any]
    passed: int
    total: int

    def of(self, *kinds: Kind) -> list[Change]:
        """Give the changes of some kinds, in order."""
        return [change for change in self.changes if change.kind in kinds]

    def exit_code(self, *, fail_on_margin: bool = False) -> int:
        """Give 1 if anything got worse, 5 if the head judged nothing at all, else 0."""
        if self.of(*WORSE, *(["margin"] if fail_on_margin else [])):
            return 1
        return 0 if self.total else 5


def compare(base: Run, head: Run, rerun: Rerun) -> Comparison:
    """Compare two runs cell by cell.

    Args:
        base: the run before the change.
        head: the run after it.
        rerun: case id -> the command that runs just that case again, on the head.
    """
    keyed = _keyed(base.cells), _keyed(head.cells)
    changes = [c for key, cell in keyed[1].items() for c in _change(keyed[0].get(key), cell, rerun)]
    vanished = [cell for key, cell in keyed[0].items() if key not in keyed[1]]
    if head.about.get("state") not in (None, "finished"):
        changes += [_lost(cell, f"the head run is {head.about['state']}", rerun)
                    for cell in vanished if cell.verdict == "pass"]  # fmt: skip
    order = list(KINDS)
    changes.sort(key=lambda c: (order.index(c.kind), VERDICTS.index(c.head_verdict)))
    skipped = [c for c in head.cells if c.verdict == "skipped"]
    return Comparison(
        headline=_headline(changes, head.cells), warnings=tuple(_warnings(base, head)),
        changes=tuple(changes),
        new=tuple(cell.case for key, cell in keyed[1].items() if key not in keyed[0]),
        vanished=tuple(cell.case for cell in vanished),
        skipped=tuple((c.case, "; ".join(c.reasons)) for c in skipped),
        families=tuple(_families(keyed[0], keyed[1])), base=base.about, head=head.about,
        passed=sum(cell.verdict == "pass" for cell in head.cells), total=len(head.cells),
    )  # fmt: skip


def _keyed(cells: Iterable[Cell]) -> dict[tuple[str, str], Cell]:
    """Key cells by id, and by implementation where one run has several."""
    several = len({cell.implementation for cell in cells}) > 1
    return {(cell.case, cell.implementation if several else ""): cell for cell in cells}


# --- one cell -----------------------------------------------------------------------------------


def _change(base: Cell | None, head: Cell, rerun: Rerun) -> Iterable[Change]:
    """Say what became of a cell; nothing where it passed and passes."""
    was_failing = base is not None and base.verdict in FAILING
    if head.verdict in FAILING:
        yield _failed(base, head, rerun)
    elif head.verdict == "skipped":
        if base is not None and base.verdict != "skipped":
            yield _lost(head, "; ".join(head.reasons), rerun, before=base.verdict)
    elif was_failing and base is not None:
        yield _make("fixed", base, head, base.worst, rerun)
    elif base is not None and (nearer := _nearer(base, head)):
        yield _make("margin", base, head, nearer, rerun)


def _failed(base: Cell | None, head: Cell, rerun: Rerun) -> Change:
    before = {} if base is None else _by_place(base)
    wrong = [entry for entry in head.entries if entry.verdict in FAILING]
    fresh = [entry for entry in wrong if _is_worse(before.get(_place(entry)), entry)]
    rank = VERDICTS.index
    is_worse = base is None or rank(head.verdict) < rank(base.verdict) or bool(fresh)
    shown = next(iter(fresh or wrong), None)
    return _make("worse" if is_worse else "still", base, head, shown, rerun)


def _is_worse(base: Entry | None, head: Entry) -> bool:
    """Say whether a failing entry is new, of a worse kind, or grew."""
    if base is None or VERDICTS.index(head.verdict) < VERDICTS.index(base.verdict):
        return True
    before, now = base.row.error, head.row.error
    if now is None:
        return before is not None
    return before is not None and now > GROWTH * before


def _lost(cell: Cell, reason: str, rerun: Rerun, before: str = "pass") -> Change:
    return Change(
        "lost", cell.case, cell.label, before, "skipped", None, None, 0, (), reason, None,
        rerun(cell.case), (),
    )  # fmt: skip


def _make(kind: Kind, base: Cell | None, head: Cell, shown: Entry | None, rerun: Rerun) -> Change:
    place = None if shown is None else _place(shown)
    was = None if base is None or place is None else _by_place(base).get(place)
    now = None if place is None else _by_place(head).get(place)
    wrong = sum(entry.verdict in FAILING for entry in head.entries)
    reason = "; ".join(head.reasons) or tables.finding_of(head.bad)
    return Change(
        kind, head.case, head.label, None if base is None else base.verdict, head.verdict,
        was, now, max(0, wrong - 1), head.causes, reason, _shrink(was, now), rerun(head.case),
        head.bad,
    )  # fmt: skip


def _place(entry: Entry) -> tuple[str, str | None, str, str | None]:
    return entry.quantity, entry.family, entry.run, entry.against


def _by_place(cell: Cell) -> dict[tuple[str, str | None, str, str | None], Entry]:
    return {_place(entry): entry for entry in cell.entries}


def _nearer(base: Cell, head: Cell) -> Entry | None:
    """Find the passing entry whose margin shrank most, if any shrank by more than allowed."""
    before = _by_place(base)
    found = [(_shrink(before.get(_place(entry)), entry) or 0.0, entry) for entry in head.entries]
    shrunk, entry = max(found, key=lambda pair: pair[0], default=(0.0, None))
    return entry if shrunk > MARGIN_SHRINK else None


def _shrink(base: Entry | None, head: Entry | None) -> float | None:
    """Give how many times nearer to its threshold an error is; None where there is no margin."""
    if base is None or head is None or base.used is None or head.used is None:
        return None
    floor = 1 / ROUNDOFFS if head.quantity in _SINGLE else _TINY
    return max(head.used, floor) / max(base.used, floor)


# --- both runs ----------------------------------------------------------------------------------


def _headline(changes: Sequence[Change], head: Sequence[Cell]) -> str:
    total = len(head)
    if not total:
        return "The head run judged no cell."
    worse = [change for change in changes if change.kind == "worse"]
    lost = sum(change.kind == "lost" for change in changes)
    said = []
    if worse:
        said.append(f"{len(worse)} of {total} cells got worse: {_found(worse)}.")
    if lost:
        said.append(f"{lost} cell{'s' * (lost > 1)} that passed {'are' if lost > 1 else 'is'} "
                    "no longer run.")  # fmt: skip
    if not said:
        passed = sum(cell.verdict == "pass" for cell in head)
        said.append(f"Nothing got worse: {passed} of {total} cells pass.")
    if still := [change for change in changes if change.kind == "still"]:
        said.append(f"{len(still)} still failing: {_found(still)}.")
    for kind, text in (("fixed", "fixed"), ("margin", "closer to the limit")):
        if count := sum(change.kind == kind for change in changes):
            said.append(f"{count} {text}.")
    return " ".join(said)


def _found(changes: Sequence[Change]) -> str:
    """Sum findings up; a cause that fits every cell takes the place of those that fit some."""
    said = [set(change.causes) for change in changes if change.causes]
    common = set.intersection(*said) if said else set()
    rows = [
        replace(row, causes=[c for c in row.causes if c in common] or row.causes)
        for change in changes
        for row in change.bad
    ]
    errors = [row for row in rows if row.verdict == "error"]
    found = tables.findings([row for row in rows if row.verdict != "error"])
    return "; ".join([*found, *([tables.first_error(errors)] if errors else [])])


def _warnings(base: Run, head: Run) -> Iterable[str]:
    """Say in which ways the two runs are not alike."""
    for name, run in (("base", base), ("head", head)):
        state = run.about.get("state")
        if not run.cells:
            yield f"the {name} run holds no result"
        elif state not in (None, "finished"):
            yield f"the {name} run is {state}, its cells are not all there"
    for name in ("devices", "versions", "environment"):
        if differing := _differing(base.about.get(name), head.about.get(name), name):
            yield f"{'machines' if name == 'devices' else name} differ: {differing}"
    given = [", ".join(sorted({cell.implementation for cell in run.cells})) for run in (base, head)]
    if given[0] != given[1] and all(given):
        yield f"implementations differ: {given[0]} -> {given[1]}"
    if changed := _redefined(base.about, head.about):
        yield f"case definitions differ in {_named(changed)}: not the same cells, whatever their id"


def _differing(base: object, head: object, name: str) -> str:
    if not isinstance(base, Mapping) or not isinstance(head, Mapping):
        return ""
    keys = _MACHINE if name == "devices" else sorted({*base, *head})
    return ", ".join(
        f"{key} {_said(base.get(key))} -> {_said(head.get(key))}"
        for key in keys
        if base.get(key) != head.get(key)
    )


def _said(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _redefined(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    before, now = base.get("definitions") or {}, head.get("definitions") or {}
    return [case for case, hashed in now.items() if before.get(case, hashed) != hashed]


def _named(cases: Sequence[str]) -> str:
    """Name the first cells of many."""
    shown = ", ".join(cases[:_MOST_NAMES])
    rest = len(cases) - _MOST_NAMES
    count = f"{len(cases)} cell{'s' * (len(cases) > 1)}"
    return f"{count} ({shown}{f', and {rest} more' if rest > 0 else ''})"


def _families(
    base: Mapping[tuple[str, str], Cell], head: Mapping[tuple[str, str], Cell]
) -> Iterable[Mapping[str, Any]]:
    """Sum passing cells up, one line a family, with the largest share of a threshold in use."""
    passing = {key: cell for key, cell in head.items() if cell.verdict == "pass"}
    families = dict.fromkeys(e.family for cell in passing.values() for e in cell.entries)
    for family in sorted(families, key=lambda f: (f is None, f or "")):
        uses = {name: [e.used or 0.0 for key in passing if key in run for e in run[key].entries
                       if e.family == family]
                for name, run in (("base", base), ("head", head))}  # fmt: skip
        yield {
            "family": family or "model",
            "cells": sum(any(e.family == family for e in c.entries) for c in passing.values()),
            **{name: max(used, default=None) for name, used in uses.items()},
        }


# --- Markdown -----------------------------------------------------------------------------------

_HEADER = (
    "| cell | what | base scale / error | head scale / error | verdict | causes | margin "
    "| rerun |\n|---|---|---|---|---|---|---|---|"
)
_WEIGHTS = {"worse": 9, "lost": 8, "margin": 6, "still": 7, "fixed": 3}


def markdown(found: Comparison, *, github: bool = False, most: int = MOST_COMMENT_BYTES) -> str:
    """Write the comparison as Markdown that fits a comment.

    Args:
        found: what `compare` gave.
        github: with the marker of the sticky comment, and GitHub's own boxes.
        most: bytes of UTF-8.
    """
    top = [MARKER] if github else []
    top += [f"### Parity: {_text(found.headline)}", "", _sides(found)]
    box = ["> [!WARNING]"] if github else []
    if found.warnings:
        top += ["", *box, *(f"> {'' if github else '**Warning:** '}{_text(w)}  "
                            for w in found.warnings)]  # fmt: skip
    sections = [Section("\n".join(top) + "\n")]
    for kind, title in KINDS.items():
        if changes := found.of(kind):
            head = f"#### {title} ({len(changes)})\n\n{_HEADER}"
            lines = [_line(change) for change in changes]
            sections.append(Section(head, lines, "\n", _WEIGHTS[kind]))
    sections += list(_lists(found))
    return fitted(sections, most, "the whole is in the run's artifact")


def _sides(found: Comparison) -> str:
    sides = [f"`{_code(str(run.get('commit') or 'unknown'))}`" for run in (found.base, found.head)]
    implementation = (found.head.get("selection") or {}).get("implementation")
    of = f", implementation `{_code(str(implementation))}`" if implementation else ""
    return f"base {sides[0]} → head {sides[1]}: {found.passed} of {found.total} cells pass{of}."


def _line(change: Change) -> str:
    more = f" and {change.more} more" if change.more else ""
    verdict = f"{change.base_verdict or 'new'} → **{change.head_verdict}**"
    margin = "–" if change.margin is None else f"÷{change.margin:.3g}"
    if change.margin is not None and change.margin < 1:
        margin = f"×{1 / change.margin:.3g}"
    return (
        f"| `{_code(change.case)}` | {_text(change.what)}{more} | {_numbers(change.base)} "
        f"| {_numbers(change.head)} | {verdict} | {_text(', '.join(change.causes)) or '–'} "
        f"| {margin} | `{_code(change.rerun)}` |"
    )


def _numbers(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    scale = "–" if entry.row.scale is None else f"{entry.row.scale:.6f}"
    return f"{scale} / {tables.number(entry.row.error)}"


def _lists(found: Comparison) -> Iterable[Section]:
    """Name cells that are new, gone or skipped, and sum the passes up."""
    for title, names, weight in (
        ("Vanished cells, in the base only", found.vanished, 5),
        ("New cells, in the head only", found.new, 4),
    ):
        if names:
            lines = [f"- `{_code(name)}`" for name in names]
            yield Section(_open(f"{title}: {len(names)}"), lines, "\n</details>\n", weight)
    if found.skipped:
        lines = [f"- `{_code(case)}`: {_text(reason)}" for case, reason in found.skipped]
        yield Section(_open(f"Skipped cells: {len(lines)}"), lines, "\n</details>\n", 4)
    if found.families:
        header = "| family | cells | base: share of the threshold | head |\n|---|---|---|---|"
        lines = [
            f"| {line['family']} | {line['cells']} | {_percent(line['base'])} "
            f"| {_percent(line['head'])} |"
            for line in found.families
        ]
        yield Section(_open(f"{found.passed} cells pass") + header, lines, "\n</details>", 1)


def _open(summary: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2g} %"


def _text(text: str) -> str:
    """Make text of a run safe inside a table: one line, no markup, no mention of a person."""
    plain = " ".join(text.split())
    for character, replacement in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("@", "@\u200b")):
        plain = plain.replace(character, replacement)
    return plain.replace("`", "'")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


# --- JSON ---------------------------------------------------------------------------------------


def to_dict(found: Comparison) -> dict[str, Any]:
    """Give everything found, for another program."""
    return {
        "schema": 1, "headline": found.headline, "warnings": list(found.warnings),
        "base": _about(found.base), "head": _about(found.head),
        "passed": found.passed, "total": found.total,
        "changes": [_change_dict(change) for change in found.changes],
        "new": list(found.new), "vanished": list(found.vanished),
        "skipped": [{"case": case, "reason": reason} for case, reason in found.skipped],
        "passing_families": [dict(line) for line in found.families],
    }  # fmt: skip


def _about(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: run.get(key) for key in ("id", "commit", "state", "started", "versions")}


def _change_dict(change: Change) -> dict[str, Any]:
    entry = change.head or change.base
    place = {} if entry is None else {
        "quantity": entry.quantity, "family": entry.family, "run": entry.run,
        "against": entry.against,
    }  # fmt: skip
    margin = change.margin if change.margin is None or math.isfinite(change.margin) else None
    return {
        "kind": change.kind, "case": change.case, "shape": change.label, **place,
        "base": _entry_dict(change.base_verdict, change.base),
        "head": _entry_dict(change.head_verdict, change.head),
        "further": change.more, "causes": list(change.causes), "reason": change.reason,
        "margin_shrink": margin, "rerun": change.rerun,
    }  # fmt: skip


def _entry_dict(verdict: str | None, entry: Entry | None) -> dict[str, Any]:
    numbers = {} if entry is None else {
        "scale": entry.row.scale, "error": entry.row.error, "threshold": entry.row.threshold,
        "tensor": entry.row.tensor,
    }  # fmt: skip
    return {"verdict": verdict, **numbers}
