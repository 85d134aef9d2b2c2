"""Failing rows -> the set of causes that would give these very numbers; over shapes, what is left.

Owns the matching of evidence against `parity.causes`. Must not know tensors, implementations or
planted faults: it reads rows, and what `parity.contributions` wrote into them. Easy to get wrong:
one wrong number makes later ones wrong, so the first quantity that differs decides, and where two
causes predict the same, both are said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from parity.case import Case
from parity.causes import BY_ID, CAUSES, REPLICATED, Cause, Setting
from parity.store import FAILING, Row, by_case

SIZES = ("tp", "dp", "ep", "edp", "etp", "gas", "world")
_TOLERANCES = MappingProxyType(
    {"float64": 1e-9, "float32": 5e-5, "bfloat16": 2e-2, "float16": 3e-3}
)
"""Largest distance of a measured factor from a predicted one, relative."""
FALLBACKS = ("unknown-factor", "unknown")

State = Literal["ok", "scaled", "structural", "absent"]


# --- settings and factors -------------------------------------------------------------------------


def setting_of(case: Case) -> Setting:
    """Give what the effect of a cause depends on in a case's folded run."""
    layout, model = case.layout, case.model
    return Setting(
        tp=layout.tp, dp=layout.dp, ep=layout.ep, etp=layout.etp, edp=layout.edp,
        gas=case.engine.gas, sp=case.engine.sequence_parallel_size, clip=case.engine.clip,
        optimizer=case.optimizer.name, steps=case.steps, uneven=case.data.uneven,
        idle_expert=case.data.idle_expert, lane_varying=case.data.lane_varying,
        auxiliary=case.auxiliary.load_balance > 0 or case.auxiliary.z_loss > 0,
        shared=model.shared_width > 0, biases=model.biases, tied=model.tied, top_k=model.top_k,
    )  # fmt: skip


def _setting_of_row(row: Row, case: Case | None) -> Setting:
    """Give the setting of the run a row is about: the folded one, or the baseline's."""
    base = Setting() if case is None else setting_of(case)
    shape, engine = row.shape, row.engine
    changed = replace(
        base, tp=shape["tp"], dp=shape["dp"], ep=shape["ep"], etp=shape["etp"], edp=shape["edp"],
        gas=engine["gas"], clip=engine["clip"], optimizer=engine["optimizer"],
    )  # fmt: skip
    # the baseline sees the lanes' mean on its only lane
    return changed if row.shape["tp"] > 1 else replace(changed, lane_varying=False)


def factor_table(setting: Setting) -> dict[str, float]:
    """Give the sizes of a shape, their products of two, quotients and inverses: symbol -> value."""
    sizes = {key: float(getattr(setting, key)) for key in SIZES if key != "world"}
    sizes["world"] = float(setting.stage)
    sizes = {key: value for key, value in sizes.items() if value != 1.0}
    table = dict(sizes)
    table |= {f"1/{key}": 1 / value for key, value in sizes.items()}
    for a, x in sizes.items():
        for b, y in sizes.items():
            if a < b:
                table[f"{a}*{b}"] = x * y
                table[f"1/({a}*{b})"] = 1 / (x * y)
            if a != b and x != y:
                table[f"{a}/{b}"] = x / y
    return table


def symbols_of(factor: float, setting: Setting, tolerance: float = 1e-6) -> list[str]:
    """Name a measured factor in sizes of the shape, the simplest names first."""
    table = factor_table(setting).items()
    named = [symbol for symbol, value in table if math.isclose(value, factor, rel_tol=tolerance)]
    return sorted(named, key=lambda symbol: (len(re.findall(r"[a-z]+", symbol)), len(symbol)))


