"""What faults do to the values that pass a named point; imported inside ranks.

Owns the transformations `(value, *options, **context) -> value`. Must not know which fault uses
them, nor any implementation: a point may pass a tensor, a number, a rule or a function. Easy to
get wrong: options and the point's context share one namespace, so options are never called
`name`, `family`, `layer`, `axis` or `micro_batch`.

Every transformation takes the selection options of `_Where` and leaves other values alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_SELECTION = ("families", "pattern", "layers", "micro_batches", "lanes", "dp_ranks", "ways")


@dataclass(frozen=True)
class _Where:
    """Which passages of a point a transformation is for; an option left out selects all.

    Attributes:
        families: parameter families.
        pattern: regular expression found in the parameter's name.
        layers: MoE layers.
        micro_batches: numbers of micro-batches; negative ones count from the end.
        lanes: TP lanes, given with `tp`.
        dp_ranks: dense-DP indices, given with `tp`.
        ways: there, back.
        tp: lanes of a dp rank.
    """

    families: Sequence[str] | None = None
    pattern: str | None = None
    layers: Sequence[int] | None = None
    micro_batches: Sequence[int] | None = None
    lanes: Sequence[int] | None = None
    dp_ranks: Sequence[int] | None = None
    ways: Sequence[str] | None = None
    tp: int = 1

    def __contains__(self, context: Mapping[str, Any]) -> bool:
        micro_batch = context.get("micro_batch", 0)
        gas = context.get("gas", 0)
        rank = dist.get_rank() if dist.is_initialized() else 0
        checks = (
            self.families is None or context["family"] in self.families,
            self.pattern is None or re.search(self.pattern, context["name"]) is not None,
            self.layers is None or context["layer"] in self.layers,
            self.micro_batches is None
            or micro_batch in self.micro_batches
            or micro_batch - gas in self.micro_batches,
            self.lanes is None or rank % self.tp in self.lanes,
            self.dp_ranks is None or rank // self.tp in self.dp_ranks,
            self.ways is None or context["way"] in self.ways,
        )
        return all(checks)


def _selective(transform: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a transformation only where its selection options say."""

    @functools.wraps(transform)
    def wrapped(value: Any, **options: Any) -> Any:
        chosen = {key: options.pop(key) for key in _SELECTION if key in options}
        where = _Where(**chosen, tp=options.pop("tp", 1))
        return transform(value, **options) if options in where else value

    return wrapped


# ---------------------------------------------------------------- values


@_selective
def scaled(value: Any, *, factor: float, **_: Any) -> Any:
    """Multiply; what is None stays None."""
    return None if value is None else value * factor


@_selective
def gradient_scaled(value: Tensor, *, factor: float, **_: Any) -> Tensor:
    """Keep the value, multiply its gradient."""
    return value.detach() + factor * (value - value.detach())


def limited(value: float, *, clip: float, **_: Any) -> float:
    """Give the norm that clipping leaves; the limit is that of `parity.judge`."""
    return min(value, float(f"{clip * value:.3g}")) if clip else value


@_selective
def detached(value: Tensor, **_: Any) -> Tensor:
    """Keep the value, cut its gradient off."""
    return value.detach()


@_selective
def squared(value: Tensor, **_: Any) -> Tensor:
    """Apply a weight twice."""
    return value * value


@_selective
def flipped(value: Tensor, **_: Any) -> Tensor:
    """Reverse the last dimension."""
    return value.flip(-1)


@_selective
def rolled(value: Tensor, **_: Any) -> Tensor:
    """Shift rows by one along dimension 0."""
    return value.roll(1, 0)


@_selective
def rounded(value: Tensor, *, to: str, **_: Any) -> Tensor:
    """Send a value, and its gradient, through a lower precision."""
    return value.to(getattr(torch, to)).to(value.dtype)


@_selective
def renormalized(value: Tensor, **_: Any) -> Tensor:
    """Divide by the sum over the last dimension."""
    return value / value.sum(-1, keepdim=True)


@_selective
def zeroed(value: Tensor, *, at: int, **_: Any) -> Tensor:
    """Put zeros at one index of dimension 0."""
    if value.shape[0] == 0:
        return value
    value = value.clone()
    value[at] = 0
    return value


@_selective
def dropped(_value: Any, **_: Any) -> None:
    """Give nothing."""


@_selective
def dropped_if_zero(value: Tensor | None, **_: Any) -> Tensor | None:
    """Give nothing in place of an all-zero gradient."""
    return value if value is not None and bool(value.any()) else None


