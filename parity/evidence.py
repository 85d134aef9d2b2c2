"""What one run of one case shows, read off its rows: the evidence a cause is matched against.

Owns the reading of rows: which quantity is wrong first, which families, by one factor or in their
structure, and where in the backward it begins. Must not know causes' matching, tensors or
implementations. Easy to get wrong: one wrong number makes later ones wrong, so only the first step
with a failing row is read, and the baseline's rows are a run of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from parity.case import Case
from parity.causes import Setting
from parity.store import FAILING, Row

SIZES = ("tp", "dp", "ep", "edp", "etp", "gas", "world")
_TOLERANCES = MappingProxyType(
    {"float64": 1e-9, "float32": 5e-5, "bfloat16": 2e-2, "float16": 3e-3}
)
"""Largest distance of a measured factor from a predicted one, relative."""
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
        auxiliary=case.auxiliary.active,
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
    def engine(self) -> str:
        """Name of the engine; two of them share no step."""
        return str(self.rows[0].engine["name"])

    @property
    def is_exact(self) -> bool:
        """Tell whether the run is in 32 or 64 bits."""
        return self.rows[0].engine["dtype"] in ("float32", "float64")

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

    @cached_property
    def alterations(self) -> list[str] | None:
        """Altered forwards with exactly this run's loss; None where none was tried."""
        details = [row.detail or {} for row in self.bad("loss")]
        return next((detail["loss_of"] for detail in details if "loss_of" in detail), None)

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
        return all(row.verdict in FAILING or row.ratio is None for row in self.of("gradient"))

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
        layers = [layer_of(str(r.tensor)) for r in self.of("gradient") if r.family == "expert"]
        return max(layers, default=-1)

    def top_state(self, family: str) -> State:
        """Say how a family differs in the last MoE layer: the worst of its tensors."""
        rows = [
            r for r in self.of("gradient")
            if r.family == family and layer_of(str(r.tensor)) == self.top
        ]  # fmt: skip
        states = {self.state(row) for row in rows}
        order: tuple[State, ...] = ("structural", "scaled", "ok")
        return next((state for state in order if state in states), "absent")

    @cached_property
    def norm_rows(self) -> list[Row]:
        """Gradient rows of the norm that feeds the last MoE layer, its last norm."""
        norms = [
            r for r in self.of("gradient")
            if r.family == "layernorm" and layer_of(str(r.tensor)) == self.top
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
        return not any(layer_of(str(r.tensor)) < 0 and r.family != "embedding"
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
            if r.family == family and layer_of(str(r.tensor)) == self.top
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


def layer_of(name: str) -> int:
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
