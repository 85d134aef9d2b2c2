"""The weights' delta of one optimizer step against what the optimizer should have done.

Owns the rows of quantity `update` and their limits. Must not know processes, models or
implementations. Easy to get wrong: *weights* after a step hide a factor 4 on a gradient (they
printed 1.011), so deltas are compared, and a delta far below the weight is lost in its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parity.collect import Assembled
from parity.compare import (
    FACTOR,
    SCALE_LIMIT,
    UNIT_ROUNDOFF,
    Metrics,
    RowContext,
    divisors,
    expert_failures,
    family_norms,
    make_row,
    metrics,
    norm,
    norm_of,
    quotient,
    threshold,
    verdict_of,
    worst_of,
)
from parity.errors import ParityError
from parity.implementation import Placement
from parity.layout import Layout
from parity.leak import leaked_dtype
from parity.optimizers import ReferenceOptimizer, clip_coefficient
from parity.store import FAILING, Row

RESOLUTION = 1e-2
"""Largest rounding floor of an update row that still tells something."""
AMPLIFICATION = 16.0
"""Most that Adam may enlarge an element's gradient error and still be judged end to end; one
element at the limit, 10 u off, uses 160 u of the 64 u sqrt(n) that n elements are allowed."""


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step started from and led to.

    Attributes:
        before: weights before the step, in the engine's dtype (master weights where they exist).
        after: weights after it.
        own_gradient: the engine's own gradients, reduced, not clipped; None counts as zero.
        true_gradient: full logical name -> reference gradient at the same weights.
        max_norm: clipping limit, 0: off.
    """

    before: Assembled
    after: Assembled
    own_gradient: Assembled
    true_gradient: Mapping[str, Tensor]
    max_norm: float = 0.0


@dataclass(frozen=True)
class _Delta:
    """One delta compared with one expectation.

    floor: u (|w0| + |w1|) / |delta|; expert_floors: the same per expert; excluded: mask or None.
    """

    found: Metrics
    floor: float
    expert_floors: Tensor | None
    excluded: Tensor | None