# --- what a run shows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """What one run of one case shows: its rows against the reference, at the first wrong step."""

    case: str
    setting: Setting
    folded: bool
    rows: tuple[Row, ...]

    @cached_property
    def failing(self) -> tuple[Row, ...]:
        """Rows that fail or leak."""
        return tuple(row for row in self.rows if row.verdict in FAILING and row.quantity)

    @cached_property
    def step(self) -> int:
        """First step with a failing row."""
        return min((row.step or 1 for row in self.failing), default=1)

    def of(self, quantity: str) -> list[Row]:
        """Rows of one quantity at the first wrong step."""
        return [r for r in self.rows if r.quantity == quantity and (r.step or 1) == self.step]

    def bad(self, quantity: str) -> list[Row]:
        """Failing rows of one quantity at the first wrong step."""
        return [r for r in self.of(quantity) if r.verdict in FAILING]

    @property
    def tolerance(self) -> float:
        """Distance up to which a measured factor is a predicted one."""
        return _TOLERANCES[self.rows[0].engine["dtype"]]

    def near(self, value: float | None, expected: float) -> bool:
        """Tell whether a measured number is a predicted one."""
        return value is not None and math.isclose(
            value, expected, rel_tol=self.tolerance, abs_tol=self.tolerance
        )

    # forward

    @cached_property
    def first_routing(self) -> Row | None:
        """Failing routing row of the first MoE layer; later ones may follow from its output."""
        rows = self.of("routing")
        return rows[0] if rows and rows[0].verdict in FAILING else None

    @cached_property
    def forward_differs(self) -> bool:
        """The loss is wrong, by more than a leak."""
        small = 1e-6 if self.tolerance < 1e-6 else 0.0
        return any(r.error is None or r.error > small for r in self.bad("loss"))

    @cached_property
    def backward_only(self) -> bool:
        """Gradients are wrong though the forward is right."""
        return bool(self.bad("gradient")) and not self.forward_differs and not self.bad("routing")

    # gradients

    @cached_property
    def hit(self) -> frozenset[str]:
        """Families with a failing gradient."""
        return frozenset(str(row.family) for row in self.bad("gradient"))

    @cached_property
    def spared(self) -> frozenset[str]:
        """Families none of whose gradients fails."""
        return frozenset(str(row.family) for row in self.of("gradient")) - self.hit

    @cached_property
    def factor(self) -> float | None:
        """The one factor on everything that fails, None where there is more than a factor."""
        rows = self.bad("gradient")
        scales = [row.scale for row in rows]
        if not rows or any(self.state(row) != "scaled" for row in rows):
            return None
        first = scales[0]
        assert first is not None
        return first if all(self.near(scale, first) for scale in scales) else None

    @cached_property
    def everything_fails(self) -> bool:
        """No gradient passes, but for those that are zero."""
        return all(
            row.verdict in FAILING or row.ratio is None for row in self.of("gradient")
        )

    def state(self, row: Row | None) -> State:
        """Say how one gradient row differs."""
        if row is None:
            return "absent"
        if row.verdict not in FAILING:
            return "ok"
        if row.scale is None or row.residual is None or row.scale == 0.0:
            return "structural"
        is_scaled = row.residual <= self.tolerance * max(1.0, abs(row.scale))
        return "scaled" if is_scaled else "structural"

    # the last MoE layer: what passes and what fails there says where the backward goes wrong

    @cached_property
    def top(self) -> int:
        """Number of the last MoE layer; -1 without one."""
        layers = [_layer(str(r.tensor)) for r in self.of("gradient") if r.family == "expert"]
        return max(layers, default=-1)

    def top_state(self, family: str) -> State:
        """Say how a family differs in the last MoE layer: the worst of its tensors."""
        rows = [
            r for r in self.of("gradient")
            if r.family == family and _layer(str(r.tensor)) == self.top
        ]  # fmt: skip
        states = {self.state(row) for row in rows}
        order: tuple[State, ...] = ("structural", "scaled", "ok")
        return next((state for state in order if state in states), "absent")

    @cached_property
    def norm_rows(self) -> list[Row]:
        """Gradient rows of the norm that feeds the last MoE layer, its last norm."""
        norms = [
            r for r in self.of("gradient")
            if r.family == "layernorm" and _layer(str(r.tensor)) == self.top
        ]  # fmt: skip
        last = str(norms[-1].tensor).rpartition(".")[0] if norms else ""
        return [row for row in norms if str(row.tensor).startswith(f"{last}.")]

    @cached_property
    def norm_state(self) -> State:
        """Say how the norm that feeds the last MoE layer differs."""
        states = {self.state(row) for row in self.norm_rows}
        order: tuple[State, ...] = ("structural", "scaled", "ok")
        return next((state for state in order if state in states), "absent")

    @cached_property
    def above_is_right(self) -> bool:
        """Head and final norm pass, which the backward reaches before the last MoE layer."""
        return not any(_layer(str(r.tensor)) < 0 and r.family != "embedding"
                       for r in self.bad("gradient"))  # fmt: skip

    @cached_property
    def propagates(self) -> bool:
        """What is wrong goes on downwards: attention, norms and embedding fail, too."""
        below = {"attention", "layernorm", "embedding"}
        return below <= self.hit

    def top_scale(self, family: str) -> float | None:
        """Give the common scale of a family's failing tensors in the last MoE layer."""
        scales = [
            r.scale for r in self.bad("gradient")
            if r.family == family and _layer(str(r.tensor)) == self.top
        ]  # fmt: skip
        first = scales[0] if scales else None
        same = first is not None and all(self.near(scale, first) for scale in scales)
        return first if same else None

    # replicas

    @cached_property
    def replica_axes(self) -> frozenset[str]:
        """How gradient replicas differ: `lane`, `rank` (dp, edp), both where every rank does."""
        axes: set[str] = set()
        for row in self.bad("replica"):
            if (row.detail or {}).get("kind") == "gradient":
                axes |= _axes(row, self.setting)
        return frozenset(axes)

    def detail(self, key: str) -> list[Any]:
        """Collect what failing gradient rows carry under a key."""
        return [r.detail[key] for r in self.bad("gradient") if r.detail and key in r.detail]


