"""How each cause shows: one matcher per signature, from evidence to yes or no.

Owns the question "would this cause give these numbers?". Must not know rows' origin, tensors or
how sets are put together. Easy to get wrong: a matcher that is too narrow hides the true cause,
one that is too wide only makes the printed set larger; in doubt it says yes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from parity.causes import EVERY, REPLICATED, Cause
from parity.evidence import Observation, layer_of, symbols_of
from parity.store import Row

Matcher = Callable[[Cause, Observation], bool]
_ROUND_OFF = 1e-4
"""Largest error that float32 inside float64 leaves."""


def _scale(cause: Cause, o: Observation) -> bool:
    if o.factor is None or not o.backward_only or not o.hit <= set(cause.families):
        return False
    if cause.id.startswith("router") != (o.hit == {"router"}) and cause.families != EVERY:
        return False
    if o.hit == {"expert"} and cause.families != ("expert",):
        return False
    return cause.factor is not None and o.near(o.factor, cause.factor(o.setting))


def _all_scale(cause: Cause, o: Observation) -> bool:
    if o.factor is None or not o.backward_only or not o.everything_fails:
        return False
    return cause.factor is not None and o.near(o.factor, cause.factor(o.setting))


def _loss_scale(_: Cause, o: Observation) -> bool:
    if o.factor is None or not o.everything_fails or not o.backward_only:
        return False
    return _is_loss_scale(o.factor)


def _leak(cause: Cause, o: Observation) -> bool:
    rows = o.bad("gradient")
    name = cause.id.removeprefix("precision-leak-")
    leaks = [str((r.detail or {}).get("leak")) for r in rows if r.verdict == "leak"]
    if leaks:
        small = all(r.error is not None and r.error <= 1e-2 for r in rows)
        return small and 2 * len(leaks) >= len(rows) and leaks.count(name) * 2 >= len(leaks)
    dtype = str(o.rows[0].engine["dtype"])
    bounds = {"bfloat16": (2.0**-11, 2.0**-5), "float16": (2.0**-15, 2.0**-10)}
    if dtype != "float32" or name not in bounds or not rows or o.forward_differs:
        return False
    low, high = bounds[name]
    return all(
        r.error is not None and r.scale is not None and low <= r.error <= high
        and abs(r.scale - 1) < 0.8 * r.error
        for r in rows
    )  # fmt: skip


def _lanes_differ(_: Cause, o: Observation) -> bool:
    return (
        o.backward_only and "lane" in o.replica_axes and "expert" not in o.hit
        and o.hit <= set(REPLICATED)
    )  # fmt: skip


def _ranks_differ(_: Cause, o: Observation) -> bool:
    if o.hit == {"expert"} and o.setting.edp == 1:
        return False
    return o.backward_only and "rank" in o.replica_axes


def _drift(_: Cause, o: Observation) -> bool:
    if o.bad("grad_norm"):
        return False  # ranks that clip by different norms drift apart: the norm is the cause
    return bool(o.bad("replica")) and not o.bad("gradient") and not o.forward_differs


def _wrong_group(_: Cause, o: Observation) -> bool:
    if not o.backward_only or o.hit != {"expert"} or o.factor is not None:
        return False
    return not o.detail("shares") and not o.detail("tensor_from") and not _is_permuted(o)


def _permutation(cause: Cause, o: Observation) -> bool:
    if o.alterations and "weights-moved" not in o.alterations:
        return bool(set(cause.alterations) & set(o.alterations))
    return "expert" in o.hit and _is_permuted(o) and not o.detail("shares")


def _swapped(_: Cause, o: Observation) -> bool:
    structural = [r for r in o.bad("gradient") if o.state(r) == "structural"]
    return bool(structural) and len(o.detail("tensor_from")) == len(structural)


def _zeroed(_: Cause, o: Observation) -> bool:
    return o.backward_only and len(o.detail("zeroed")) == len(o.bad("gradient"))


def _is_permuted(o: Observation) -> bool:
    """Every expert holds one expert's gradient or weights, some another's; or others' tokens."""
    for sources in o.detail("experts_from"):
        moved = [s for e, s in enumerate(sources) if s != e]
        if len(moved) >= 2 and None not in sources:
            return True
    return o.forward_differs and any(_is_exchange(found) for found in o.detail("token_rows"))


