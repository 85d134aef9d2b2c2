"""Actual against expected tensors: metrics, thresholds, verdicts (pure tensor maths).

Owns the metrics, the limits and the rows of gradient, loss, norm, routing and replica; those of
the update are in `parity.update`, the rule of precision leaks in `parity.leak`. Must not know
processes, models or implementations. Easy to get wrong: the scale is computed as
1 + <g1 - g0, g0> / <g0, g0>, because <g1, g0> / <g0, g0> rounds away the 1e-16 that tells a leak
from a scale; and a ratio alone is never a verdict.

With u the unit round-off of the dtype and FACTOR = 64 (worst benign error measured: 12 u):

    gradient, loss, grad_norm   |g1 - g0| / |g0| <= 64 u
    bfloat16, float16           |scale - 1| <= 2e-2, 3e-3, and still |g1 - g0| / |g0| <= 64 u
    replica, routing            no entry differs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from parity.collect import Assembled, Replica, owner
from parity.errors import ParityError
from parity.implementation import Placement, Routing
from parity.layout import Layout
from parity.leak import leaked_dtype
from parity.store import Row

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
FACTOR = 64
"""Unit round-offs allowed; benign runs were measured at 12 and below."""
SCALE_LIMIT = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Allowed |scale - 1| where 64 u says too little about a factor."""
_SAFE = (1e-200, 1e200)
"""Squared norms in this range need no rescaling."""


@dataclass(frozen=True)
class RowContext:
    """What the rows of one comparison have in common.

    Attributes:
        case: case id.
        implementation: its name.
        shape: world, pp, tp, dp, ep, etp, edp.
        engine: name, zero, gas, clip, dtype, optimizer, backend, strategy.
        against: reference or baseline.
        step: counted from 1.
        dtype: dtype the gradients were computed in.
        seconds: what the case took.
    """

    case: str
    implementation: str
    shape: Mapping[str, int]
    engine: Mapping[str, Any]
    against: str
    step: int
    dtype: torch.dtype
    seconds: float | None = None


@dataclass(frozen=True)
class Metrics:
    """How actual g1 differs from expected g0 (Frobenius norms); None where meaningless.

    Attributes:
        ratio: |g1| / |g0|.
        scale: <g1, g0> / <g0, g0>.
        residual: |g1 - scale g0| / |g0|.
        error: |g1 - g0| / |g0|; over the family's norm where g0 is zero; None if not finite.
        worst_index: entry that differs most (of the worst expert), first one that is not finite,
            None where all entries are equal.
        excess: scale - 1 without cancellation.
        expert: expert with the largest own error.
        expert_errors: (E,) error of every expert by the same rules.
        idle: (E,) experts whose expected tensor is zero.
    """

    ratio: float | None
    scale: float | None
    residual: float | None
    error: float | None
    worst_index: tuple[int, ...] | None
    excess: float | None = None
    expert: int | None = None
    expert_errors: Tensor | None = field(default=None, compare=False)
    idle: Tensor | None = field(default=None, compare=False)