def update_rows(
    context: RowContext,
    step: OptimizerStep,
    truth: ReferenceOptimizer,
    own: ReferenceOptimizer,
    placements: Mapping[str, Placement],
    layout: Layout,
    *,
    weight_dtype: torch.dtype | None = None,
    structural_zero: frozenset[str] = frozenset(),
) -> list[Row]:
    """Compare the weights' delta of one step with what the optimizer should have done.

    With delta = w1 - w0 (exact in float64), u the round-off of the weights' dtype, v that of the
    gradients', g0 and g1 the true and the engine's own gradient, each clipped by its own norm:

    floor. w1 = fl(fl(w0 (1 - lr wd)) + step) rounds at most by u|w0| and u|w1|, so a correct
    delta is off by u(|w0| + |w1|) in norm, floor = u(|w0| + |w1|) / |delta|.

    own gradient. delta against optimizer(g1, own state): the engine's arithmetic on few numbers
    per element, <= 64 u + floor. Always judged. Under Lion, elements whose sign argument
    c = b1 m + (1 - b1) g cancels to |c| < 64 u (b1|m| + (1 - b1)|g|) are excluded.

    end to end. delta against optimizer(g0, true state). Linear optimizers carry the gradient's
    relative error over unchanged: <= 64 v + 64 u + floor (float64: 64 u + floor; 16-bit
    gradients: |scale - 1| <= the gradient's limit + 64 u + floor). Sign-like ones (Adam, AdamW,
    Lion) turn an error of 64 v rms(g) on an element below it into a whole flipped lr, so they are
    judged in float64 only, without the elements with sqrt(vhat) < 64 v rms (after one step
    |g| < 64 v rms(g); Lion: |c| against the rms of its terms). That alone is not enough for Adam:
    an element off by d moves by d R eps / (|g| + eps)^2 in the first step, by about d R /
    sqrt(vhat) later; at eps 1e-8 and |g| = 1e-5 rms that is 100 d, and 1 element in 1e5 is that
    small. So elements that amplify more than 16 times are excluded, too. One on which both sides
    have only ever had a gradient of exactly zero is not excluded: there is nothing to flip.
    Elsewhere the figures are reported in `detail.end_to_end_*`. Adam(s g) = Adam(g) but for eps:
    a factor s stands in SGD's row and not in Adam's.

    Args:
        context: what the rows share; its dtype is the gradients'.
        step: weights before and after, gradients, clipping limit.
        truth: reference optimizer fed with the true gradients of all steps so far.
        own: reference optimizer fed with the engine's own gradients of all steps so far.
        placements: full logical name -> family and cuts.
        layout: sizes, to name the rank of the worst entry.
        weight_dtype: dtype of the weights given; default: the gradients'.
        structural_zero: names whose true gradient is zero but for round-off.

    Returns:
        One row per tensor: `skipped` where nothing is wrong but floor > 1e-2.
    """
    weight_dtype = weight_dtype or context.dtype
    names = list(step.true_gradient)
    before = {name: _weight(step.before, name) for name in names}
    after = {name: _weight(step.after, name) for name in names}
    true_delta, own_delta = _expected_deltas(step, before, truth, own)
    judge = _UpdateJudge(
        context, placements, layout, UNIT_ROUNDOFF[weight_dtype],
        UNIT_ROUNDOFF[context.dtype], structural_zero,
        family_norms({n: norm_of(t) for n, t in true_delta.items()}, placements, structural_zero),
        family_norms({n: norm_of(t) for n, t in own_delta.items()}, placements),
    )  # fmt: skip
    rows = []
    for name in names:
        weights = before[name], after[name]
        end_to_end = judge.compare_end_to_end(name, weights, true_delta[name], truth, own)
        own_step = judge.compare_own(name, weights, own_delta[name], own)
        leak = _is_gradient_leak(context, step, name)
        rows.append(judge.row(name, end_to_end, own_step, truth, true_delta[name], leak))
    return rows


def beside_unclipped(
    rows: Sequence[Row], steps: Sequence[OptimizerStep], optimizer: ReferenceOptimizer
) -> list[Row]:
    """Write into failing update rows how far the delta is from that of unclipped gradients.

    `detail.unclipped_scale` and `detail.unclipped_error` compare it with what the optimizer makes
    of the engine's own gradients where the limit meets none from the first step on: they tell a
    limit that is not applied from another rule, also under Adam, whose update no factor gives away.

    Args:
        rows: of one run, those of other quantities too.
        steps: all steps of the run.
        optimizer: one that has made no step.
    """
    failing = {
        (row.step, row.tensor)
        for row in rows
        if row.quantity == "update" and row.verdict in FAILING and row.tensor
    }
    if not failing or not any(step.max_norm for step in steps):
        return list(rows)
    found: dict[tuple[int | None, str | None], dict[str, float | None]] = {}
    for number, step in enumerate(steps, start=1):
        before = {name: _weight(step.before, name) for name in step.true_gradient}
        deltas = optimizer.step(before, _own_gradient(step, before))
        for name in (tensor for at, tensor in failing if at == number and tensor in deltas):
            actual = _weight(step.after, name) - before[name]
            off = metrics(actual, deltas[name])
            found[number, name] = {"unclipped_scale": off.scale, "unclipped_error": off.error}
    return [
        replace(row, detail={**(row.detail or {}), **found[row.step, row.tensor]})
        if row.quantity == "update" and (row.step, row.tensor) in found
        else row
        for row in rows
    ]


def _weight(assembled: Assembled, name: str) -> Tensor:
    tensor = assembled.tensors.get(name)
    if tensor is None:
        raise ParityError(f"{name}: no weight on ranks {assembled.missing.get(name, 'at all')}")
    return tensor.double()


