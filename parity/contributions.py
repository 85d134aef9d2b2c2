"""What failing gradients are made of: shares of (dp rank, micro-batch), experts, token rows.

Owns the tensor work of a diagnosis; its results stand in the `detail` of failing rows, where
`parity.explain` reads them. Must not know causes. Easy to get wrong: a regression says something
only where it leaves no residual, so coefficients without an exact fit are never handed over.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parity import batches, hypotheses, models, reference
from parity.case import Case
from parity.collect import Assembled
from parity.compare import UNIT_ROUNDOFF
from parity.implementation import Placement
from parity.store import Row

MAX_SHARES = 64
"""Most (dp rank, micro-batch) pairs a regression is run for: each costs a backward, and one more
for every auxiliary loss in both scopes."""
STRUCTURE_U = 1e4
"""Residual, in unit round-offs, from which on more than a factor is wrong."""
SAME_LOSS_U = 256
"""Two losses this many round-offs apart are the same loss."""
_RANK_CUT = 1e-10
"""Singular values below this part of the largest are round-off (float64)."""


def is_structural(row: Row) -> bool:
    """Tell whether a failing gradient row is off by more than one factor."""
    unit = UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]
    return row.residual is not None and row.residual > STRUCTURE_U * unit


@dataclasses.dataclass(frozen=True)
class StepTensors:
    """One step of a run: weights before it, its gradients, and the reference at those weights."""

    before: Assembled
    gradients: Assembled
    truth: reference.Evaluation


def annotate(
    rows: Sequence[Row],
    case: Case,
    model: nn.Module,
    steps: Sequence[StepTensors],
    placements: Mapping[str, Placement],
    seed: int,
    initial: Mapping[str, Tensor],
) -> list[Row]:
    """Add to the failing rows of one run what their gradients are made of.

    Costs nothing where all rows pass; else a few backwards per (dp rank, micro-batch).

    Args:
        rows: rows of one run against the reference.
        case: the case.
        model: structure of the model.
        steps: what each step was judged on.
        placements: full logical name -> family and cuts.
        seed: what the batches were drawn from.
        initial: full weights the implementation was given.
    """
    bad = [r for r in rows if r.verdict == "fail" and r.quantity == "gradient"]
    details: dict[int, dict[str, Any]] = {}
    if bad:
        number = min(r.step or 1 for r in bad)
        bad = [r for r in bad if r.step == number]
        step, truth = steps[number - 1], steps[number - 1].truth.gradients
        actual = step.gradients.filled
        previous = steps[number - 2].gradients.filled if number > 1 else {}
        held = {name: t.double() for name, t in step.before.filled.items()}
        given = initial if number == 1 else held
        details = _experts(bad, actual, truth)
        _merge(details, _moved_experts(bad, held, given))
        _merge(details, _swapped(bad, actual, truth))
        _merge(details, _zeroed(bad, actual, truth))
        structural = representatives([r for r in bad if is_structural(r)], truth)
        about = _Regression(case, model, given, seed, number, previous, step.truth.routing)
        _merge(details, about.details(structural, actual))
        _merge(details, about.paths(rows, actual))
    for row in rows:
        if row.quantity == "loss" and row.verdict == "fail" and case.model.name == "tiny":
            number = row.step or 1
            held = {n: t.double() for n, t in steps[number - 1].before.filled.items()}
            given = initial if number == 1 else held
            _merge(details, _altered_losses(row, case, model, given, held, seed))
        if row.quantity == "grad_norm" and row.verdict == "fail" and row.step is not None:
            parts = _norm_parts(steps[row.step - 1].truth.gradients, placements)
            details.setdefault(id(row), {})["parts"] = parts
    return [
        dataclasses.replace(r, detail={**(r.detail or {}), **details[id(r)]})
        if id(r) in details
        else r
        for r in rows
    ]


def _merge(into: dict[int, dict[str, Any]], more: Mapping[int, dict[str, Any]]) -> None:
    for key, found in more.items():
        into.setdefault(key, {}).update(found)


def _altered_losses(
    row: Row,
    case: Case,
    model: nn.Module,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    seed: int,
) -> dict[int, dict[str, Any]]:
    """Say which altered forwards have exactly the loss that a run had; none: an empty list."""
    actual = (row.detail or {}).get("actual")
    dp = row.shape["dp"]
    if actual is None or dp * case.engine.gas > MAX_SHARES:
        return {}
    unit = UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]
    drawn = batches.make(case, dp, row.step or 1, seed)
    tolerance = min(SAME_LOSS_U * unit, 0.1 * (row.error or 0.0))
    tp = row.shape["tp"]
    found = hypotheses.matching(case, model, given, drawn, tp, actual, tolerance)
    if any(not torch.equal(held[name], tensor) for name, tensor in given.items() if name in held):
        loss = reference.loss(case, model, {**given, **held}, drawn)
        found += ["weights-moved"] if abs(loss - actual) <= tolerance * abs(actual) else []
    return {id(row): {"loss_of": found}}


def _structural(
    bad: Sequence[Row], actual: Mapping[str, Tensor]
) -> Iterator[tuple[Row, str, float]]:
    """Give the rows that are off by more than a factor: row, tensor, unit round-off."""
    for row in bad:
        if str(row.tensor) in actual and is_structural(row):
            yield row, str(row.tensor), UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]


def _swapped(
    bad: Sequence[Row], actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """Say which other tensor's gradient stands in a tensor's place."""
    found = {}
    for row, name, unit in _structural(bad, actual):
        others = [n for n in truth if n != name and truth[n].shape == truth[name].shape]
        held = torch.stack([actual[name].double()])
        for other in others:
            if match_experts(held, truth[other].unsqueeze(0), STRUCTURE_U * unit) == [0]:
                found[id(row)] = {"tensor_from": other}
    return found


def _zeroed(
    bad: Sequence[Row], actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """Count the elements that are zero and must not be, where all others are right.

    Not whole tensors or whole experts: what loses those loses more than elements.
    """
    found = {}
    for row, name, unit in _structural(bad, actual):
        held, true = actual[name].double(), truth[name]
        lost = (held == 0.0) & (true != 0.0)
        parts = (held, true) if row.family == "expert" else (held[None], true[None])
        gone = [not a.any() and bool(b.any()) for a, b in zip(*parts, strict=True)]
        rest = float((held - true).masked_fill(lost, 0.0).norm())
        if lost.any() and not any(gone) and rest <= STRUCTURE_U * unit * float(true.norm()):
            found[id(row)] = {"zeroed": int(lost.sum())}
    return found


def representatives(rows: Sequence[Row], truth: Mapping[str, Tensor]) -> list[Row]:
    """Choose one failing tensor per family: the last one, nearest to the loss; weights first."""
    chosen: dict[str, Row] = {}
    for row in rows:
        family, name = str(row.family), str(row.tensor)
        held = chosen.get(family)
        if held is None or truth[name].dim() >= truth[str(held.tensor)].dim():
            chosen[family] = row
    return list(chosen.values())


def _norm_parts(
    truth: Mapping[str, Tensor], placements: Mapping[str, Placement]
) -> dict[str, float]:
    """Give the squared norms of what is replicated, cut over tp, and of the routed experts."""
    parts = {"replicated": 0.0, "sharded": 0.0, "expert": 0.0}
    for name, gradient in truth.items():
        placement = placements[name]
        kind = "sharded" if any(s.axis == "tp" for s in placement.shards) else "replicated"
        kind = "expert" if placement.family == "expert" else kind
        parts[kind] += float(gradient.square().sum())
    return parts


# --- shares of ranks and micro-batches -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Regression:
    """g1 = sum of c (share of rank r, micro-batch m): least squares, handed over where exact."""

    case: Case
    model: nn.Module
    weights: Mapping[str, Tensor]
    seed: int
    step: int
    previous: Mapping[str, Tensor]
    routing: Sequence[Sequence[Sequence[Tensor]]]

    def details(
        self, rows: Sequence[Row], actual: Mapping[str, Tensor]
    ) -> dict[int, dict[str, Any]]:
        """Regress the tensors of some rows; row id -> what was found."""
        dp = rows[0].shape["dp"] if rows else 1
        if not rows or dp * self.case.engine.gas > MAX_SHARES:
            return {}
        drawn = batches.make(self.case, dp, self.step, self.seed)
        names = [str(row.tensor) for row in rows]
        split = reference.shares(self.case, self.model, self.weights, drawn, names, self.routing)
        found = {}
        for row in rows:
            if str(row.tensor) not in actual:
                continue
            result = self._of(row, actual[str(row.tensor)].double(), split)
            if result:
                found[id(row)] = result
        return found

    def paths(self, rows: Sequence[Row], actual: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
        """Split the gradient of the norm before the last MoE layer over the paths behind it.

        Only where that norm fails by more than a factor, and the layer's router does not.
        """
        names = models.moe_names(self.case.model)
        layer = names[-1].rpartition(".")[0]
        mine = [
            r for r in rows
            if r.quantity == "gradient" and r.step == self.step
            and str(r.tensor).startswith(f"{layer}.")
        ]  # fmt: skip
        norms = [r for r in mine if r.family == "layernorm" and str(r.tensor).endswith("weight")]
        routed = [r for r in mine if r.family in ("router", "expert")]
        if self.case.model.name != "tiny" or not norms or not is_structural(norms[-1]):
            return {}
        if any(r.verdict == "fail" for r in routed) or norms[-1].verdict != "fail":
            return {}
        row, dp = norms[-1], norms[-1].shape["dp"]
        drawn = batches.make(self.case, dp, self.step, self.seed)
        name = str(row.tensor)
        columns = hypotheses.paths(self.case, self.model, self.weights, drawn, name)
        unit = UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]
        fit = solve(actual[name].double(), list(columns.values()), unit)
        return {} if fit is None else {id(row): {"paths": dict(zip(columns, fit, strict=True))}}

    def _of(self, row: Row, actual: Tensor, split: reference.Shares) -> dict[str, Any]:
        name = str(row.tensor)
        unit = UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]
        scope = self.case.auxiliary.scope
        own = [added for (of, _), added in split.auxiliary.items() if of == scope]
        main = [[part[name] for part in parts] for parts in split.main]
        whole = main
        for added in own:
            whole = [
                [a + b[name] for a, b in zip(x, y, strict=True)]
                for x, y in zip(whole, added, strict=True)
            ]
        fit = solve(actual, [t for parts in whole for t in parts], unit)
        if fit is not None:
            gas = len(main[0])
            table = [fit[i * gas : (i + 1) * gas] for i in range(len(main))]
            return {"shares": table, "tokens": split.tokens}
        if own and (found := self._auxiliary(name, actual, main, split, unit)):
            return found
        if own and row.family == "router" and actual.dim() == 2:
            counts = self._auxiliary_counts(name, actual, main, unit)
            if counts:
                return counts
        if name in self.previous:
            columns = [sum(t for parts in whole for t in parts), self.previous[name].double()]
            fit = solve(actual, columns, unit)  # type: ignore[arg-type]
            if fit is not None:
                return {"now_and_previous": fit}
        return {}

    def _auxiliary(
        self, name: str, actual: Tensor, main: list[list[Tensor]], split: reference.Shares,
        unit: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Fit the main loss as a whole and the auxiliary losses: all, each, or in both scopes."""
        scope = self.case.auxiliary.scope
        each = split.of_losses(name, scope)
        others = split.of_losses(name, "rank" if scope == "global" else "global")
        whole = torch.stack([t for parts in main for t in parts]).sum(0)
        mine, other = (torch.stack([*found.values()]).sum(0) for found in (each, others))
        if (fit := solve(actual, [whole, mine], unit)) is not None:
            return {"main_and_auxiliary": fit}
        fit = solve(actual, [whole, *each.values()], unit) if len(each) > 1 else None
        if fit is not None:
            return {"main_and_each": dict(zip(("main", *each), fit, strict=True))}
        if (fit := solve(actual, [whole, mine, other], unit)) is not None:
            return {"main_and_auxiliary": fit}
        return {}

    def _auxiliary_counts(
        self, name: str, actual: Tensor, main: list[list[Tensor]], unit: float
    ) -> dict[str, Any]:
        """Fit an auxiliary loss with any load: columns d/dW sum_t P_te and d/dW z of each share."""
        drawn = batches.make(self.case, len(main), self.step, self.seed)
        inputs = hypotheses.router_inputs(self.model, self.weights, drawn, name)
        columns = [torch.stack([t for parts in main for t in parts]).sum(0)]
        for x_TH in inputs:
            columns += _load_columns(x_TH, self.weights, name, self.case)
        fit = solve(actual, columns, unit)
        if fit is None or abs(fit[0] - 1.0) > 1e-6:
            return {}
        return {"auxiliary_counts": True}