def metrics(
    actual: Tensor,
    expected: Tensor,
    *,
    family_norm: float | None = None,
    experts: bool = False,
    structural_zero: bool = False,
) -> Metrics:
    """Compare two tensors in float64.

    Args:
        actual: any shape and float dtype.
        expected: the same shape.
        family_norm: norm of the family's expected tensors, divisor where expected is zero.
        experts: dim 0 counts experts, each also compared on its own.
        structural_zero: expected is zero but for its own round-off.

    Raises:
        ParityError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ParityError(
            f"cannot compare shape {tuple(actual.shape)} with {tuple(expected.shape)}"
        )
    if expected.numel() == 0:
        return Metrics(None, None, None, 0.0, None)
    shape = expected.shape
    a, e = actual.detach().reshape(-1).double(), expected.detach().reshape(-1).double()
    ee, aa = float(torch.dot(e, e)), float(torch.dot(a, a))
    if not (_SAFE[0] <= ee <= _SAFE[1] and aa <= _SAFE[1]):
        a, e, divisor = _rescaled(a, e)
        if divisor is None:
            return Metrics(None, None, None, None, _first_not_finite(a, e, shape))
        family_norm = None if family_norm is None else family_norm / divisor
        ee, aa = float(torch.dot(e, e)), float(torch.dot(a, a))
    d = a - e
    dd = float(torch.dot(d, d))
    zero = structural_zero or ee == 0.0
    if not math.isfinite(dd):
        return Metrics(None, None, None, None, _argmax(d.abs(), shape))
    if zero:
        whole = Metrics(None, None, None, quotient(math.sqrt(dd), family_norm), None)
    elif dd == 0.0:
        whole = Metrics(1.0, 1.0, 0.0, 0.0, None, excess=0.0)
    else:
        excess = float(torch.dot(d, e)) / ee
        rest = torch.sub(d, e, alpha=excess)
        residual = math.sqrt(float(torch.dot(rest, rest)) / ee)
        error = math.sqrt(dd / ee)
        whole = Metrics(math.sqrt(aa / ee), 1.0 + excess, residual, error, None, excess=excess)
    return _located(whole, d, e, shape, experts, zero, family_norm)


def _located(
    whole: Metrics,
    d: Tensor,
    e: Tensor,
    shape: Sequence[int],
    experts: bool,
    zero: bool,
    family_norm: float | None,
) -> Metrics:
    """Add the worst entry and, for expert tensors, every expert's own error."""
    far, base, expert = d, 0, None
    errors = idle = None
    if experts:
        norms = e.view(shape[0], -1).square().sum(1).sqrt()
        idle = torch.ones_like(norms, dtype=torch.bool) if zero else norms == 0.0
        instead = family_norm if family_norm else 0.0
        distance = d.view(shape[0], -1).square().sum(1).sqrt()
        errors = distance / norms.masked_fill(idle, instead)
        errors = errors.masked_fill(distance == 0.0, 0.0)
        expert = int(errors.argmax())
        size = d.numel() // shape[0]
        base = expert * size
        far = d[base : base + size]
    index = None
    if whole.error != 0.0:
        index = _unravel(base + int(far.abs().argmax()), shape)
    return Metrics(
        whole.ratio, whole.scale, whole.residual, whole.error, index,
        excess=whole.excess, expert=expert, expert_errors=errors, idle=idle,
    )  # fmt: skip


def _rescaled(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor, float | None]:
    """Divide both by the power of two of e's largest entry, so that its square has a value.

    Returns:
        Both quotients and the divisor, None where an entry is not finite.
    """
    top_e, top_a = float(e.abs().max()), float(a.abs().max())
    if not (math.isfinite(top_e) and math.isfinite(top_a)):
        return a, e, None
    top = top_e or top_a
    if top == 0.0:
        return a, e, 1.0
    exponent = math.frexp(top)[1] - 1
    half = exponent // 2
    first, second = 2.0**-half, 2.0 ** (half - exponent)
    return a * first * second, e * first * second, 2.0**exponent


