"""The weights' delta: every rule of the update rows has a fault that trips it and a near miss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from parity.case import Optimizer
from parity.compare import FACTOR, UNIT_ROUNDOFF, norm
from parity.optimizers import ReferenceOptimizer
from parity.store import Row
from parity.update import OptimizerStep, update_rows
from tests.parity.example_tensors import (
    BF16,
    F32,
    F64,
    LAYOUT,
    PLACEMENTS,
    SHAPES,
    Tensors,
    context,
    draw,
    given,
    noisy,
)

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(name="sgd"),
    "momentum": Optimizer(name="momentum", weight_decay=0.01),
    "adam": Optimizer(name="adam", weight_decay=0.01),
    "adamw": Optimizer(name="adamw", weight_decay=0.01),
    "lion": Optimizer(name="lion", weight_decay=0.01),
}
LR = 0.5


@dataclasses.dataclass
class Trainer:
    """An engine in one dtype whose every part can be made wrong.

    corrupt: applied to the true gradient, gives the engine's own. spoil: applied to the engine's
    deltas. norm_factor: what it gets its norm wrong by.
    """

    dtype: torch.dtype
    spec: Optimizer
    clip: float = 0.0
    corrupt: Callable[[Tensors], Tensors] = lambda tensors: tensors
    spoil: Callable[[Tensors], Tensors] = lambda tensors: tensors
    norm_factor: float = 1.0
    lr: float = LR
    seed: int = 0
    weight_dtype: torch.dtype | None = None
    structural_zero: frozenset[str] = frozenset()

    def rows(self, steps: int = 1) -> dict[str, Row]:
        """Take some steps and give the last one's rows."""
        held = self.weight_dtype or self.dtype
        weights = {name: t.to(held) for name, t in draw(self.seed + 500).items()}
        weights["experts"][-1] = 0.25
        engine = ReferenceOptimizer(self.spec, self.lr)
        truth, own = ReferenceOptimizer(self.spec, self.lr), ReferenceOptimizer(self.spec, self.lr)
        rows: list[Row] = []
        for number in range(steps):
            true = draw(self.seed + number)
            grads = {n: t.to(self.dtype) for n, t in self.corrupt(dict(true)).items()}
            max_norm = self.clip * norm(true.values())
            wide = {n: t.double() for n, t in grads.items()}
            factor = 1.0
            if max_norm:
                factor = min(1.0, max_norm / (self.norm_factor * norm(wide.values()) + 1e-6))
            deltas = engine.step(
                {n: t.double() for n, t in weights.items()},
                {n: t * factor for n, t in wide.items()},
            )
            after = {n: (weights[n].double() + d).to(held) for n, d in self.spoil(deltas).items()}
            step = OptimizerStep(given(weights), given(after), given(grads), true, max_norm)
            rows = update_rows(
                context(self.dtype), step, truth, own, PLACEMENTS, LAYOUT,
                weight_dtype=self.weight_dtype, structural_zero=self.structural_zero,
            )  # fmt: skip
            weights = after
        for row in rows:
            row.to_json()
        return {str(row.tensor): row for row in rows}


