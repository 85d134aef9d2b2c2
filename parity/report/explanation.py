"""Why cases failed, as text: causes with their algebra, factors of the shape, what tells apart.

Owns the wording of `parity explain`. Must not know torch, files or processes. Easy to get wrong: a
set with several causes is printed as a set, with the case that would tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parity import explain
from parity.case import Case
from parity.evidence import Observation, factor_table, observe
from parity.report.tables import shape_label
from parity.store import Row

_MOST_EXPERTS = 16
_MOST_AMBIGUITIES = 3


def case_lines(rows: Sequence[Row], case: Case | None, cases: Sequence[Case]) -> list[str]:
    """Explain one failing case.

    Args:
        rows: its rows.
        case: the case, where its file is at hand.
        cases: cases among which one is looked for that tells causes apart.
    """
    found = explain.causes(rows, case)
    bad = [o for o in observe(rows, case) if o.failing]
    if not bad:
        return []
    about = next((o for o in bad if o.folded), bad[0])
    head = f"{rows[0].case}: {_seen(about)}"
    if len(bad) > 1:
        head += "; the baseline's run fails, too"
    said = [head, *(f"  {explain.sentence(cause, about)}" for cause in found)]
    ambiguous = list(explain.ambiguity(found, cases, case))
    said += [f"  {line}" for line in ambiguous[:_MOST_AMBIGUITIES]]
    said += [f"  {line}" for line in evidence_lines(about)]
    return said


def _seen(observation: Observation) -> str:
    """Sum up what is wrong first."""
    quantities = dict.fromkeys(str(row.quantity) for row in observation.failing)
    families = ", ".join(sorted(observation.hit)) or "no gradient"
    label = shape_label(observation.rows[0].shape, observation.rows[0].engine)
    step = f", step {observation.step}" if observation.step > 1 else ""
    return f"{', '.join(quantities)} wrong on {label}{step} ({families})"


def evidence_lines(observation: Observation) -> list[str]:
    """Write the factor table of the shape and what the gradients are made of."""
    sizes = factor_table(observation.setting)
    factors = ", ".join(f"{symbol} {value:.4g}" for symbol, value in sizes.items())
    said = [f"factors of this shape: {factors or 'all sizes are 1'}"]
    for row in observation.bad("gradient"):
        said += _made_of(row)
    for row in observation.bad("loss"):
        if altered := (row.detail or {}).get("loss_of"):
            said.append(f"the loss is that of: {', '.join(altered)}")
    worst = next((r for r in observation.failing if r.worst), None)
    if worst is not None and worst.worst:
        place = " ".join(f"{k} {v}" for k, v in worst.worst.items() if v is not None)
        said.append(f"worst at {place} of {worst.tensor or worst.quantity}")
    return said


def _made_of(row: Row) -> list[str]:
    detail: Mapping[str, Any] = row.detail or {}
    said = []
    if shares := detail.get("shares"):
        table = "; ".join(" ".join(f"{_round(c):g}" for c in rank) for rank in shares)
        said.append(f"{row.tensor}: shares by dp rank (micro-batches): {table}")
    if parts := detail.get("main_and_auxiliary"):
        named = zip(("main loss", "auxiliary losses", "in the other scope"), parts, strict=False)
        text = ", ".join(f"{what} x {_round(c):g}" for what, c in named)
        said.append(f"{row.tensor}: {text}")
    if each := detail.get("main_and_each"):
        losses = {"main": "main loss", "load_balance": "load balance", "z_loss": "z-loss"}
        text = ", ".join(f"{losses[what]} x {_round(c):g}" for what, c in each.items())
        said.append(f"{row.tensor}: {text}")
    if paths := detail.get("paths"):
        text = ", ".join(f"{what} x {_round(c):g}" for what, c in paths.items())
        said.append(f"{row.tensor}: paths into the layer: {text}")
    if sources := detail.get("experts_from"):
        held = [f"{e}<-{s}" for e, s in enumerate(sources) if s is not None and s != e]
        more = " ..." if len(held) > _MOST_EXPERTS else ""
        said.append(f"{row.tensor}: experts hold {' '.join(held[:_MOST_EXPERTS])}{more}")
    if spans := detail.get("token_rows"):
        said.append(
            f"{row.tensor}: {spans['lost']} token rows lost, {spans['foreign']} of other experts"
        )
    if other := detail.get("tensor_from"):
        said.append(f"{row.tensor}: holds the gradient of {other}")
    scales = [s for s in detail.get("expert_scales") or () if s is not None]
    if scales and row.worst and row.worst.get("expert") is not None and not said:
        low, high = min(scales), max(scales)
        if high - low > 1e-3 * max(1.0, abs(high)):
            said.append(f"{row.tensor}: scales by expert from {low:.4g} to {high:.4g}")
    return said


def _round(value: float) -> float:
    return round(value, 4) + 0.0


def summary_lines(
    results: Mapping[str, Sequence[Row]], cases: Mapping[str, Case], further: Sequence[Case]
) -> list[str]:
    """Say which causes are left over all cases of a run, failing and passing."""
    failing = {id: rows for id, rows in results.items() if id in explain.failing_cases(rows)}
    left = explain.intersect([*results.values()], cases)
    over = f"over {len(failing)} failing and {len(results) - len(failing)} passing cases"
    if not left:
        return [f"{over}: no cause is left"]
    said = [f"{over}: {' or '.join(cause.id for cause in left)}"]
    said += [f"  {cause.id}: {cause.algebra}" for cause in left]
    like = cases.get(next(iter(failing), ""))
    fresh = [case for case in further if case.id not in results]
    return [*said, *(f"  {line}" for line in list(explain.ambiguity(left, fresh, like))[:3])]