def _is_exchange(found: Mapping[str, Any]) -> bool:
    """Experts' tokens went to other experts, one to one: wholly, or two by two in part."""
    sources = {int(e): source for e, source in found["from"].items()}
    known = [source for source in sources.values() if source is not None]
    if len(known) < 2 or -1 in known or len(set(known)) < len(known):
        return False
    return len(found["moved"]) >= 2 or set(known) == set(sources)


def _sharded_reduced(cause: Cause, o: Observation) -> bool:
    if not o.backward_only or not o.hit or not o.hit <= set(cause.families):
        return False
    held = [row for row in o.of("gradient") if row.family in o.hit and row.ratio is not None]
    mixed = [row for row in held if o.state(row) == "structural"]
    return 2 * len(mixed) > len(held) and not o.detail("shares") and not o.replica_axes


def _dead(_: Cause, o: Observation) -> bool:
    rows = o.bad("gradient")
    return o.backward_only and not o.propagates and all(row.ratio == 0.0 for row in rows)


def _shares(cause: Cause, o: Observation) -> bool:
    if cause.id == "gradient-not-zeroed":
        pairs = o.detail("now_and_previous")
        return bool(pairs) and all(o.near(pair[0], 1.0) for pair in pairs)
    tables = o.detail("shares")
    if not tables:
        return False
    if cause.id == "local-mean-loss":
        sizes = o.detail("tokens")[0]
        return all(_same(o, table, _local_means(sizes)) for table in tables)
    fits = _SHARE_PATTERNS[cause.id]
    return all(fits(o, table) for table in tables) and not (
        cause.id.startswith("rank") and "rank" in o.replica_axes
    )


Table = Sequence[Sequence[float]]


def _same(o: Observation, table: Table, expected: Table) -> bool:
    loose = replace_tolerance(o)
    return all(
        math.isclose(x, y, rel_tol=loose, abs_tol=loose)
        for row, wanted in zip(table, expected, strict=True)
        for x, y in zip(row, wanted, strict=True)
    )


def replace_tolerance(o: Observation) -> float:
    """Give the tolerance of fitted coefficients, which are less sharp than scales."""
    return min(0.05, 1000 * o.tolerance)