def _first_not_finite(a: Tensor, e: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    odd = ~torch.isfinite(a)
    odd = odd if bool(odd.any()) else ~torch.isfinite(e)
    return _unravel(int(odd.int().argmax()), shape)


def _argmax(values: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    return _unravel(int(values.argmax()), shape)


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.append(at)
    return tuple(reversed(index))


def quotient(value: float, divisor: float | None) -> float | None:
    """Divide; 0 / anything is 0, and what is not finite is None."""
    if value == 0.0:
        return 0.0
    result = value / divisor if divisor else math.inf
    return result if math.isfinite(result) else None


def norm(tensors: Iterable[Tensor]) -> float:
    """Give the Frobenius norm over all entries of all tensors, in float64."""
    return math.hypot(*(norm_of(t) for t in tensors))


def norm_of(tensor: Tensor) -> float:
    """Frobenius norm; NaN or inf where an entry is not finite."""
    flat = tensor.detach().reshape(-1).double()
    if flat.numel() == 0:
        return 0.0
    square = float(torch.dot(flat, flat))
    if _SAFE[0] <= square <= _SAFE[1]:
        return math.sqrt(square)
    top = float(flat.abs().max())
    if top == 0.0 or not math.isfinite(top):
        return top
    return top * float((flat / top).norm())


# ---------------------------------------------------------------- limits


def threshold(dtype: torch.dtype) -> float:
    """Give the limit a gradient, loss or norm row prints: on the scale for 16-bit dtypes."""
    return SCALE_LIMIT.get(dtype, FACTOR * UNIT_ROUNDOFF[dtype])


def _failures(found: Metrics, dtype: torch.dtype, extra: float = 0.0) -> list[str]:
    """Say what exceeds its limit; empty: within all of them.

    16-bit dtypes are judged on |scale - 1|; their error must still be <= 64 u (0.25 in bf16),
    since a wrong direction can have scale 1. `extra` is added to every limit.
    """
    if found.error is None:
        return ["not finite"]
    bound, limit = FACTOR * UNIT_ROUNDOFF[dtype] + extra, threshold(dtype) + extra
    said = []
    if dtype in SCALE_LIMIT:
        off = found.error if found.excess is None else abs(found.excess)
        if off > limit:
            said.append(f"|scale - 1| {off:.3g} > {limit:.3g}")
    if found.error > bound:
        said.append(f"error {found.error:.3g} > {bound:.3g}")
    if found.expert_errors is not None and found.idle is not None:
        limits = found.expert_errors.new_full((1,), bound).where(~found.idle, limit)
        said += expert_failures(found, limits)
    return said


def expert_failures(found: Metrics, limits: Tensor) -> list[str]:
    """Say which expert exceeds its own limit by most; empty: none.

    Args:
        found: metrics with errors per expert.
        limits: (E,) or (1,).
    """
    assert found.expert_errors is not None
    over = ~(found.expert_errors <= limits)
    if not bool(over.any()):
        return []
    worst = int((found.expert_errors / limits).nan_to_num(nan=math.inf).argmax())
    error, limit = float(found.expert_errors[worst]), float(limits[worst])
    return [f"expert {worst} alone: error {error:.3g} > {limit:.3g}"]


def divisors(context: RowContext) -> set[int]:
    """Give the averages a shape can take: products of its sizes, gas among them."""
    sizes = {context.shape.get(axis, 1) for axis in ("tp", "dp", "ep", "etp", "edp")}
    sizes.add(int(context.engine.get("gas", 1)))
    return {a * b * c for a in sizes | {1} for b in sizes | {1} for c in sizes | {1}}


# ---------------------------------------------------------------- gradient


def gradient_rows(
    context: RowContext,
    actual: Assembled,
    expected: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    layout: Layout,
    structural_zero: frozenset[str] = frozenset(),
) -> list[Row]:
    """Compare every full gradient with the expected one.

    One benign gradient entry is a sum of products, each rounded a few times: its error is
    (a few) u times the sum of absolute terms, measured as 12 u of the norm at worst, so 64 u
    leaves a factor 5. In float32 that is 3.8e-6: a factor 1 + 5e-6 fails.

    Args:
        context: what the rows share.
        actual: gradients rebuilt from shards.
        expected: full logical name -> gradient.
        placements: full logical name -> family and cuts.
        layout: sizes, to name the rank of the worst entry.
        structural_zero: names whose true gradient is zero but for round-off.
    """
    norms = {name: norm_of(tensor) for name, tensor in expected.items()}
    families = family_norms(norms, placements, structural_zero)
    dead = _dead_families(actual, norms, placements, structural_zero)
    rows = []
    for name in dict.fromkeys((*expected, *actual.tensors)):
        tensor, truth = actual.tensors.get(name), expected.get(name)
        family = placements[name].family
        if tensor is None or truth is None:
            rows.append(_absent_row(context, name, family, actual, truth))
            continue
        found = metrics(
            tensor, truth, family_norm=families[family], experts=family == "expert",
            structural_zero=name in structural_zero,
        )  # fmt: skip
        failures = _failures(found, context.dtype)
        leak = None
        if failures and context.dtype is torch.float64:
            leak = leaked_dtype(tensor, truth, found, divisors(context))
        if family in dead:
            failures, leak = [*failures, dead[family]], None
        rows.append(
            make_row(
                context, "gradient", family, name, found, threshold(context.dtype),
                verdict_of(failures, leak),
                worst_of(found.worst_index, name, placements, layout, truth),
                failures, _expert_detail(found, tensor, truth, failures, leak),
            )
        )  # fmt: skip
    return rows


def family_norms(
    norms: Mapping[str, float],
    placements: Mapping[str, Placement],
    structural_zero: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Give every family's norm; the whole model's where the family has none (all zero)."""
    squares: dict[str, list[float]] = {placement.family: [] for placement in placements.values()}
    for name, value in norms.items():
        squares[placements[name].family].append(0.0 if name in structural_zero else value)
    whole = math.hypot(*norms.values())
    return {family: math.hypot(*values) or whole for family, values in squares.items()}


def _dead_families(
    actual: Assembled,
    norms: Mapping[str, float],
    placements: Mapping[str, Placement],
    structural_zero: frozenset[str],
) -> dict[str, str]:
    """Family -> why it cannot pass: its gradient, actual or expected, is zero throughout.

    A family whose every tensor is a structural zero is zero by right.
    """
    members: dict[str, list[str]] = {}
    for name in norms:
        if name not in structural_zero:
            members.setdefault(placements[name].family, []).append(name)
    dead = {}
    for family, names in members.items():
        held = [actual.tensors.get(name) for name in names]
        if all(norms[name] == 0.0 for name in names):
            dead[family] = f"the expected gradient of the family {family} is all zero"
        elif not any(tensor is not None and bool(tensor.any()) for tensor in held):
            dead[family] = f"the gradient of the family {family} is all zero"
    return dead


def _absent_row(
    context: RowContext, name: str, family: str, actual: Assembled, truth: Tensor | None
) -> Row:
    """Fail a tensor without a gradient: a zero-token expert has a zero gradient, not None."""
    missing = actual.missing.get(name, ())
    if truth is None:
        why = "no gradient is expected here"
    elif missing:
        why = f"gradient is None on ranks {', '.join(map(str, missing))}"
    else:
        why = "gradient was not handed over"
    worst = {"rank": missing[0], "expert": None, "row": None} if missing else None
    nothing = Metrics(None, None, None, None, None)
    return make_row(
        context, "gradient", family, name, nothing, threshold(context.dtype), "fail", worst,
        [why], {"missing": list(missing)},
    )  # fmt: skip


def _expert_detail(
    found: Metrics, actual: Tensor, expected: Tensor, failures: Sequence[str], leak: str | None
) -> dict[str, Any] | None:
    """Give the worst expert's figures; on a failing row every expert's scale and error."""
    detail: dict[str, Any] = {"leak": leak} if leak else {}
    if found.expert_errors is not None and found.expert is not None:
        error = float(found.expert_errors[found.expert])
        detail |= {"expert": found.expert, "expert_error": error}
        if failures:
            e = expected.double().flatten(1)
            scales = (actual.double().flatten(1) * e).sum(1) / e.square().sum(1)
            detail["expert_scales"] = _finite_list(scales)
            detail["expert_errors"] = _finite_list(found.expert_errors)
    return detail or None


def _finite_list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


# ---------------------------------------------------------------- loss, norm


def loss_rows(context: RowContext, actual: float, expected: float) -> list[Row]:
    """Compare the step's loss (mean over ranks and micro-batches): |l1 - l0| / |l0| <= 64 u."""
    return [_scalar_row(context, "loss", [actual], expected)]


def grad_norm_rows(
    context: RowContext,
    actual: Sequence[float | None],
    expected: float | None,
    limit: float = 0.0,
) -> list[Row]:
    """Compare every rank's own global norm with the true one: the worst rank's error <= 64 u.

    Norms add relative errors of their tensors in quadrature, so |N1 - N0| / N0 is at most the
    largest tensor error: the gradient's bound holds. An infinite norm is no number: it fails.
    None on every rank: the engine reports no norm, and the row is skipped; on some: it fails.
    The clipping limit (0: off) stands in the row's detail, for a norm read too late is the limit.
    """
    values = [value for value in actual if value is not None]
    if not values or expected is None:
        return [
            make_row(
                context, "grad_norm", None, None, Metrics(None, None, None, None, None),
                threshold(context.dtype), "skipped", None, ["the engine reports no norm"], None,
            )
        ]  # fmt: skip
    whole = [math.inf if value is None else value for value in actual]
    row = _scalar_row(context, "grad_norm", whole, expected)
    return [replace(row, detail={**(row.detail or {}), "limit": limit})]


def _scalar_row(
    context: RowContext, quantity: str, actual: Sequence[float], expected: float
) -> Row:
    truth = torch.tensor(expected, dtype=torch.float64)
    each = [metrics(torch.tensor(value, dtype=torch.float64), truth) for value in actual]
    errors = [math.inf if found.error is None else found.error for found in each]
    rank = max(range(len(each)), key=errors.__getitem__)
    failures = _failures(each[rank], context.dtype)
    worst = {"rank": rank, "expert": None, "row": None} if len(each) > 1 and failures else None
    values = {"actual": float(actual[rank]), "expected": float(expected)}
    detail = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return make_row(
        context, quantity, None, None, each[rank], threshold(context.dtype),
        verdict_of(failures), worst, failures, detail,
    )  # fmt: skip


# ---------------------------------------------------------------- routing


def routing_rows(
    context: RowContext,
    actual: Sequence[Routing],
    expected: Sequence[Routing],
    layout: Layout,
    names: Sequence[str] | None = None,
) -> list[Row]:
    """Compare one step's integer maps exactly, one row per MoE layer.

    The order along k carries no meaning and is sorted away. Every lane is compared with the
    same expected map, so equality across lanes follows; lanes that differ are also counted.

    Args:
        context: what the rows share; its step is the one compared.
        actual: [rank][micro-batch][layer] -> (tokens, k).
        expected: [dp rank][micro-batch][layer] -> (tokens, k).
        layout: sizes, to find a rank's dp rank.
        names: tensor names of the layers; default moe.0, moe.1, ...
    """
    num_layers = len(expected[0][0])
    names = names or [f"moe.{layer}" for layer in range(num_layers)]
    rows = []
    for layer, name in enumerate(names):
        differing, lanes, worst = 0, 0, None
        largest = 0
        first_lane: dict[tuple[int, int, int], Tensor] = {}
        for rank, maps in enumerate(actual):
            at = layout.coordinate(rank)
            wanted = expected[at.dp]
            for micro in range(max(len(maps), len(wanted))):
                got = _map(maps, micro, layer)
                count, row = _differing_entries(got, _map(wanted, micro, layer))
                differing += count
                if count > largest:
                    largest, worst = count, {"rank": rank, "expert": None, "row": row}
                lane = first_lane.setdefault((at.pp, at.dp, micro), got)
                lanes += _differing_entries(got, lane)[0]
        failures = [f"{differing} entries differ"] if differing else []
        rows.append(
            make_row(
                context, "routing", "router", name,
                Metrics(None, None, None, float(differing), None), 0.0, verdict_of(failures),
                worst, failures, {"lanes_differ": lanes},
            )
        )  # fmt: skip
    return rows


def _map(maps: Routing, micro: int, layer: int) -> Tensor:
    """Sorted map of one layer; empty where the micro-batch or the layer is missing."""
    if micro >= len(maps) or layer >= len(maps[micro]):
        return torch.empty(0, 0, dtype=torch.int64)
    return maps[micro][layer].sort(dim=-1).values


def _differing_entries(actual: Tensor, expected: Tensor) -> tuple[int, int | None]:
    """Count differing entries and name the first differing row; another shape differs wholly."""
    if actual.shape != expected.shape:
        return max(actual.numel(), expected.numel(), 1), None
    if torch.equal(actual, expected):
        return 0, None
    odd = actual != expected
    return int(odd.sum()), int(odd.any(-1).int().argmax())


# ---------------------------------------------------------------- replica


def replica_rows(
    context: RowContext,
    assembled: Assembled,
    placements: Mapping[str, Placement],
    layout: Layout,
    kind: Literal["gradient", "parameter"],
) -> list[Row]:
    """Report per tensor on how many entries its replicas differ, bit for bit; threshold 0.

    On NCCL different communicators may add in different orders: replicas are then bitwise equal
    within one dp group (edp group for experts) and within 64 u across. Tensors that are None on
    every rank have no row.
    """
    rows = []
    for name, replica in assembled.replicas.items():
        if name not in assembled.filled:
            continue
        failures = _replica_failures(context, replica, placements[name], layout)
        worst = None
        if replica.index is not None and replica.ranks is not None:
            worst = _place(replica.ranks[1], replica.index, placements[name])
        detail: dict[str, Any] = {"kind": kind}
        if replica.entries:
            distance = replica.distance if math.isfinite(replica.distance) else None
            detail |= {"ranks": replica.ranks, "classes": replica.classes, "distance": distance}
        rows.append(
            make_row(
                context, "replica", placements[name].family, name,
                Metrics(None, None, None, float(replica.entries), None), 0.0,
                verdict_of(failures), worst, failures, detail,
            )
        )  # fmt: skip
    return rows


def _replica_failures(
    context: RowContext, replica: Replica, placement: Placement, layout: Layout
) -> list[str]:
    if not replica.entries:
        return []
    said = f"{replica.entries} entries differ between replicas, most between {replica.ranks}"
    if context.engine.get("backend") != "nccl":
        return [said]
    bound = FACTOR * UNIT_ROUNDOFF[context.dtype]
    if replica.distance > bound:
        return [said, f"distance {replica.distance:.3g} > {bound:.3g}"]
    label = {rank: number for number, ranks in enumerate(replica.classes) for rank in ranks}
    axis: Literal["dp", "edp"] = "edp" if placement.family == "expert" else "dp"
    for group in layout.groups(axis):
        if len({label[rank] for rank in group if rank in label}) > 1:
            return [said, f"within the {axis} group {group}"]
    return []


# ---------------------------------------------------------------- rows


def verdict_of(failures: Sequence[str], leak: str | None = None) -> str:
    """Give pass, fail or, where what fails looks like round-off of a low dtype, leak."""
    if not failures:
        return "pass"
    return "leak" if leak else "fail"


def _place(rank: int, index: Sequence[int], placement: Placement) -> dict[str, int | None]:
    """Say where an entry stands: rank, expert (dim 0 of expert tensors), row."""
    if placement.family == "expert":
        return {"rank": rank, "expert": index[0], "row": index[1] if len(index) > 1 else None}
    return {"rank": rank, "expert": None, "row": index[0] if index else None}


def worst_of(
    index: tuple[int, ...] | None,
    name: str,
    placements: Mapping[str, Placement],
    layout: Layout,
    full: Tensor,
) -> dict[str, int | None] | None:
    """Say where the worst entry of a full tensor stands; None where all entries are equal."""
    if index is None:
        return None
    placement = placements[name]
    return _place(owner(layout, placement, full.shape, index), index, placement)


def make_row(
    context: RowContext,
    quantity: str,
    family: str | None,
    tensor: str | None,
    found: Metrics,
    limit: float,
    verdict: str,
    worst: dict[str, int | None] | None,
    failures: Sequence[str],
    detail: dict[str, Any] | None,
) -> Row:
    """Make a row out of metrics, limit and verdict."""
    return Row(
        case=context.case,
        implementation=context.implementation,
        shape=dict(context.shape),
        engine=dict(context.engine),
        against=context.against,
        quantity=quantity,
        family=family,
        tensor=tensor,
        step=context.step,
        ratio=found.ratio,
        scale=found.scale,
        residual=found.residual,
        error=found.error,
        threshold=limit,
        verdict=verdict,
        causes=(),
        worst=worst,
        seconds=context.seconds,
        reason="; ".join(failures) or None,
        detail=detail,
    )