def _load_columns(
    x_TH: Tensor, weights: Mapping[str, Tensor], name: str, case: Case
) -> list[Tensor]:
    """Differentiate each expert's summed probability, and the z-loss, by a router's weight.

    The last expert is left out: probabilities add up to one, so its column is the others' sum.
    """
    weight = weights[name].detach().double().requires_grad_()
    bias = weights.get(f"{name.removesuffix('weight')}bias")
    logits_TE = torch.nn.functional.linear(x_TH, weight, bias)
    probability_TE = models.scores(logits_TE, case.model.score)
    probability_TE = probability_TE / probability_TE.sum(-1, keepdim=True)
    parts = list(probability_TE.sum(0)[:-1]) if case.auxiliary.load_balance else []
    parts += [logits_TE.logsumexp(-1).square().sum()] if case.auxiliary.z_loss else []
    return [torch.autograd.grad(part, weight, retain_graph=True)[0] for part in parts]


def solve(actual: Tensor, columns: Sequence[Tensor], unit: float) -> list[float] | None:
    """Solve actual = sum of c columns; None where it leaves a residual or is not determined.

    A column of zeros takes the coefficient 1: whatever it is, nothing shows.
    """
    norms = [float(column.norm()) for column in columns]
    used = [i for i, size in enumerate(norms) if size > 1e-12 * max(norms)] if any(norms) else []
    if not used or 2 * len(used) > actual.numel():
        return None
    matrix = torch.stack([columns[i].flatten() / norms[i] for i in used], dim=1)
    q, r = torch.linalg.qr(matrix)
    if float(r.diagonal().abs().min()) < 1e-6:
        return None
    projected = q.T @ actual.flatten()
    rest = float((actual.flatten() - q @ projected).norm())
    if rest > STRUCTURE_U * unit * max(float(actual.norm()), max(norms)):
        return None
    solved = torch.linalg.solve_triangular(r, projected.unsqueeze(1), upper=True).squeeze(1)
    found = [1.0] * len(columns)
    for place, index in enumerate(used):
        found[index] = float(solved[place]) / norms[index]
    return found