def _local_means(tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    total = sum(map(sum, tokens))
    count = sum(map(len, tokens))
    return [[total / (count * n) for n in row] for row in tokens]


def _by_micro_batch(o: Observation, table: Table) -> list[float] | None:
    """Give the coefficient of each micro-batch, None where dp ranks differ."""
    first = list(table[0])
    return first if _same(o, table, [first] * len(table)) else None


def _by_rank(o: Observation, table: Table) -> list[float] | None:
    """Give the coefficient of each dp rank, None where micro-batches differ."""
    first = [row[0] for row in table]
    return first if _same(o, table, [[c] * len(table[0]) for c in first]) else None


def _is(o: Observation, value: float, *allowed: float) -> bool:
    loose = replace_tolerance(o)
    return any(math.isclose(value, a, rel_tol=loose, abs_tol=loose) for a in allowed)


def _overwritten(o: Observation, table: Table) -> bool:
    c = _by_micro_batch(o, table)
    return bool(c) and len(c) > 1 and _is(o, c[-1], 1.0) and all(_is(o, x, 0.0) for x in c[:-1])  # type: ignore[arg-type, index]


def _first_lost(o: Observation, table: Table) -> bool:
    c = _by_micro_batch(o, table)
    return bool(c) and len(c) > 1 and _is(o, c[0], 0.0) and all(_is(o, x, 1.0) for x in c[1:])  # type: ignore[arg-type, index]


def _another_lost(o: Observation, table: Table) -> bool:
    c = _by_micro_batch(o, table)
    if not c or any(not _is(o, x, 0.0, 1.0) for x in c):
        return False
    lost = [i for i, x in enumerate(c) if _is(o, x, 0.0)]
    return lost not in ([0], list(range(len(c) - 1))) and bool(lost)


def _geometric(o: Observation, table: Table) -> bool:
    c = _by_micro_batch(o, table)
    if not c or len(c) < 2 or not _is(o, c[-1], 1.0) or any(_is(o, x, 0.0) for x in c):
        return False
    q = c[-2] / c[-1]
    return not _is(o, q, 1.0) and all(_is(o, c[i] / c[i + 1], q) for i in range(len(c) - 1))


def _counted_again(o: Observation, table: Table) -> bool:
    c = _by_micro_batch(o, table)
    if not c or len(c) < 2 or any(not _is(o, x, round(x)) or round(x) < 1 for x in c):
        return False
    return any(round(x) > 1 for x in c)


def _rank_lost(o: Observation, table: Table) -> bool:
    c = _by_rank(o, table)
    return bool(c) and any(_is(o, x, 0.0) for x in c) and not all(_is(o, x, 0.0) for x in c)  # type: ignore[union-attr]


def _rank_again(o: Observation, table: Table) -> bool:
    c = _by_rank(o, table)
    whole = bool(c) and all(_is(o, x, round(x)) and round(x) >= 1 for x in c)  # type: ignore[union-attr]
    return whole and any(round(x) > 1 for x in c or ()) and len(set(map(round, c or ()))) > 1


_SHARE_PATTERNS: Mapping[str, Callable[[Observation, Table], bool]] = MappingProxyType({
    "micro-batches-overwritten": _overwritten,
    "first-micro-batch-lost": _first_lost,
    "micro-batch-lost": _another_lost,
    "reduced-every-micro-batch": _geometric,
    "micro-batch-counted-again": _counted_again,
    "rank-share-lost": _rank_lost,
    "rank-share-counted-again": _rank_again,
})  # fmt: skip


def _auxiliary(cause: Cause, o: Observation) -> bool:
    if o.detail("auxiliary_counts"):
        return cause.id == "auxiliary-scope"
    if each := o.detail("main_and_each"):
        return all(_is(o, c["main"], 1.0) for c in each) and _one_by_one(cause, o, each)
    fits = o.detail("main_and_auxiliary")
    if not fits:
        return False
    if cause.id == "auxiliary-scope":
        return all(len(c) == 3 and _is(o, c[1], 0.0) and not _is(o, c[2], 0.0) for c in fits)
    return all(_is(o, c[0], 1.0) and not _is(o, c[1], 1.0) and len(c) == 2 for c in fits)


def _one_by_one(cause: Cause, o: Observation, each: Sequence[Mapping[str, float]]) -> bool:
    """Tell factors from counts: k times the tokens is 1/k^2 and 1/k, k times the load k and 1."""
    pairs = [(c["load_balance"], c["z_loss"]) for c in each]
    sizes = [symbols_of(balance, o.setting, replace_tolerance(o)) for balance, _ in pairs]
    tokens = all(_is(o, balance, z**2) for balance, z in pairs)
    load = all(sizes) and all(balance > 1.0 and _is(o, z, 1.0) for balance, z in pairs)
    return (tokens or load) if cause.id == "auxiliary-scope" else not tokens


def _detached(_: Cause, o: Observation) -> bool:
    if all(r.error is not None and r.error <= _ROUND_OFF for r in o.bad("gradient")):
        return False  # a lost path is no round-off
    if not o.backward_only or not o.above_is_right or o.top_state("expert") != "ok":
        return False
    if o.detail("auxiliary_counts") or o.detail("main_and_each") or o.detail("paths"):
        return False
    fits = o.detail("main_and_auxiliary")
    if fits:
        return all(len(c) == 2 and _is(o, c[0], 0.0) and _is(o, c[1], 1.0) for c in fits)
    return o.top_state("router") == "structural" and o.norm_state == "structural"


def _restore_rows(_: Cause, o: Observation) -> bool:
    return (
        o.backward_only and o.above_is_right and o.propagates
        and o.top_state("expert") == o.top_state("router") == "structural"
        and not o.detail("shares")
    )  # fmt: skip


def _restore_scaled(cause: Cause, o: Observation) -> bool:
    if not o.backward_only or not o.above_is_right or not o.propagates or o.factor is not None:
        return False
    if o.setting.lane_varying is not False and _restore_rows(cause, o):
        return True
    assert cause.factor is not None
    router = o.top_scale("router")
    is_router = o.setting.auxiliary is not False or o.near(router, cause.factor(o.setting))
    return is_router and o.near(o.top_scale("expert"), cause.factor(o.setting))


def _adjoint(_: Cause, o: Observation) -> bool:
    return (
        o.backward_only and o.above_is_right and o.propagates and o.top_state("router") == "ok"
        and o.top_state("expert") in ("ok", "structural") and o.norm_state == "structural"
        and not o.detail("paths")
    )  # fmt: skip


def _input_partial(_: Cause, o: Observation) -> bool:
    if not _only_below(o) or o.norm_state != "ok":
        return False
    first = _first_wrong(o)
    return first is not None and o.state(first) == "structural"


def _only_below(o: Observation) -> bool:
    """The last MoE layer's own gradients are right and those below it are not."""
    inside = {o.top_state(family) for family in ("expert", "router", "shared_expert")}
    return o.backward_only and o.above_is_right and inside <= {"ok", "absent"} and o.propagates


def _first_wrong(o: Observation) -> Row | None:
    """Give the failing tensor that the backward reaches first in the last MoE layer's block."""
    rows = [row for row in o.bad("gradient") if layer_of(str(row.tensor)) == o.top]
    return rows[-1] if rows else None


def _paths(o: Observation) -> Mapping[str, float] | None:
    """How often each path into the last MoE layer counts in the gradient of the norm before it."""
    found = o.detail("paths")
    return found[0] if found else None


def _input_scaled(cause: Cause, o: Observation) -> bool:
    if not _only_below(o):
        return False
    assert cause.factor is not None
    factor = cause.factor(o.setting)
    if (paths := _paths(o)) is not None:
        routed = _is(o, paths["router"], factor) or _is(o, paths["experts"], factor)
        return routed and _is(o, paths.get("shared", 1.0), 1.0)
    return o.norm_state == "scaled" and all(o.near(row.scale, factor) for row in o.norm_rows)


def _dense_partial(cause: Cause, o: Observation) -> bool:
    if not _only_below(o):
        return False
    assert cause.factor is not None
    factor = cause.factor(o.setting)
    if (paths := _paths(o)) is not None:
        return _is(o, paths.get("shared", 1.0), factor) and _is(o, paths["experts"], 1.0)
    first = _first_wrong(o)
    is_norm = first is not None and first.family == "layernorm" and o.norm_state == "ok"
    return is_norm and first is not None and o.near(first.scale, factor)


def _dense_summed(cause: Cause, o: Observation) -> bool:
    first = _first_wrong(o)
    if not o.backward_only or not o.above_is_right or not o.propagates or first is None:
        return False
    assert cause.factor is not None
    sharded = first.family in ("dense", "attention", "shared_expert")
    return (
        sharded
        and o.near(first.scale, cause.factor(o.setting))
        and (o.state(first) == "scaled" and o.top_state("expert") == "ok")
    )


def _forward(o: Observation) -> bool:
    """The forward goes wrong behind the first router, and by none of the alterations tried."""
    return _is_bare(o) and o.first_routing is None and not o.alterations


def _is_bare(o: Observation) -> bool:
    """The loss is wrong, and its gradients are no combination of right ones."""
    fits = ("shares", "main_and_auxiliary", "main_and_each", "auxiliary_counts")
    return o.forward_differs and not any(o.detail(fit) for fit in fits)


def _spans(o: Observation) -> Mapping[str, Any] | None:
    found = o.detail("token_rows")
    return found[0] if found else None


def _not_finite(_: Cause, o: Observation) -> bool:
    return any(r.error is None and r.reason and "not finite" in r.reason for r in o.failing)


def _altered(cause: Cause, o: Observation) -> bool:
    if _not_finite(cause, o):
        return False
    if o.alterations is not None:
        said = bool(set(cause.alterations) & set(o.alterations))
        return said and not ("weights-moved" in o.alterations and _is_permuted(o))
    spans = _spans(o)
    return (
        _is_bare(o)
        and o.first_routing is None
        and (spans is None or not (spans["lost"] or spans["foreign"]))
    )


def _rows(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    if not _forward(o):
        return False
    return spans is None or (
        spans["lost"] + spans["foreign"] > 0 and -1 not in spans["from"].values()
    )


def _etp_rows(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    nobody = spans is not None and -1 in spans["from"].values()
    return _forward(o) and not nobody


def _routing(_: Cause, o: Observation) -> bool:
    return _is_routing(o) and not ((o.first_routing and o.first_routing.detail) or {}).get(
        "lanes_differ"
    )


def _routing_lanes(_: Cause, o: Observation) -> bool:
    return _is_routing(o) and bool(
        ((o.first_routing and o.first_routing.detail) or {}).get("lanes_differ")
    )


def _is_routing(o: Observation) -> bool:
    """The first router chooses otherwise, and not because of what comes before it."""
    return o.first_routing is not None and not o.alterations and not o.detail("shares")


def _gradients_right(o: Observation) -> bool:
    return not (o.bad("gradient") or o.bad("replica") or o.bad("loss") or o.bad("routing"))


def _norm_scaled(_: Cause, o: Observation) -> bool:
    """One factor on every norm, of gradients that it is still to be, or was already, taken off."""
    at = o.setting
    factors = [f for k in {at.gas, at.dp, at.stage} - {1} for f in (float(k), 1 / k)]
    return _norm_is(o, lambda r: _has_ratio(r, *factors) or _is_loss_scale(r.ratio or 0.0))


def _is_loss_scale(factor: float) -> bool:
    power = math.log2(factor) if factor > 0 else 0.0
    return abs(power) >= 4 and math.isclose(power, round(power), abs_tol=1e-3)


def _norm_clipped(_: Cause, o: Observation) -> bool:
    def is_limit(row: Row) -> bool:
        detail = row.detail or {}
        actual, limit = detail.get("actual") or 0.0, detail.get("limit") or 0.0
        return limit > 0.0 and math.isclose(actual, limit, rel_tol=1e-3)

    return _norm_is(o, is_limit)


def _norm_squared(_: Cause, o: Observation) -> bool:
    return _norm_is(o, lambda r: _has_ratio(r, (r.detail or {}).get("expected") or 0.0))


def _norm_is(o: Observation, holds: Callable[[Row], bool]) -> bool:
    """Tell whether only the norm is wrong, and every rank's as the condition says."""
    rows = o.bad("grad_norm")
    return bool(rows) and _gradients_right(o) and all(map(holds, rows))


def _has_ratio(row: Row, *factors: float) -> bool:
    """Compare a norm's ratio: the 1e-6 beside a clipping limit and float32 stay below this."""
    return any(math.isclose(row.ratio or 0.0, factor, rel_tol=1e-5) for factor in factors if factor)


def _one_factor(cause: Cause, o: Observation) -> bool:
    """Tell whether one factor is all that a norm is wrong by, and no count of copies gives it."""
    at = o.setting
    copies = [k for k in (at.stage, at.dp, at.tp, at.edp) if k > 1]
    counts = [f for k in copies for f in (math.sqrt(k), 1 / math.sqrt(k))]
    if _norm_is(o, lambda r: _has_ratio(r, *counts)):
        return False
    return any(m(cause, o) for m in (_norm_scaled, _norm_clipped, _norm_squared))


def _norm_high(cause: Cause, o: Observation) -> bool:
    most = math.sqrt(o.setting.stage) * (1 + 1e-5)  # every rank has a copy of everything
    return _norm_is(o, lambda r: 1.0 < (r.ratio or 0.0) <= most) and not _one_factor(cause, o)


def _norm_low(cause: Cause, o: Observation) -> bool:
    rows = o.bad("grad_norm")
    if any((r.detail or {}).get("kind") != "parameter" for r in o.bad("replica")):
        return False  # weights alone may differ: each rank clips by its own norm
    wrong = o.bad("gradient") or o.bad("loss") or o.bad("routing")
    low = all((r.ratio or 0.0) < 1.0 for r in rows)
    return not wrong and bool(rows) and low and not _one_factor(cause, o)


def _update_only(o: Observation) -> bool:
    return _gradients_right(o) and not o.bad("grad_norm") and bool(o.bad("update"))


def _clip(_: Cause, o: Observation) -> bool:
    """Every delta that is wrong is the one of gradients the limit never met."""
    if not _update_only(o):
        return False
    details = [row.detail or {} for row in o.bad("update")]
    return all(_is_unclipped(o, detail) for detail in details) and any(
        detail["own_error"] > detail["own_threshold"] for detail in details
    )


def _is_unclipped(o: Observation, detail: Mapping[str, Any]) -> bool:
    """A delta fits the unclipped gradients: in 16 bits the error alone allows a factor of 1.2."""
    error, own = detail.get("unclipped_error"), detail.get("own_error")
    if error is None or own is None:  # recorded before there was one, or not finite
        return False
    within = error <= detail["own_threshold"] and error < own
    return within and o.near(detail.get("unclipped_scale"), 1.0)


def _update(cause: Cause, o: Observation) -> bool:
    return _update_only(o) and not _clip(cause, o) and not _idle(cause, o)


def _idle(_: Cause, o: Observation) -> bool:
    missing = [r for r in o.bad("gradient") if (r.detail or {}).get("missing")]
    if missing:
        return o.backward_only and len(missing) == len(o.bad("gradient")) and o.hit == {"expert"}
    if not _update_only(o) or {str(r.family) for r in o.bad("update")} != {"expert"}:
        return False
    return o.setting.idle_expert is not False and all(_is_of_few(r) for r in o.bad("update"))


def _is_of_few(row: Row) -> bool:
    """The idle experts alone are wrong: the tensor as a whole has no factor of its own."""
    scale = (row.detail or {}).get("end_to_end_scale", row.scale)
    return scale is None or row.residual is None or abs(scale - 1.0) < 2 * row.residual


def _checkpoint(_: Cause, o: Observation) -> bool:
    return "parameter" in _kept_kinds(o)


def _resume(_: Cause, o: Observation) -> bool:
    return "optimizer" in _kept_kinds(o)


def _progress(_: Cause, o: Observation) -> bool:
    return _kept_kinds(o) == {"continued"}


def _kept_kinds(o: Observation) -> set[str]:
    return {str((row.detail or {}).get("kind")) for row in o.bad("checkpoint")}


def _unknown_factor(_: Cause, o: Observation) -> bool:
    return o.factor is not None and o.backward_only


def _unknown(_: Cause, o: Observation) -> bool:
    return o.factor is None or not o.backward_only


_MATCHERS: Mapping[str, Matcher] = MappingProxyType({
    "scale": _scale, "all_scale": _all_scale, "loss_scale": _loss_scale, "leak": _leak,
    "lanes_differ": _lanes_differ, "ranks_differ": _ranks_differ, "drift": _drift,
    "wrong_group": _wrong_group, "permutation": _permutation, "dead": _dead,
    "sharded_reduced": _sharded_reduced, "shares": _shares, "auxiliary": _auxiliary,
    "detached": _detached, "restore_rows": _restore_rows, "restore_scaled": _restore_scaled,
    "adjoint": _adjoint, "input_partial": _input_partial, "input_scaled": _input_scaled,
    "dense_partial": _dense_partial,
    "dense_summed": _dense_summed, "altered": _altered, "rows": _rows,
    "etp_rows": _etp_rows, "swapped": _swapped, "zeroed": _zeroed,
    "routing": _routing, "routing_lanes": _routing_lanes, "norm_high": _norm_high,
    "norm_low": _norm_low, "norm_scaled": _norm_scaled, "norm_clipped": _norm_clipped,
    "norm_squared": _norm_squared, "clip": _clip, "update": _update, "idle": _idle,
    "checkpoint": _checkpoint, "resume": _resume, "progress": _progress, "not_finite": _not_finite,
    "unknown_factor": _unknown_factor,
    "unknown": _unknown,
})  # fmt: skip


def matches(cause: Cause, observation: Observation) -> bool:
    """Tell whether a cause would give what a failing run shows."""
    if cause.visible(observation.setting) is False:
        return False
    return _MATCHERS[cause.signature](cause, observation)
