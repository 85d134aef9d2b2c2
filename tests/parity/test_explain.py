"""Hand-made faults, planted at the points of the native engine: is the true cause in the set?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import case as cases
from parity import explain, taps, threads
from parity.case import Case
from parity.causes import BY_ID, CAUSES, Setting
from parity.evidence import factor_table, observe, setting_of, symbols_of
from parity.judge import Judge
from parity.store import FAILING, Row
from parity.trial import Order, Planted, RankResult
from tests.parity.example_rows import passing, row


class Here:
    """Runs every order as threads of this process."""

    def run(
        self,
        _world: int,
        _task: str,
        payloads: Sequence[Any],
        _deadline_s: float,
        _backend: str | None = None,
    ) -> list[list[RankResult]]:
        """Run one order."""
        (order,) = payloads
        assert isinstance(order, Order)
        return [threads.run(None, order)]


def case(**changes: Any) -> Case:
    """Make a float64 case on threads; `shape__tp=2` sets shape.tp."""
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    common = {
        "engine.dtype": "float64", "engine.backend": "threads", "model.experts": 6,
        "data.length": 4,
    }  # fmt: skip
    return cases.make({**common, **flat}, suite="explain", file="explain.toml")


SHAPES = {
    # dp 2, edp 1: tp = dp, so factors are ambiguous here
    "square": case(shape__world=4, shape__tp=2, shape__ep=2, shape__etp=2, engine__gas=3),
    # dp 3, edp 2: dp / edp is no other factor
    "uneven": case(
        shape__world=6, shape__tp=2, shape__ep=3, engine__gas=2,
        auxiliary__load_balance=0.05, auxiliary__scope="global",
    ),
    # dp 2, edp 3, clipped, lanes with consumers of their own
    "lanes": case(
        shape__world=6, shape__tp=3, shape__ep=2, engine__clip=0.5, data__lane_varying=True,
    ),
}  # fmt: skip


@functools.cache
def judge() -> Judge:
    """Give one judge for all tests: its references and baselines are shared."""
    return Judge(implementation="fold_impl", pool=Here())


# --- the faults -----------------------------------------------------------------------------------


def times_tp(value: Tensor, *, family: str, only: str, layout: Any, **_: Any) -> Tensor:
    """Multiply a family's reduced gradient by tp."""
    return value * layout.tp_size if family == only else value


def mean_over_edp(value: Tensor, *, family: str, layout: Any, **_: Any) -> Tensor:
    """Divide an expert's sum by edp where dp is due."""
    edp = layout.stage_size // (layout.ep_size * layout.etp_size)
    return value * layout.dp_size / edp if family == "expert" else value


def own_lane_only(value: Any, *, family: str, **_: Any) -> Any:
    """Leave the lanes out of the router's reduction."""
    return type(value).SKIP if family == "router" else value


def lanes_averaged(value: Any, **_: Any) -> Any:
    """Average shards of different lanes."""
    return type(value).AVERAGE if value.name == "SKIP" else value


def times_gas(value: Tensor, *, gas: int, **_: Any) -> Tensor:
    """Undo the division by gas."""
    return value * gas


def last_only(value: Tensor | None, *, micro_batch: int, gas: int, **_: Any) -> Tensor | None:
    """Keep nothing before the last micro-batch."""
    return value if micro_batch == gas - 1 else None


def without_first(value: Tensor | None, *, micro_batch: int, gas: int, **_: Any) -> Tensor | None:
    """Zero gradients after the first backward of several."""
    return None if micro_batch == 0 and gas > 1 else value


def as_it_is(_: Any, **__: Any) -> Callable[..., Tensor]:
    """Put the identity in the place of a boundary function."""
    return lambda x, _group: x


class OwnRows(torch.autograd.Function):
    """Forward as given; backward keeps this lane's rows of its own gradient, times tp."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, function: Any, tokens: int, group: Any) -> Tensor:
        """Restore."""
        ctx.start, ctx.rows = group.index * -(-tokens // group.size), own.shape[0]
        ctx.times = group.size
        out: Tensor = function(own, tokens, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Cut."""
        own = gradient[ctx.start : ctx.start + ctx.rows] * ctx.times
        return own, None, None, None