# --- experts -------------------------------------------------------------------------------------


def _experts(
    bad: Sequence[Row], actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """Say which expert's gradient, or whose tokens, stand in each expert's place."""
    rows = [r for r in bad if r.family == "expert" and r.tensor in actual and is_structural(r)]
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        g1, g0 = actual[str(row.tensor)].double(), truth[str(row.tensor)].double()
        unit = UNIT_ROUNDOFF[getattr(torch, row.engine["dtype"])]
        match = match_experts(g1, g0, STRUCTURE_U * unit)
        if any(source is not None and source != e for e, source in enumerate(match)):
            found[id(row)] = {"experts_from": match}
    if (placed := _token_rows(rows, actual, truth)) is not None:
        row, spans = placed
        found.setdefault(id(row), {})["token_rows"] = spans
    return found


def _token_rows(
    rows: Sequence[Row], actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> tuple[Row, dict[str, Any]] | None:
    """Compare whose tokens reached the experts, in the first layer where they are others.

    A layer's input is right while the layers before it are; where they are not for sure, a later
    layer counts only if every foreign row is known to be another expert's.
    """
    firsts: dict[str, Row] = {}
    for row in rows:
        if truth[str(row.tensor)].dim() == 3 and row.engine["dtype"] == "float64":
            firsts.setdefault(str(row.tensor).rpartition(".")[0], row)
    clean = None
    for row in firsts.values():
        name = str(row.tensor)
        spans = compare_rows(actual[name].double(), truth[name].double())
        if spans is None:
            break
        if spans["lost"] or spans["foreign"]:
            known = all(source is not None and source >= 0 for source in spans["from"].values())
            return (row, spans) if clean is None or known else clean
        clean = clean or (row, spans)
    return clean


def _moved_experts(
    bad: Sequence[Row], given: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """Say which expert's initial weights stand in each expert's place, where they were moved."""
    found = {}
    for row in bad:
        name = str(row.tensor)
        if row.family == "expert" and name in given and not torch.equal(given[name], initial[name]):
            match = match_experts(given[name], initial[name].double(), 1e-6)
            if any(source is not None and source != e for e, source in enumerate(match)):
                found[id(row)] = {"experts_from": match}
    return found


def match_experts(actual_E: Tensor, expected_E: Tensor, tolerance: float) -> list[int | None]:
    """Find for each expert the one whose expected tensor it holds, up to a positive factor.

    Args:
        actual_E: (E, ...).
        expected_E: (E, ...).
        tolerance: largest residual over the norm.

    Returns:
        Per expert the index, itself where both are zero, None where none fits.
    """
    a, e = actual_E.flatten(1), expected_E.flatten(1)
    norms_a, norms_e = a.norm(dim=1), e.norm(dim=1)
    cosine = (a @ e.T) / (norms_a[:, None] * norms_e[None, :])
    found: list[int | None] = []
    for index in range(len(a)):
        if float(norms_a[index]) == 0.0:
            found.append(index if float(norms_e[index]) == 0.0 else None)
            continue
        best = int(cosine[index].nan_to_num(nan=-2.0).argmax())
        scale = float(a[index] @ e[best] / e[best].square().sum())
        rest = float((a[index] - scale * e[best]).norm() / norms_a[index])
        found.append(best if math.isfinite(rest) and rest <= tolerance else None)
    return found


def compare_rows(actual_EFH: Tensor, expected_EFH: Tensor) -> dict[str, Any] | None:
    """Compare whose tokens reached the experts, by the spans of their weight gradients.

    A gradient D^T X of F x H, D (n, F), X (n, H), has its rows in the span of the n tokens, as
    long as n < F and n < H: a lost token leaves the span one smaller, another's makes it larger.

    Returns:
        lost: dimensions missing over all experts. foreign: dimensions too many. from: per expert
        that has foreign ones, the expert whose tokens they are, -1 where nobody's, None where they
        are several experts' or cannot be told. moved: experts
        with foreign tokens only. None where spans are full and say nothing.
    """
    spans = [(_span(a), _span(e)) for a, e in zip(actual_EFH, expected_EFH, strict=True)]
    full = min(expected_EFH.shape[1:])
    if any(expected.shape[0] >= full or actual.shape[0] >= full for actual, expected in spans):
        return None
    lost = foreign = 0
    sources: dict[str, int | None] = {}
    moved: list[int] = []
    for index, (actual, expected) in enumerate(spans):
        extra = _span(actual - actual @ expected.T @ expected, 1e-6)
        missing = _span(expected - expected @ actual.T @ actual, 1e-6)
        lost, foreign = lost + missing.shape[0], foreign + extra.shape[0]
        if extra.shape[0] and missing.shape[0] == expected.shape[0]:
            moved.append(index)
        if extra.shape[0]:
            sources[str(index)] = _source(extra, index, [e for _, e in spans], expected)
    return {"lost": lost, "foreign": foreign, "from": sources, "moved": moved}


def _source(extra: Tensor, index: int, spans: Sequence[Tensor], own: Tensor) -> int | None:
    """Name the expert whose tokens, with the own ones, span the foreign part; -1: nobody."""
    for other, span in enumerate(spans):
        if other != index and span.shape[0] and _holds(torch.cat([own, span]), extra):
            return other
    every = torch.cat(list(spans))
    if _span(every).shape[0] == every.shape[1]:
        return None  # the layer has seen more tokens than there are dimensions
    return None if _holds(every, extra) else -1


def _holds(rows: Tensor, extra: Tensor) -> bool:
    """Tell whether a space other than the whole one holds some unit vectors."""
    basis = _span(rows)
    rest = float((extra - extra @ basis.T @ basis).norm())
    return basis.shape[0] < rows.shape[1] and rest < 1e-6 * math.sqrt(extra.shape[0])


def _span(rows: Tensor, cut: float = _RANK_CUT) -> Tensor:
    """Give an orthonormal basis of the row space: (rank, H); absolute cut for unit rows."""
    if rows.numel() == 0 or not bool(rows.any()):
        return rows.new_zeros(0, rows.shape[-1])
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    least = cut if cut == 1e-6 else cut * float(s[0])
    basis: Tensor = vh[s > least]
    return basis