def _layer(name: str) -> int:
    """Read the layer's number off a parameter name; -1 where there is none."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else -1


def _axes(row: Row, setting: Setting) -> set[str]:
    """Read off which ranks hold equal values along which axis replicas differ."""
    classes = (row.detail or {}).get("classes") or []
    if row.family == "expert":
        return {"rank"}
    lanes = all(len({rank % setting.tp for rank in group}) == 1 for group in classes)
    ranks = all(len({rank // setting.tp for rank in group}) == 1 for group in classes)
    found = {"lane"} if lanes and setting.tp > 1 else set()
    return found | ({"rank"} if ranks and setting.dp > 1 else set())


def observe(rows: Iterable[Row], case: Case | None = None) -> list[Observation]:
    """Split one case's rows into its runs: the folded one and, where it differs, the baseline."""
    own = [r for r in rows if r.quantity is not None and r.against in ("reference", None)]
    runs: dict[tuple[int, ...], list[Row]] = {}
    for row in own:
        runs.setdefault(tuple(row.shape[k] for k in ("world", "tp", "ep", "etp")), []).append(row)
    folded = max(runs, default=None)
    return [
        Observation(of_run[0].case, _setting_of_row(of_run[0], case), key == folded, tuple(of_run))
        for key, of_run in runs.items()
    ]


# --- matchers: would this cause give these numbers? -----------------------------------------------

Matcher = Callable[[Cause, Observation], bool]


def _scale(cause: Cause, o: Observation) -> bool:
    if o.factor is None or not o.backward_only or not o.hit <= set(cause.families):
        return False
    if cause.id.startswith("router") != (o.hit == {"router"}) and cause.families != _every():
        return False
    if o.hit == {"expert"} and cause.families != ("expert",):
        return False
    return cause.factor is not None and o.near(o.factor, cause.factor(o.setting))


def _every() -> tuple[str, ...]:
    return BY_ID["dp-sum-not-averaged"].families


def _all_scale(cause: Cause, o: Observation) -> bool:
    if o.factor is None or not o.backward_only or not o.everything_fails:
        return False
    return cause.factor is not None and o.near(o.factor, cause.factor(o.setting))


def _loss_scale(_: Cause, o: Observation) -> bool:
    if o.factor is None or o.factor <= 0 or not o.everything_fails or not o.backward_only:
        return False
    power = math.log2(o.factor)
    return abs(power) >= 4 and math.isclose(power, round(power), abs_tol=1e-3)


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
    return bool(o.bad("replica")) and not o.bad("gradient") and not o.forward_differs


def _wrong_group(_: Cause, o: Observation) -> bool:
    if not o.backward_only or o.hit != {"expert"} or o.factor is not None:
        return False
    return not o.detail("shares") and not _is_permuted(o)


def _permutation(_: Cause, o: Observation) -> bool:
    return "expert" in o.hit and _is_permuted(o)


def _is_permuted(o: Observation) -> bool:
    """Most experts hold another's gradient, weights or tokens."""
    for sources in o.detail("experts_from"):
        moved = [s for e, s in enumerate(sources) if s is not None and s != e]
        if len(moved) >= 2 and len(moved) * 2 >= len([s for s in sources if s is not None]):
            return True
    spans = o.detail("token_rows")
    return any(len(found["moved"]) >= 2 and -1 not in found["from"].values() for found in spans)