def slices_back(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """Make the restore's backward a slice."""

    def restore(own: Tensor, tokens: int, group: Any) -> Tensor:
        if group.handle is None:
            return function(own, tokens, group)
        out: Tensor = OwnRows.apply(own, function, tokens, group)
        return out

    return restore


def detached(value: Tensor, **_: Any) -> Tensor:
    """Cut the gradient off."""
    return value.detach()


def twice(value: Tensor, **_: Any) -> Tensor:
    """Use a weight twice."""
    return value * value


def gradient_times(value: Tensor, *, factor: float, **_: Any) -> Tensor:
    """Keep the value, scale its gradient."""
    return value.detach() + factor * (value - value.detach())


def next_expert(value: Tensor, **_: Any) -> Tensor:
    """Send rows to expert e + 1."""
    return (value + 1) % 6


def through_float32(value: Tensor, **_: Any) -> Tensor:
    """Round."""
    return value.float().double()


def counted_on_every_lane(value: Tensor, *, family: str, layout: Any, **_: Any) -> Tensor:
    """Count what is replicated once for every lane."""
    return value if family in ("expert", "attention", "dense") else value * layout.tp_size


def no_clipping(_: float, **__: Any) -> float:
    """Leave gradients as they are."""
    return 1.0


def own_mean(value: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Average over this rank's tokens."""
    return {**value, "loss_scale": 1.0 / value["labels"].numel()}


def lost_last_row(value: Tensor, **_: Any) -> Tensor:
    """Zero the last row that comes back."""
    kept = torch.ones(len(value), 1, dtype=value.dtype)
    kept[-1:] = 0
    return value * kept


@dataclass(frozen=True)
class Fault:
    """A fault: point, function of this module, the true cause, the shapes it must show on."""

    point: str
    function: Callable[..., Any]
    cause: str
    shows: tuple[str, ...] = tuple(SHAPES)
    options: Mapping[str, Any] = field(default_factory=dict)
    left: int = 1
    """Causes left after intersecting shapes."""

    def planted(self) -> Planted:
        """Give what every rank plants."""
        return Planted(self.point, f"{__name__}:{self.function.__name__}", self.options)

    @property
    def name(self) -> str:
        """Name the fault by what it does."""
        return self.function.__name__.replace("_", "-")


FAULTS = (
    Fault("reduce.reduced", times_tp, "restore-factor-not-cancelled", options={"only": "expert"}),
    Fault("reduce.reduced", times_tp, "router-summed-over-tp", options={"only": "router"}),
    Fault("reduce.reduced", times_tp, "replicated-summed-over-tp", options={"only": "layernorm"}),
    Fault("reduce.reduced", mean_over_edp, "expert-divided-by-edp"),
    Fault("reduce.rule", own_lane_only, "tp-reduction-missing"),
    Fault("reduce.rule", lanes_averaged, "sharded-reduced-over-tp"),
    Fault("batch.loss", times_gas, "gas-not-applied", ("square", "uneven")),
    Fault("step.accumulate", last_only, "micro-batches-overwritten", ("square", "uneven")),
    Fault("step.accumulate", without_first, "first-micro-batch-lost", ("square", "uneven")),
    Fault("batch.inputs", own_mean, "local-mean-loss"),
    Fault("moe.input", as_it_is, "input-gradient-partial"),
    Fault("moe.restore", slices_back, "restore-own-rows-only", ("lanes",), left=2),
    Fault("router.weights", detached, "routing-weights-detached"),
    Fault("combine.weights", twice, "routing-weight-applied-twice"),
    Fault("auxiliary.loss", gradient_times, "auxiliary-scaled", ("uneven",), {"factor": 2.0}),
    Fault("dispatch.experts", next_expert, "expert-permutation"),
    Fault("reduce.bucket", through_float32, "precision-leak-float32"),
    Fault("norm.square", counted_on_every_lane, "norm-counts-replicas"),
    Fault("clip.coefficient", no_clipping, "clip-not-applied", ("lanes",)),
    Fault("expert.partial", lost_last_row, "rows-lost-or-shifted", left=2),
)


@functools.cache
def results(fault: Fault | None) -> dict[str, list[Row]]:
    """Judge every shape with a fault planted."""
    planted = () if fault is None else (fault.planted(),)
    return {name: judge().with_planted(*planted).rows(c) for name, c in SHAPES.items()}


def failing(rows: Sequence[Row]) -> list[Row]:
    """Keep the failing rows."""
    return [r for r in rows if r.verdict in FAILING]


Fault.__hash__ = lambda self: id(self)  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.name}-{f.cause}")
def test_the_true_cause_is_in_the_printed_set(fault: Fault) -> None:
    """On every shape it shows: at most three causes, the true one among them; then which is left."""
    found = results(fault)
    assert {name for name, rows in found.items() if failing(rows)} == set(fault.shows)
    for name in fault.shows:
        sets = {r.causes for r in failing(found[name])}
        assert len(sets) == 1, "all failing rows of a case carry the same set"
        (causes,) = sets
        assert fault.cause in causes, name
        assert len(causes) <= 3, causes
    left = [c.id for c in explain.intersect([*found.values()], {c.id: c for c in SHAPES.values()})]
    assert fault.cause in left
    assert len(left) <= fault.left, left


def test_what_passes_has_no_cause() -> None:
    """Without a fault no row fails and none carries a cause."""
    for rows in results(None).values():
        assert not failing(rows)
        assert {r.causes for r in rows} == {()}
    assert explain.intersect([*results(None).values()]) == []