@_selective
def replaced(_value: Any, *, by: Any, **_: Any) -> Any:
    """Give another value: a flag, a scope, a coefficient."""
    return by


@_selective
def unbounded(value: float, *, norm: float, limit: float, **_: Any) -> float:
    """Scale by limit / norm also where the norm is below the limit."""
    return limit / (norm + 1e-6) if limit > 0 else value


def reversed_order(value: Sequence[Any], **_: Any) -> tuple[Any, ...]:
    """Run a sequence from its end."""
    return tuple(reversed(value))


@_selective
def shifted_experts(value: Tensor, *, experts: int, **_: Any) -> Tensor:
    """Send the rows of expert e to expert e + 1."""
    return (value + 1) % experts


@_selective
def swapped_experts(value: Tensor, *, pair: Sequence[int], **_: Any) -> Tensor:
    """Send the rows of two experts each to the other."""
    first, second = pair
    out = value.clone()
    out[value == first], out[value == second] = second, first
    return out


@_selective
def truncated_share(
    value: tuple[int, int], *, lanes_of_group: int, tokens: int, **_: Any
) -> tuple[int, int]:
    """Lose the last row of every share where tokens do not divide by the lanes."""
    start, stop = value
    return (start, max(start, stop - 1)) if tokens % lanes_of_group else value


@_selective
def first_micro_batch_ends(_value: bool, *, micro_batch: int, **_: Any) -> bool:
    """End a step with its first micro-batch: the boundary counts from 0 where it should from 1."""
    return micro_batch == 0


@_selective
def local_mean_loss(value: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Take the mean over the tokens of this rank and micro-batch."""
    return {**value, "loss_scale": 1.0 / value["labels"].numel()}


@_selective
def swapped_members(
    value: Tensor, *, patterns: Sequence[str], members: Sequence[Any], **_: Any
) -> Tensor:
    """Unpack a flat bucket with two neighbouring parameters' names exchanged."""
    parts = list(value.split([m.parameter.numel() for m in members]))
    for i in range(len(members) - 1):
        pair = members[i].name, members[i + 1].name
        if all(re.search(p, n) for p, n in zip(patterns, pair, strict=True)):
            parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return torch.cat(parts)


class Stale:
    """Give the value that passed before (the first one: itself), by layer or parameter."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def __call__(self, value: Any, **context: Any) -> Any:
        """Give what passed before and keep what passes now."""
        key = context.get("layer"), context.get("name")
        before = self._kept.get(key, value)
        self._kept[key] = value.clone() if isinstance(value, Tensor) else value
        return before


class Leftover:
    """Add the value that passed before to the one that passes now, by parameter."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def __call__(self, value: Tensor, **context: Any) -> Tensor:
        """Give the running sum and keep it."""
        total = value + self._kept.get(context["name"], 0.0)
        self._kept[context["name"]] = total.clone()
        return total


# ---------------------------------------------------------------- rules and tables


@dataclass(frozen=True)
class RuleOver:
    """A reduction rule that sums over an axis and divides by a number."""

    over: str
    by: int

    def axis(self) -> str:
        """Name the group axis the gradient is summed over."""
        return self.over

    def divisor(self, _: Any) -> int:
        """Give the number the sum is divided by."""
        return self.by


@_selective
def other_rule(value: Any, *, rule: str, only: str | None = None, **_: Any) -> Any:
    """Take another of the implementation's own rules (of parameters whose rule is `only`)."""
    return type(value)[rule] if only in (None, value.name) else value


@_selective
def rule_over(value: Any, *, over: str, divisor: int, only: str | None = None, **_: Any) -> Any:
    """Take a rule that sums over an axis and divides by a number."""
    return RuleOver(over, int(divisor)) if only in (None, value.name) else value


@_selective
def reordered_table(
    value: Sequence[Sequence[int]], *, of: str, axis: str, **_: Any
) -> Sequence[Sequence[int]]:
    """Count the ranks of every group of one axis from the last."""
    return tuple(tuple(reversed(g)) for g in value) if axis == of else value


@_selective
def strided_table(
    value: Sequence[Sequence[int]], *, of: str, axis: str, **_: Any
) -> Sequence[Sequence[int]]:
    """Lay the groups of one axis out as strides where they are blocks: the lane comes slowest."""
    if axis != of:
        return value
    ranks = sorted(rank for group in value for rank in group)
    return tuple(tuple(ranks[i :: len(value)]) for i in range(len(value)))


# ---------------------------------------------------------------- functions at their points


class _Summed(torch.autograd.Function):
    """Forward identity; backward all-reduce (sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group.handle)
        return gradient, None


@_selective
def enters_raw(_function: Any, **_: Any) -> Callable[[Tensor, Any], Tensor]:
    """Hand a tensor to lanes with no collective in backward."""
    return lambda x, _group: x


@_selective
def enters_summed(_function: Any, **_: Any) -> Callable[[Tensor, Any], Tensor]:
    """Sum lanes in backward: Megatron's f where the mean is due."""
    return lambda x, group: x if group.handle is None else _Summed.apply(x, group)


@_selective
def leaves_summed(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """Sum lanes in forward *and* backward, as `torch.distributed.nn.all_reduce` does."""

    def leave(x: Tensor, group: Any) -> Tensor:
        out = function(x, group)
        return out if group.handle is None else _Summed.apply(out, group)

    return leave


class _OwnRows(torch.autograd.Function):
    """Forward as given; backward keeps this lane's rows of its own gradient, times a factor."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, function: Any, tokens: int, group: Any, factor: float
    ) -> Tensor:
        ctx.bounds = group.index * -(-tokens // group.size), own.shape[0]
        ctx.factor = factor
        out: Tensor = function(own, tokens, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        start, rows = ctx.bounds
        return gradient[start : start + rows] * ctx.factor, None, None, None, None


@_selective
def restores_own_rows(
    function: Callable[..., Tensor], *, times_lanes: bool, **_: Any
) -> Callable[..., Tensor]:
    """Keep only the own lane's gradient in the restore's backward, times tp or not."""

    def restore(own: Tensor, tokens: int, group: Any) -> Tensor:
        if group.handle is None:
            return function(own, tokens, group)
        factor = group.size if times_lanes else 1.0
        out: Tensor = _OwnRows.apply(own, function, tokens, group, factor)
        return out

    return restore


class _ForwardSplits(torch.autograd.Function):
    """Forward all-to-all; backward runs it again with the splits not exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, splits: Any, group: Any) -> Tensor:
        ctx.function, ctx.splits, ctx.group, ctx.rows = function, splits, group, x.shape[0]
        out: Tensor = function(x, splits, group, splits)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        send, _ = ctx.splits
        fitting = _resized(gradient, sum(send))
        back = ctx.function(fitting, ctx.splits, ctx.group, ctx.splits)
        return _resized(back, ctx.rows), None, None, None


def _resized(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x[:rows], x.new_zeros(max(0, rows - x.shape[0]), *x.shape[1:])])


