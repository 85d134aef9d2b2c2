"""Whether a run is the run a case asks for: parameters handed over under their own families, dense
weights really cut, steps that begin where they must.

Owns the failing rows of what is wrong before any gradient is compared. Must not know thresholds.
Easy to get wrong: with nothing sharded over tp every row passes, and nothing was tested, so what
must be cut follows from the model's names and never from what is declared of them; and the
reference steps from the run's own weights, so a run that changes them on the sly is right about
them.
"""  # noqa: D205

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parity import models
from parity.case import Case
from parity.collect import Assembled
from parity.compare import Metrics, RowContext, make_row, metrics
from parity.implementation import Placement
from parity.layout import Layout
from parity.store import Row


def structure_rows(
    context: RowContext,
    case: Case,
    expected: Collection[str],
    placements: Mapping[str, Placement],
    layout: Layout,
) -> list[Row]:
    """Fail what was not handed over, declared under another family, or not sharded.

    Args:
        context: what the rows share.
        case: may declare with `engine.options.adapter.partition = "skip"` that nothing is cut.
        expected: names of all parameters of the model.
        placements: full logical name -> family and cuts, as the implementation declares them.
        layout: sizes of the run.
    """
    rows = [
        _failing(context, None, name, "not handed over by the implementation")
        for name in expected
        if name not in placements
    ]
    if case.model.name == "tiny":
        rows += _mistaken(context, placements)
    adapter = case.engine.options.get("adapter", {})
    if layout.tp == 1 or adapter.get("partition") == "skip":
        return rows
    for family, pattern in models.LINEARS.items():
        linears = [name for name in expected if re.search(pattern, name)]
        if linears and not any(_is_cut(placements.get(name)) for name in linears):
            said = f"no {family} weight is sharded over tp = {layout.tp}"
            rows.append(_failing(context, family, None, said))
    return rows


def _mistaken(context: RowContext, placements: Mapping[str, Placement]) -> list[Row]:
    """Fail families that are not the model's: rows are grouped, and causes found, by family."""
    rows = []
    for name, placement in placements.items():
        own = models.family_of(name)
        if placement.family != own:
            said = f"declared as {placement.family} by placements(), in the model it is {own}"
            rows.append(_failing(context, own, name, said))
    return rows


def _is_cut(placement: Placement | None) -> bool:
    return placement is not None and any(shard.axis == "tp" for shard in placement.shards)


def weight_rows(
    context: RowContext,
    steps: Sequence[tuple[Assembled, Assembled]],
    given: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
) -> list[Row]:
    """Fail every tensor that a step does not begin with: the given one, then what the last left.

    Master copies must hold what the model was given, and only the optimizer may change them. Bit
    for bit: nothing is computed in between.

    Args:
        context: what the rows share.
        steps: full weights before and after each step, master copies where there are any.
        given: full weights the implementation was built with.
        placements: full logical name -> family and cuts.
    """
    rows = []
    expected, said = given, "is not the weight that was given"
    for number, (before, after) in enumerate(steps, start=context.step):
        about = replace(context, step=number)
        for name, held in before.filled.items():
            if name not in expected or torch.equal(held.double(), expected[name].double()):
                continue
            found = metrics(held, expected[name])
            family = placements[name].family
            reason = [f"before step {number} it {said}"]
            rows.append(
                make_row(about, "update", family, name, found, 0.0, "fail", None, reason, None)
            )
        expected, said = after.filled, f"is not what step {number} left"
    return rows


def _failing(context: RowContext, family: str | None, tensor: str | None, said: str) -> Row:
    nothing = Metrics(None, None, None, None, None)
    return make_row(context, "gradient", family, tensor, nothing, 0.0, "fail", None, [said], None)