def verdicts(rows: Mapping[str, Row]) -> set[str]:
    """Collect the verdicts."""
    return {row.verdict for row in rows.values()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_right_step_passes(name: str, dtype: torch.dtype, clip: float, seed: int) -> None:
    """Three steps with gradients 10 u off, clip off and on: every row passes, end to end too."""
    trainer = Trainer(
        dtype, OPTIMIZERS[name], clip, lambda t: noisy(t, 10, dtype, seed + 7), seed=10 * seed
    )
    rows = trainer.rows(3)
    assert verdicts(rows) == {"pass"}
    for row in rows.values():
        assert row.detail is not None
        assert row.threshold is not None
        end_to_end = name in ("sgd", "momentum") or dtype is F64
        assert row.detail["judged"] == ("end_to_end" if end_to_end else "own_gradient")
        assert row.detail["end_to_end_scale"] == pytest.approx(1.0, abs=1e-4)


def test_the_threshold_is_bound_plus_printed_floor() -> None:
    """|w| 5, delta (0.3, 0.4) under SGD: floor = u (5 + |w1|) / 0.5, bound 64 u or twice that."""
    before = torch.tensor([3.0, 4.0], dtype=F64)
    grad = torch.tensor([-3.0, -4.0], dtype=F64)
    after = before + torch.tensor([0.3, 0.4], dtype=F64)
    for dtype, bounds in ((F64, 1), (F32, 2)):
        sgd = [ReferenceOptimizer(Optimizer(), 0.1) for _ in range(2)]
        step = OptimizerStep(
            given({"norm": before}), given({"norm": after}), given({"norm": grad}), {"norm": grad}
        )
        (row,) = update_rows(context(dtype), step, sgd[0], sgd[1], PLACEMENTS, LAYOUT)
        unit = UNIT_ROUNDOFF[dtype]
        assert row.detail is not None
        assert row.detail["floor"] == pytest.approx(unit * (5 + 5.5) / 0.5)
        assert row.threshold == pytest.approx(bounds * FACTOR * unit + row.detail["floor"])


def times(factor: float, *names: str) -> Callable[[Tensors], Tensors]:
    """Give a fault that scales some tensors."""
    return lambda tensors: {
        name: tensor * factor if name in names else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [F64, F32])
def test_sgd_shows_a_factor_that_adam_hides(dtype: torch.dtype) -> None:
    """Experts x 4 (never uncancelled): SGD's row fails with scale 4, Adam's own step passes."""
    sgd = Trainer(dtype, OPTIMIZERS["sgd"], corrupt=times(4.0, "experts")).rows()
    assert sgd["experts"].verdict == "fail"
    assert sgd["experts"].scale == pytest.approx(4.0, rel=1e-5)
    assert sgd["q"].verdict == "pass"
    adam = Trainer(dtype, Optimizer(name="adam"), corrupt=times(4.0, "experts")).rows()
    detail = adam["experts"].detail
    assert detail is not None
    assert detail["end_to_end_scale"] == pytest.approx(1.0, abs=1e-6)
    assert detail["own_error"] < 1e-5
    if dtype is F32:
        assert adam["experts"].verdict == "pass"


def test_float64_sees_adams_eps() -> None:
    """Adam(4 g, eps) is Adam(g, eps / 4): 1e-8 in float64, far over 64 u end to end."""
    row = Trainer(F64, Optimizer(name="adam"), corrupt=times(4.0, "experts")).rows()["experts"]
    assert row.verdict == "fail"
    assert row.error is not None
    assert 1e-10 < row.error < 1e-5


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 2e-5, "fail"), (1 + 3e-6, "pass")])
def test_float32_sgd_is_judged_end_to_end(factor: float, verdict: str) -> None:
    """A gradient factor shows in the delta down to its two bounds and the floor."""
    rows = Trainer(F32, OPTIMIZERS["sgd"], corrupt=times(factor, "q")).rows()
    assert rows["q"].verdict == verdict


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_step_with_another_size_fails(dtype: torch.dtype, name: str) -> None:
    """The optimizer's delta 1.001 times too large, with right gradients, fails; 1 + u does not."""
    wrong = Trainer(dtype, OPTIMIZERS[name], spoil=times(1.001, "q")).rows()
    assert (wrong["q"].verdict, wrong["norm"].verdict) == ("fail", "pass")
    assert wrong["q"].reason is not None
    assert "own gradient" in wrong["q"].reason
    unit = UNIT_ROUNDOFF[dtype]
    assert verdicts(Trainer(dtype, OPTIMIZERS[name], spoil=times(1 + unit, "q")).rows()) == {"pass"}


def test_a_compensated_step_fails_by_its_own_gradient() -> None:
    """Gradient x 4 and step / 4 give the right delta: end to end fine, the own step is not."""
    trainer = Trainer(F32, OPTIMIZERS["sgd"], corrupt=times(4.0, "q"), spoil=times(0.25, "q"))
    row = trainer.rows()["q"]
    assert row.error is not None
    assert row.threshold is not None
    assert row.error <= row.threshold
    assert row.verdict == "fail"
    assert row.detail is not None
    assert row.detail["own_error"] == pytest.approx(0.75, abs=1e-5)
    assert row.detail["own_error"] > row.detail["own_threshold"]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_clipping_by_a_wrong_norm_fails_everywhere(dtype: torch.dtype) -> None:
    """Gradients are right, the norm is 1.5 times too large: all deltas share one factor."""
    rows = Trainer(dtype, OPTIMIZERS["sgd"], clip=0.5, norm_factor=1.5).rows()
    assert verdicts(rows) == {"fail"}
    for row in rows.values():
        assert row.scale == pytest.approx(1 / 1.5, rel=1e-4)
    assert verdicts(Trainer(dtype, OPTIMIZERS["sgd"], norm_factor=1.5).rows()) == {"pass"}