def _sharded_reduced(cause: Cause, o: Observation) -> bool:
    return (
        o.backward_only and bool(o.hit) and o.hit <= set(cause.families) and o.factor is None
        and not o.detail("shares") and not o.replica_axes
    )  # fmt: skip


def _dead(_: Cause, o: Observation) -> bool:
    rows = o.bad("gradient")
    return o.backward_only and not o.propagates and all(row.ratio == 0.0 for row in rows)


def _shares(cause: Cause, o: Observation) -> bool:
    if cause.id == "gradient-not-zeroed":
        pairs = o.detail("now_and_previous")
        return bool(pairs) and all(o.near(pair[0], 1.0) for pair in pairs)
    tables = o.detail("shares")
    if not tables or o.bad("routing"):
        return False
    if cause.id == "local-mean-loss":
        sizes = o.detail("tokens")[0]
        return all(_same(o, table, _local_means(sizes)) for table in tables)
    if o.forward_differs:
        return False
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
    fits = o.detail("main_and_auxiliary")
    if not fits:
        return False
    if cause.id == "auxiliary-scope":
        return all(len(c) == 3 and _is(o, c[1], 0.0) and not _is(o, c[2], 0.0) for c in fits)
    return all(_is(o, c[0], 1.0) and not _is(o, c[1], 1.0) and len(c) == 2 for c in fits)


def _detached(_: Cause, o: Observation) -> bool:
    if not o.backward_only or not o.above_is_right or o.top_state("expert") != "ok":
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
    assert cause.factor is not None
    router = o.top_scale("router")
    is_router = o.setting.auxiliary is not False or o.near(router, cause.factor(o.setting))
    return is_router and o.near(o.top_scale("expert"), cause.factor(o.setting))


def _adjoint(_: Cause, o: Observation) -> bool:
    return (
        o.backward_only and o.above_is_right and o.propagates and o.top_state("router") == "ok"
        and o.top_state("expert") in ("ok", "structural") and o.norm_state == "structural"
    )  # fmt: skip


def _input_partial(_: Cause, o: Observation) -> bool:
    return _only_below(o) and o.norm_state == "ok" and not _is_dense_partial(o)


def _only_below(o: Observation) -> bool:
    """The last MoE layer's own gradients are right and those below it are not."""
    inside = {o.top_state(family) for family in ("expert", "router", "shared_expert")}
    return o.backward_only and o.above_is_right and inside <= {"ok", "absent"} and o.propagates


def _input_scaled(cause: Cause, o: Observation) -> bool:
    if not _only_below(o):
        return False
    assert cause.factor is not None
    scales = [row.scale for row in o.norm_rows]
    if o.norm_state == "scaled":
        return all(o.near(scale, cause.factor(o.setting)) for scale in scales)
    return o.norm_state == "structural" and o.setting.shared is not False


def _dense_partial(_: Cause, o: Observation) -> bool:
    return _only_below(o) and _is_dense_partial(o)


def _is_dense_partial(o: Observation) -> bool:
    """The failing tensor nearest to the loss is a norm, short of a factor tp."""
    rows = [r for r in o.bad("gradient") if _layer(str(r.tensor)) == o.top]
    if not rows or o.norm_state != "ok":
        return False
    last = rows[-1]
    return last.family == "layernorm" and o.near(last.scale, 1 / o.setting.tp)


def _forward(o: Observation) -> bool:
    return o.forward_differs and o.first_routing is None and not o.detail("shares")


def _spans(o: Observation) -> Mapping[str, Any] | None:
    found = o.detail("token_rows")
    return found[0] if found else None