@_selective
def adjoint_with_forward_splits(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """Send gradients the way the rows went: buffers of fitting size, rows of other tokens."""

    def exchange(x: Tensor, splits: Any, group: Any, backward: Any = None) -> Tensor:
        if group.handle is None:
            return function(x, splits, group, backward)
        out: Tensor = _ForwardSplits.apply(x, function, splits, group)
        return out

    return exchange


@_selective
def own_rows_unreduced(_function: Any, **_: Any) -> Callable[..., Tensor]:
    """Keep the own rows of a partial output and add nothing to them."""

    def scatter(x: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
        return x if group.handle is None else x.split(list(sizes))[group.index]

    return scatter


@_selective
def no_collective(_function: Any, **_: Any) -> Callable[..., None]:
    """Leave every rank with its own value."""
    return lambda *_args, **_kwargs: None


# ---------------------------------------------------------------- the optimizer


@_selective
def without_state(optimizer: torch.optim.Optimizer, **_: Any) -> torch.optim.Optimizer:
    """Forget momentum and step count before every update."""
    optimizer.state.clear()
    return optimizer


@_selective
def with_swapped_state(optimizer: torch.optim.Optimizer, **_: Any) -> torch.optim.Optimizer:
    """Key the state of every two neighbouring parameters of one shape the wrong way round."""
    held = [p for g in optimizer.param_groups for p in g["params"] if p in optimizer.state]
    pairs = zip(held[::2], held[1::2], strict=False)
    for one, other in ((a, b) for a, b in pairs if a.shape == b.shape):
        state = optimizer.state
        state[one], state[other] = state[other], state[one]
    return optimizer


@_selective
def with_options(
    optimizer: torch.optim.Optimizer, *, options: Mapping[str, Any], **_: Any
) -> torch.optim.Optimizer:
    """Update with other options in every parameter group."""
    for group in optimizer.param_groups:
        group.update(options)
    return optimizer
