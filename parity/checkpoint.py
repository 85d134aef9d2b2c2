"""Save half-way, load elsewhere, go on: the rows of quantity `checkpoint`.

Owns what is compared of a run and of a second one that began from its checkpoint. Must not know
files or how a run is made. Easy to get wrong: what comes back is compared bit for bit with what was
there when it was saved, and only a resume at the same layout goes on bit for bit - at another one
sums are rounded in another order, so there the steps that follow are judged like any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from parity.collect import Assembled, assemble, bits
from parity.compare import Metrics, RowContext, make_row, verdict_of, worst_of
from parity.implementation import Placement
from parity.layout import Layout
from parity.store import FAILING, Row
from parity.trial import RankResult

Kind = Literal["parameter", "optimizer", "continued"]
"""Weights as loaded, optimizer state as loaded, weights after the steps that followed."""
_JOINT = "|"
"""Between a parameter's name and a key of its state; in neither."""


@dataclass(frozen=True)
class Kept:
    """What a run held where its checkpoint was saved, or one that began there after loading.

    Attributes:
        layout: of the run.
        parameters: full weights by name.
        state: full optimizer state by `name|key`; empty where the implementation shows none.
        placements: of everything in both.
        notes: what the implementation says it could not restore exactly.
    """

    layout: Layout
    parameters: Assembled
    state: Assembled
    placements: Mapping[str, Placement]
    notes: tuple[str, ...]


def rebuild(
    layout: Layout, placements: Mapping[str, Placement], results: Sequence[RankResult]
) -> Kept | None:
    """Turn what the ranks kept into full tensors; None where no checkpoint was asked for.

    Raises:
        ParityError: pieces do not fit together.
    """
    found = [result.kept for result in results]
    if any(kept is None for kept in found):
        return None
    weights = [kept.parameters.tensors() for kept in found if kept is not None]
    states = [kept.state.tensors() for kept in found if kept is not None]
    cuts = {key: _cut(placements[key.partition(_JOINT)[0]], t) for key, t in states[0].items()}
    notes = found[0].notes if found[0] is not None else ()
    return Kept(
        layout,
        assemble(layout, placements, weights),
        assemble(layout, cuts, states),
        {**placements, **cuts},
        notes,
    )


def _cut(placement: Placement, state: Tensor | None) -> Placement:
    """State is cut as its parameter is; a counter is not cut."""
    whole = state is None or state.ndim == 0
    return Placement(placement.family) if whole else placement


def checkpoint_rows(
    context: RowContext,
    saved: Kept,
    loaded: Kept,
    ends: tuple[Assembled, Assembled] | None,
) -> list[Row]:
    """Report per tensor on how many entries what was loaded differs from what was saved.

    Args:
        context: what the rows have in common; the step is the one the checkpoint was saved after.
        saved: the run at its save.
        loaded: the run that began there.
        ends: last weights of the resumed and of the uninterrupted run, where both have one layout
            and add in a fixed order. They are compared where what was loaded is right: what
            follows from another finding is no finding.
    """
    rows = _rows(context, loaded.parameters, saved.parameters, loaded, "parameter")
    rows += _rows(context, loaded.state, saved.state, loaded, "optimizer")
    if ends is not None and not any(row.verdict in FAILING for row in rows):
        rows += _rows(context, *ends, loaded, "continued")
    return rows


def _rows(
    context: RowContext, actual: Assembled, expected: Assembled, about: Kept, kind: Kind
) -> list[Row]:
    rows = []
    for key in [*expected.filled, *(k for k in actual.filled if k not in expected.filled)]:
        placement = about.placements.get(key)
        if placement is None:  # state that only the saved run has
            placement = about.placements[key.partition(_JOINT)[0]]
        found, wanted = actual.filled.get(key), expected.filled.get(key)
        rows.append(_row(context, key, found, wanted, placement, about, kind))
    return rows


def _row(
    context: RowContext,
    key: str,
    actual: Tensor | None,
    expected: Tensor | None,
    placement: Placement,
    about: Kept,
    kind: Kind,
) -> Row:
    name, _, state = key.partition(_JOINT)
    entries, worst = 0, None
    failures = []
    if actual is None or expected is None:
        failures = ["not loaded" if actual is None else "not saved, yet there after the load"]
        entries = max(t.numel() for t in (actual, expected) if t is not None)
    elif actual.shape != expected.shape or actual.dtype != expected.dtype:
        said = [f"{tuple(t.shape)} {t.dtype}" for t in (actual, expected)]
        failures = [f"{said[0]} loaded, {said[1]} saved"]
        entries = expected.numel()
    else:
        odd = (bits(actual) != bits(expected)).nonzero()
        entries = len(odd)
        if entries and actual.ndim:
            place = tuple(map(int, odd[0]))
            worst = worst_of(place, key, {key: placement}, about.layout, actual)
        failures = [f"{entries} of {actual.numel()} entries differ"] if entries else []
    detail: dict[str, Any] = {"kind": kind}
    detail |= {"state": state} if state else {}
    detail |= {"notes": list(about.notes)} if about.notes else {}
    row = make_row(
        context, "checkpoint", placement.family, name,
        Metrics(None, None, None, float(entries), None), 0.0, verdict_of(failures), worst,
        failures, detail,
    )  # fmt: skip
    return replace(row, against=None)


def skipped_row(context: RowContext, reason: str) -> Row:
    """Say why something of a checkpoint was not compared."""
    row = make_row(
        context, "checkpoint", None, None, Metrics(None, None, None, None, None), 0.0, "skipped",
        None, [reason], None,
    )  # fmt: skip
    return replace(row, against=None)