def _weights_twice(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    return _forward(o) and (spans is None or not (spans["lost"] or spans["foreign"]))


def _rows(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    if not _forward(o) or _is_permuted(o):
        return False
    return spans is None or (
        spans["lost"] + spans["foreign"] > 0 and -1 not in spans["from"].values()
    )


def _etp_rows(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    nobody = spans is not None and -1 in spans["from"].values()
    return _forward(o) and not nobody and not _is_permuted(o)


def _shared_forward(cause: Cause, o: Observation) -> bool:
    return _weights_twice(cause, o)


def _bias_forward(_: Cause, o: Observation) -> bool:
    spans = _spans(o)
    return _forward(o) and (spans is None or spans["foreign"] > 0) and not _is_permuted(o)


def _routing(_: Cause, o: Observation) -> bool:
    return o.first_routing is not None and not (o.first_routing.detail or {}).get("lanes_differ")


def _routing_lanes(_: Cause, o: Observation) -> bool:
    return o.first_routing is not None and bool((o.first_routing.detail or {}).get("lanes_differ"))


def _gradients_right(o: Observation) -> bool:
    return not (o.bad("gradient") or o.bad("replica") or o.bad("loss") or o.bad("routing"))


def _norm_high(_: Cause, o: Observation) -> bool:
    rows = o.bad("grad_norm")
    return _gradients_right(o) and bool(rows) and all((r.ratio or 0.0) > 1.0 for r in rows)


def _norm_low(_: Cause, o: Observation) -> bool:
    rows = o.bad("grad_norm")
    return _gradients_right(o) and bool(rows) and all((r.ratio or 0.0) < 1.0 for r in rows)


def _update_only(o: Observation) -> bool:
    return _gradients_right(o) and not o.bad("grad_norm") and bool(o.bad("update"))


def _clip(_: Cause, o: Observation) -> bool:
    if not _update_only(o) or o.setting.clip <= 0:
        return False
    scales = [(r.detail or {}).get("end_to_end_scale") for r in o.bad("update")]
    if o.setting.optimizer in ("sgd", "momentum"):
        kept = 1 / o.setting.clip
        return all(s is not None and math.isclose(s, kept, rel_tol=2e-3) for s in scales)
    return {str(r.family) for r in o.bad("update")} != {"expert"}


def _update(cause: Cause, o: Observation) -> bool:
    return _update_only(o) and not _clip(cause, o) and not _idle(cause, o)


def _idle(_: Cause, o: Observation) -> bool:
    missing = [r for r in o.bad("gradient") if (r.detail or {}).get("missing")]
    if missing:
        return o.backward_only and len(missing) == len(o.bad("gradient")) and o.hit == {"expert"}
    return _update_only(o) and {str(r.family) for r in o.bad("update")} == {"expert"}


def _checkpoint(_: Cause, o: Observation) -> bool:
    return any((r.detail or {}).get("kind") != "optimizer" for r in o.bad("checkpoint"))


def _resume(_: Cause, o: Observation) -> bool:
    return any((r.detail or {}).get("kind") == "optimizer" for r in o.bad("checkpoint"))


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
    "dense_partial": _dense_partial, "weights_twice": _weights_twice, "rows": _rows,
    "etp_rows": _etp_rows, "shared_forward": _shared_forward, "bias_forward": _bias_forward,
    "routing": _routing, "routing_lanes": _routing_lanes, "norm_high": _norm_high,
    "norm_low": _norm_low, "clip": _clip, "update": _update, "idle": _idle,
    "checkpoint": _checkpoint, "resume": _resume, "unknown_factor": _unknown_factor,
    "unknown": _unknown,
})  # fmt: skip


def matches(cause: Cause, observation: Observation) -> bool:
    """Tell whether a cause would give what a failing run shows."""
    if cause.visible(observation.setting) is False:
        return False
    return _MATCHERS[cause.signature](cause, observation)


# --- sets of causes -------------------------------------------------------------------------------


def fitting(observation: Observation) -> list[Cause]:
    """Give every cause that fits one failing run; the fallbacks only where nothing else does."""
    found = [c for c in CAUSES if c.id not in FALLBACKS and matches(c, observation)]
    return found or [c for c in CAUSES if c.id in FALLBACKS and matches(c, observation)]


def causes(rows: Iterable[Row], case: Case | None = None) -> list[Cause]:
    """Give the set of causes of one failing case; empty where nothing fails.

    Where the baseline's run fails, too, a cause must explain both. That it passes says nothing: an
    implementation may have code for folded runs alone.
    """
    bad = [o for o in observe(rows, case) if o.failing]
    if not bad:
        return []
    bad.sort(key=lambda o: not o.folded)
    found = fitting(bad[0])
    return [c for c in found if all(matches(c, o) for o in bad[1:])] or found


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
    cells = [o for rows in results for o in observe(rows, (cases or {}).get(rows[0].case))]
    bad = [o for o in cells if o.failing]
    good = [o for o in cells if not o.failing and o.folded]
    counted = [(c, sum(matches(c, o) for o in bad)) for c in CAUSES if c.id not in FALLBACKS]
    left = [
        (cause, count)
        for cause, count in counted
        if count and not any(cause.visible(o.setting) is True for o in good)
    ]
    if left:
        most = max(count for _, count in left)
        return [cause for cause, count in left if count == most]
    return [c for c in CAUSES if c.id in FALLBACKS and any(matches(c, o) for o in bad)]


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
