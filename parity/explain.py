"""Failing rows -> the set of causes that would give these very numbers; over shapes, what is left.

Owns sets of causes, their intersection over cases, and the sentences about them. Must not know
tensors, implementations or planted faults. Easy to get wrong: where two causes predict the same
numbers both are said, never one guess; and a passing case only speaks against a cause that must
show on it, on an engine that fails elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from parity.case import Case
from parity.causes import BY_ID, CAUSES, Cause, Setting
from parity.evidence import Observation, observe, setting_of, symbols_of
from parity.signatures import matches
from parity.store import FAILING, Row, by_case

FALLBACKS = ("unknown-factor", "unknown")
"""Causes that are said only where no other fits."""


def fitting(observation: Observation) -> list[Cause]:
    """Give every cause that fits one failing run; the fallbacks only where nothing else does."""
    found = [c for c in CAUSES if c.id not in FALLBACKS and matches(c, observation)]
    return found or [c for c in CAUSES if c.id in FALLBACKS and matches(c, observation)]


def causes(rows: Iterable[Row], case: Case | None = None) -> list[Cause]:
    """Give the set of causes of one failing case; empty where nothing fails.

    Where the baseline's run fails, too, a cause must explain both, or none of them is said. That it
    passes says nothing: an implementation may have code for folded runs alone.
    """
    bad = [o for o in observe(rows, case) if o.failing]
    if not bad:
        return []
    bad.sort(key=lambda o: not o.folded)
    found = [c for c in fitting(bad[0]) if all(matches(c, o) for o in bad[1:])]
    return found or [BY_ID["unknown"]]


def intersect(
    results: Iterable[Sequence[Row]], cases: Mapping[str, Case] | None = None
) -> list[Cause]:
    """Give the causes that explain every failing case and no passing one contradicts.

    Args:
        results: the rows of one case after another.
        cases: case id -> case, for what rows alone do not say.

    Returns:
        Where no one cause explains all failures (there are several faults): the causes that no
        passing case contradicts and that explain the most failing ones.
    """
    cells = [observe(rows, (cases or {}).get(rows[0].case)) for rows in results]
    bad = [failing for runs in cells if (failing := [o for o in runs if o.failing])]
    seen = [o for runs in bad for o in runs]
    engines = {o.engine for o in seen}  # a step that one does wrong need not be another's
    passing = [o for runs in cells for o in runs if not o.failing and o.folded]
    good = [o for o in passing if o.engine in engines]
    counted = [
        (cause, sum(all(matches(cause, o) for o in runs) for runs in bad))
        for cause in CAUSES
        if cause.id not in FALLBACKS
    ]
    left = [
        (cause, count)
        for cause, count in counted
        if count and not any(_must_show(cause, o) for o in good)
    ]
    if left:
        most = max(count for _, count in left)
        return [cause for cause, count in left if count == most]
    return [c for c in CAUSES if c.id in FALLBACKS and any(matches(c, o) for o in seen)]


def _must_show(cause: Cause, run: Observation) -> bool:
    """Tell whether a run would fail: in 16 bits only a factor is sure to be above its limit."""
    return cause.visible(run.setting) is True and (run.is_exact or cause.factor is not None)


def labelled(rows: Sequence[Row], case: Case | None = None) -> list[Row]:
    """Write the set of causes into every failing row of one case."""
    found = tuple(cause.id for cause in causes(rows, case))
    return [replace(r, causes=found) if r.verdict in FAILING and r.quantity else r for r in rows]


# --- text -----------------------------------------------------------------------------------------


def sentence(cause: Cause, observation: Observation) -> str:
    """Say in one line what is seen and why: `expert 2.000 = tp: the restore's factor ...`."""
    if observation.hit and observation.spared:
        where = ", ".join(sorted(observation.hit))
    else:
        where = "all families" if observation.hit else _quantities(observation)
    seen = ""
    if observation.factor is not None:
        named = symbols_of(observation.factor, observation.setting)[:4]
        symbol = cause.symbol or " or ".join(named)
        seen = f" {observation.factor:.3f}" + (f" = {symbol}" if symbol else "")
    elif cause.factor is not None:
        seen = f" ({cause.symbol} = {cause.factor(observation.setting):.3f})"
    return f"{where}{seen}: {cause.algebra} [{cause.id}]"


def _quantities(observation: Observation) -> str:
    return ", ".join(dict.fromkeys(str(row.quantity) for row in observation.failing))


def telling_case(
    pair: tuple[Cause, Cause], cases: Iterable[Case], like: Case | None = None
) -> Case | None:
    """Find a case on which two causes predict different results; None where none does.

    Cases of the same dtype and backend as `like` come first, then small worlds.
    """

    def cost(case: Case) -> tuple[bool, bool, int, int]:
        other = like is None or case.engine.dtype != like.engine.dtype
        return other, case.optimizer.name != "sgd", case.shape.world, case.engine.gas

    telling = [case for case in cases if _tells(*pair, setting_of(case))]
    return min(telling, key=cost, default=None)


def _tells(a: Cause, b: Cause, setting: Setting) -> bool:
    """Two causes differ where one must show and the other cannot, or by factors of one pattern."""
    shown = a.visible(setting), b.visible(setting)
    if set(shown) == {True, False}:
        return True
    if a.factor is None or b.factor is None or a.signature != b.signature:
        return False
    return not math.isclose(a.factor(setting), b.factor(setting), rel_tol=1e-3)


def ambiguity(
    found: Sequence[Cause], cases: Iterable[Case], like: Case | None = None
) -> Iterator[str]:
    """Say of every pair of causes left which case tells them apart."""
    cases = list(cases)
    for index, a in enumerate(found):
        for b in found[index + 1 :]:
            case = telling_case((a, b), cases, like)
            end = f"run {case.id} to tell" if case else "no loaded case tells them apart"
            yield f"ambiguous between {a.id} and {b.id} on this shape; {end}"


def failing_cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by case, failing cases only (errored ones have nothing to explain)."""
    return {
        case: of_case
        for case, of_case in by_case(rows).items()
        if any(row.verdict in ("fail", "leak") for row in of_case)
    }