def _expected_deltas(
    step: OptimizerStep,
    before: Mapping[str, Tensor],
    truth: ReferenceOptimizer,
    own: ReferenceOptimizer,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Advance both reference optimizers, each on gradients clipped by their own norm."""
    true_gradient = {name: grad.double() for name, grad in step.true_gradient.items()}
    return (
        truth.step(before, _clipped(true_gradient, step.max_norm)),
        own.step(before, _clipped(_own_gradient(step, before), step.max_norm)),
    )


def _own_gradient(step: OptimizerStep, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    filled = step.own_gradient.filled
    return {
        name: filled[name].double() if name in filled else torch.zeros_like(weight)
        for name, weight in before.items()
    }


def _clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    coefficient = clip_coefficient(norm(gradients.values()), max_norm) if max_norm else 1.0
    if coefficient == 1.0:
        return gradients
    return {name: grad * coefficient for name, grad in gradients.items()}


def _is_gradient_leak(context: RowContext, step: OptimizerStep, name: str) -> Any:
    """Tell, when asked, which low dtype the step's own gradient leaked through."""

    def ask() -> str | None:
        actual, expected = step.own_gradient.tensors.get(name), step.true_gradient[name]
        if actual is None or context.dtype is not torch.float64:
            return None
        return leaked_dtype(actual, expected, metrics(actual, expected), divisors(context))

    return ask


@dataclass(frozen=True)
class _UpdateJudge:
    """Limits of `update_rows` applied to one tensor after another.

    u, v: unit round-off of weights and of gradients.
    """

    context: RowContext
    placements: Mapping[str, Placement]
    layout: Layout
    u: float
    v: float
    structural_zero: frozenset[str]
    true_norms: Mapping[str, float]
    own_norms: Mapping[str, float]

    def compare_end_to_end(
        self,
        name: str,
        weights: tuple[Tensor, Tensor],
        expected: Tensor,
        truth: ReferenceOptimizer,
        own: ReferenceOptimizer,
    ) -> _Delta:
        """Compare the delta with the one that the true gradients lead to."""
        excluded = None
        zero = name in self.structural_zero
        if not truth.linear:
            argument, terms = truth.argument[name], truth.terms[name]
            size = norm_of(terms) / math.sqrt(max(1, terms.numel()))
            excluded = argument.abs() < FACTOR * self.v * size
            if truth.spec.name != "lion" and self.exact:
                excluded |= truth.amplification(name) > AMPLIFICATION
            excluded &= (argument != 0.0) | (own.argument[name] != 0.0)
        return self._compare(
            name, weights, expected, excluded, self.true_norms, zero and truth.linear
        )

    def compare_own(
        self,
        name: str,
        weights: tuple[Tensor, Tensor],
        expected: Tensor,
        own: ReferenceOptimizer,
    ) -> _Delta:
        """Compare the delta with the one that the engine's own gradients lead to."""
        excluded = None
        if own.spec.name == "lion":
            excluded = own.argument[name].abs() < FACTOR * self.u * own.terms[name]
        return self._compare(name, weights, expected, excluded, self.own_norms, False)

    def _compare(
        self,
        name: str,
        weights: tuple[Tensor, Tensor],
        expected: Tensor,
        excluded: Tensor | None,
        norms: Mapping[str, float],
        structural_zero: bool,
    ) -> _Delta:
        family = self.placements[name].family
        delta = weights[1] - weights[0]
        if excluded is not None and bool(excluded.any()):
            excluded &= torch.isfinite(delta)
            delta = torch.where(excluded, expected, delta)
        else:
            excluded = None
        found = metrics(
            delta, expected, family_norm=norms[family], experts=family == "expert",
            structural_zero=structural_zero,
        )  # fmt: skip
        moved = 0.0 if structural_zero else norm_of(expected)
        rounded = self.u * (norm_of(weights[0]) + norm_of(weights[1]))
        floor = quotient(rounded, moved or norms[family]) or 0.0
        floors = None
        if found.idle is not None:
            sizes = [w.flatten(1).square().sum(1).sqrt() for w in (*weights, expected)]
            instead = norms[family]
            floors = self.u * (sizes[0] + sizes[1]) / sizes[2].masked_fill(found.idle, instead)
            floors = floors.nan_to_num(nan=0.0, posinf=0.0)
        return _Delta(found, floor, floors, excluded)

    @property
    def exact(self) -> bool:
        """Tell whether sign-like optimizers are judged end to end."""
        return self.context.dtype is torch.float64

    def own_failures(self, own: _Delta) -> list[str]:
        """Judge the own-gradient step at 64 u + floor."""
        return ["own gradient: " + said for said in self._beyond(own, FACTOR * self.u)]

    def end_to_end_failures(self, delta: _Delta) -> list[str]:
        """Judge the end-to-end delta at `end_to_end_limit`."""
        limit = self.end_to_end_limit(delta)
        if self.context.dtype not in SCALE_LIMIT:
            return self._beyond(delta, limit - delta.floor)
        if delta.found.error is None:
            return ["not finite"]
        off = delta.found.error if delta.found.excess is None else abs(delta.found.excess)
        return [f"|scale - 1| {off:.3g} > {limit:.3g}"] if off > limit else []

    def end_to_end_limit(self, delta: _Delta) -> float:
        """Give the limit the row prints."""
        if self.exact:
            return FACTOR * self.u + delta.floor
        return threshold(self.context.dtype) + FACTOR * self.u + delta.floor

    @staticmethod
    def _beyond(delta: _Delta, limit: float) -> list[str]:
        found = delta.found
        if found.error is None:
            return ["not finite"]
        said = []
        if found.error > limit + delta.floor:
            said.append(f"error {found.error:.3g} > {limit + delta.floor:.3g}")
        if delta.expert_floors is not None:
            said += expert_failures(found, delta.expert_floors + limit)
        return said

    def row(
        self,
        name: str,
        end_to_end: _Delta,
        own_step: _Delta,
        truth: ReferenceOptimizer,
        expected: Tensor,
        leak: Any,
    ) -> Row:
        """Build the tensor's row from both comparisons."""
        through = truth.linear or (self.exact and name not in self.structural_zero)
        judged = end_to_end if through else own_step
        own_failures = self.own_failures(own_step)
        failures = [*(self.end_to_end_failures(end_to_end) if through else ()), *own_failures]
        limit = self.end_to_end_limit(judged) if through else FACTOR * self.u + judged.floor
        leaked = leak() if failures and not own_failures else None
        verdict = verdict_of(failures, leaked)
        if verdict == "pass" and judged.floor > RESOLUTION:
            verdict, failures = "skipped", ["below resolution"]
        index = judged.found.worst_index
        return make_row(
            self.context, "update", self.placements[name].family, name, judged.found, limit,
            verdict, worst_of(index, name, self.placements, self.layout, expected),
            failures, self._detail(through, judged, end_to_end, own_step, leaked),
        )  # fmt: skip

    def _detail(
        self, through: bool, judged: _Delta, end_to_end: _Delta, own_step: _Delta, leak: str | None
    ) -> dict[str, Any]:
        excluded = judged.excluded
        found = end_to_end.found
        detail: dict[str, Any] = {
            "judged": "end_to_end" if through else "own_gradient",
            "floor": judged.floor,
            "excluded": 0 if excluded is None else int(excluded.sum()),
            "end_to_end_ratio": found.ratio,
            "end_to_end_scale": found.scale,
            "end_to_end_error": found.error,
            "own_scale": own_step.found.scale,
            "own_error": own_step.found.error,
            "own_threshold": FACTOR * self.u + own_step.floor,
        }
        if excluded is not None:
            detail["excluded_at"] = excluded.nonzero()[:8].tolist()
        if end_to_end.excluded is not None and not through:
            detail["end_to_end_excluded"] = int(end_to_end.excluded.sum())
        if leak:
            detail["leak"] = leak
        return detail