@pytest.mark.parametrize("dtype", [F64, F32])
def test_clipping_not_applied_fails(dtype: torch.dtype) -> None:
    """A norm far too small switches clipping off: scale 2 at a limit of half the norm."""
    rows = Trainer(dtype, OPTIMIZERS["momentum"], clip=0.5, norm_factor=1e-3).rows()
    assert verdicts(rows) == {"fail"}


def keep_idle(tensors: Tensors) -> Tensors:
    """Skip the step of the idle expert."""
    out = dict(tensors, experts=tensors["experts"].clone())
    out["experts"][-1] = 0.0
    return out


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "lion"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_an_idle_expert_still_decays(dtype: torch.dtype, name: str) -> None:
    """Its zero gradient is exact, so nothing is excluded: a skipped decay fails."""
    row = Trainer(dtype, OPTIMIZERS[name], spoil=keep_idle).rows()["experts"]
    assert (row.verdict, row.worst is not None and row.worst["expert"]) == ("fail", 3)
    assert verdicts(Trainer(dtype, OPTIMIZERS[name]).rows()) == {"pass"}


def test_a_none_gradient_is_judged_as_zero() -> None:
    """An engine that skips a tensor without gradient misses the decay."""
    weights = {"norm": torch.ones(48, dtype=F64), "q": torch.ones(24, 20, dtype=F64)}
    true = {"norm": torch.zeros(48, dtype=F64), "q": torch.ones(24, 20, dtype=F64)}
    spec = Optimizer(weight_decay=0.1)
    for decay, verdict in ((0.0, "fail"), (0.5 * 0.1, "pass")):
        after = {"norm": weights["norm"] - decay, "q": weights["q"] * (1 - 0.05) - 0.5}
        step = OptimizerStep(
            given(weights), given(after), given({"norm": None, "q": true["q"]}), true
        )
        pair = [ReferenceOptimizer(spec, 0.5) for _ in range(2)]
        rows = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert [row.verdict for row in rows] == [verdict, "pass"]


@pytest.mark.parametrize("name", ["adam", "lion"])
def test_elements_lost_in_roundoff_are_excluded_and_counted(name: str) -> None:
    """An entry of 1e-17 whose sign the engine has otherwise is not judged; one of 1e-12 is."""
    spec = Optimizer(name="adam", eps=1e-30) if name == "adam" else OPTIMIZERS[name]
    for size, verdict, count in ((1e-17, "pass", 1), (1e-12, "fail", 0)):
        true = draw()["q"]
        true[2, 3] = size
        own = true.clone()
        own[2, 3] = -size
        weight = draw(1)["q"]
        after = weight + ReferenceOptimizer(spec, LR).step({"q": weight}, {"q": own})["q"]
        step = OptimizerStep(given({"q": weight}), given({"q": after}), given({"q": own}),
                             {"q": true})  # fmt: skip
        pair = [ReferenceOptimizer(spec, LR) for _ in range(2)]
        (row,) = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert row.verdict == verdict
        assert row.detail is not None
        assert row.detail["excluded"] == count
        assert row.detail.get("excluded_at") == ([[2, 3]] if count else None)


@pytest.mark.parametrize("size", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_that_is_not_finite_fails(name: str, size: float) -> None:
    """Also where the element would be excluded."""
    true = draw()["q"]
    true[2, 3] = 1e-19
    weight, after = draw(1)["q"], draw(2)["q"]
    after = weight + ReferenceOptimizer(OPTIMIZERS[name], LR).step({"q": weight}, {"q": true})["q"]
    after[2, 3] = size
    for dtype in (F64, F32, BF16):
        step = OptimizerStep(given({"q": weight}), given({"q": after}), given({"q": true}),
                             {"q": true})  # fmt: skip
        pair = [ReferenceOptimizer(OPTIMIZERS[name], LR) for _ in range(2)]
        (row,) = update_rows(context(dtype), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert (row.verdict, row.error) == ("fail", None)


def test_a_floor_over_one_percent_is_skipped() -> None:
    """lr 1e-6 in float32 drowns the delta in the weights' rounding; lr 1e-4 does not."""
    drowned = Trainer(F32, OPTIMIZERS["sgd"], lr=1e-6).rows()["q"]
    assert (drowned.verdict, drowned.reason) == ("skipped", "below resolution")
    assert drowned.detail is not None
    assert drowned.detail["floor"] > 1e-2
    assert Trainer(F32, OPTIMIZERS["sgd"], lr=1e-4).rows()["q"].verdict == "pass"


def test_a_wrong_number_is_never_skipped() -> None:
    """A delta beyond even its floor fails at any resolution."""
    row = Trainer(F32, OPTIMIZERS["sgd"], lr=1e-6, spoil=times(9.0, "q")).rows()["q"]
    assert row.verdict == "fail"


def test_master_weights_are_judged_at_their_own_roundoff() -> None:
    """bf16 gradients, float32 weights: the own step is exact, end to end goes by scale."""
    own = {"dtype": BF16, "weight_dtype": F32}
    spec = OPTIMIZERS["sgd"]
    rows = Trainer(BF16, spec, weight_dtype=F32).rows()
    assert verdicts(rows) == {"pass"}
    for row in rows.values():
        assert row.detail is not None
        assert row.detail["own_threshold"] < 1e-5
    assert verdicts(Trainer(**own, spec=spec, corrupt=times(1.01, *SHAPES)).rows()) == {"pass"}  # type: ignore[arg-type]
    assert verdicts(Trainer(**own, spec=spec, corrupt=times(1.03, *SHAPES)).rows()) == {"fail"}  # type: ignore[arg-type]
    assert verdicts(Trainer(**own, spec=spec, spoil=times(1.0001, *SHAPES)).rows()) == {"fail"}  # type: ignore[arg-type]


def test_a_leaking_gradient_leaks_into_the_update() -> None:
    """The optimizer did right by a gradient that was rounded: leak, not fail."""
    rounded = Trainer(
        F64, OPTIMIZERS["sgd"], corrupt=lambda t: {n: g.to(F32).double() for n, g in t.items()}
    )
    assert verdicts(rounded.rows()) == {"leak"}
    assert verdicts(dataclasses.replace(rounded, spoil=times(1.001, *SHAPES)).rows()) == {"fail"}


def structural(name: Any, size: float, declared: bool) -> Row:
    """Step a router whose true gradient is round-off and whose own one has the given size."""
    spec = Optimizer(name=name)
    true = {"router": 1e-17 * draw()["router"], "q": draw()["q"]}
    own = {"router": size * draw(8)["router"], "q": draw()["q"]}
    before = {held: draw(500)[held] for held in true}
    deltas = ReferenceOptimizer(spec, LR).step(before, own)
    after = {held: before[held] + deltas[held] for held in true}
    step = OptimizerStep(given(before), given(after), given(own), true)
    rows = update_rows(
        context(), step, ReferenceOptimizer(spec, LR), ReferenceOptimizer(spec, LR), PLACEMENTS,
        LAYOUT, structural_zero=frozenset({"router"} if declared else ()),
    )  # fmt: skip
    return rows[0]


def test_a_structural_zero_steps_by_its_own_gradient() -> None:
    """Two round-offs have no common direction: sign-like steps of them are judged alone."""
    assert structural("sgd", 1e-17, declared=True).verdict == "pass"
    assert structural("sgd", 1e-3, declared=True).verdict == "fail"
    for name in ("adam", "lion"):
        row = structural(name, 1e-17, declared=True)
        assert row.detail is not None
        assert row.detail["judged"] == "own_gradient"
        assert row.verdict in ("pass", "skipped")
    assert structural("lion", 1e-17, declared=True).verdict == "pass"


@pytest.mark.parametrize("seed", range(4))
def test_adam_is_not_judged_where_it_amplifies(seed: int) -> None:
    """One entry of 1e-7 off by 10 u rms moves 1e8 u: excluded, counted, and judged alone."""
    expected = draw(seed)["q"]
    expected[2, 3] = 1e-7
    own = expected.clone()
    own[2, 3] += 10 * UNIT_ROUNDOFF[F64]
    weight = draw(seed + 500)["q"]
    spec = Optimizer(name="adam")
    for factor, verdict in ((1.0, "pass"), (1.01, "fail")):
        delta = ReferenceOptimizer(spec, LR).step({"q": weight}, {"q": own})["q"]
        delta[2, 3] *= factor
        step = OptimizerStep(
            given({"q": weight}), given({"q": weight + delta}), given({"q": own}), {"q": expected}
        )
        pair = [ReferenceOptimizer(spec, LR) for _ in range(2)]
        (row,) = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert row.verdict == verdict
        assert row.detail is not None
        assert [2, 3] in row.detail["excluded_at"]
        assert row.detail["excluded"] <= 2
