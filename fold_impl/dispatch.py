"""Collectives a folded MoE layer runs, each as an autograd function with its exact adjoint.

Owns the factor every one of them carries. Must not know modules, parameters or the optimizer.
Easy to get wrong: lanes hold equal activations and the objective is the *mean* over lanes, so a
backward that adds lanes up must be undone by exactly one rule (`fold_impl.reduce`).

Shapes: T tokens replicated over tp, own = this lane's rows of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl.groups import Group

# torch 2.13 renamed these two and deprecates the old names, which are all that 2.9 knows.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def share_bounds(tokens: int, group: Group) -> tuple[int, int]:
    """Give the first and past-the-last token row this lane keeps.

    Rows are cut into equal chunks of ceil(T / tp); the last lanes may hold fewer or none.
    """
    chunk = -(-tokens // group.size)
    start = min(group.index * chunk, tokens)
    return start, min(start + chunk, tokens)


class _EnterRouted(torch.autograd.Function):
    """Forward identity; backward all-reduce over tp, divided by tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group.handle)
        return gradient.div_(ctx.group.size), None


def enter_routed(x_TH: Tensor, group: Group) -> Tensor:
    """Boundary of the layer's input: forward identity, backward all-reduce over tp / tp.

    Raw, lane p holds tp times the gradient of its own share (`restore` sums lanes):
        raw_p = tp * d/dx (share p),   (1/tp) sum_p raw_p = d/dx (all shares) on every lane.
    Group tp. Who must call: every lane, on the one tensor that feeds router and experts.
    """
    if group.handle is None:
        return x_TH
    out: Tensor = _EnterRouted.apply(x_TH, group)
    return out


class _Restore(torch.autograd.Function):
    """Forward all-gather over tp; backward reduce-scatter (sum) over tp."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, tokens: int, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, own.shape[0]
        chunk = -(-tokens // group.size)
        ctx.chunk = chunk
        whole = own.new_empty(chunk * group.size, own.shape[1])
        _all_gather(whole, _padded(own, chunk), group=group.handle)
        return whole[:tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        group, chunk = ctx.group, ctx.chunk
        own = gradient.new_empty(chunk, gradient.shape[1])
        _reduce_scatter(own, _padded(gradient, chunk * group.size), group=group.handle)
        return own[: ctx.rows], None, None


def restore_combined(own_TH: Tensor, tokens: int, group: Group) -> Tensor:
    """Rebuild all T rows from the lanes' shares, equal on every lane.

    Forward all-gather over tp; backward sums the lanes' output gradients and keeps the own rows.
    Under the lane-mean objective the sum is tp times the objective's gradient: factor tp on
    everything inside the share. Group tp. Who must call: every lane with its `share_bounds` rows.

    Args:
        own_TH: (own rows, H).
        tokens: T.
        group: tp.
    """
    if group.handle is None:
        return own_TH
    out: Tensor = _Restore.apply(own_TH, tokens, group)
    return out


class _ScatterShare(torch.autograd.Function):
    """Forward reduce-scatter over tp; backward all-gather over tp, divided by tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.tokens = group, x.shape[0]
        start, stop = share_bounds(x.shape[0], group)
        chunk = -(-x.shape[0] // group.size)
        own = x.new_empty(chunk, x.shape[1])
        _reduce_scatter(own, _padded(x, chunk * group.size), group=group.handle)
        return own[: stop - start]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        chunk = -(-ctx.tokens // group.size)
        whole = gradient.new_empty(chunk * group.size, gradient.shape[1])
        _all_gather(whole, _padded(gradient, chunk), group=group.handle)
        return whole[: ctx.tokens].div_(group.size), None


def scatter_share(x_TH: Tensor, group: Group) -> Tensor:
    """Add up the lanes' partial outputs of a shared expert, keeping this lane's rows of the sum.

    They join the routed rows before `restore_combined`, whose backward brings tp times the
    objective's gradient: backward all-gathers the rows over tp and divides by tp, so the shared
    expert's sharded weights see the whole gradient on every lane, also of a lane-varying consumer.
    Half the traffic of an all-reduce. Group tp. Who must call: every lane.
    """
    if group.handle is None:
        return x_TH
    out: Tensor = _ScatterShare.apply(x_TH, group)
    return out


def _padded(x: Tensor, rows: int) -> Tensor:
    x = x.contiguous()
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """All-to-all of rows without a gradient: send[i] rows to rank i, receive[i] rows from it."""
    if group.handle is None:
        return x
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group.handle)
    return out


def gather_equal(x: Tensor, group: Group) -> Tensor:
    """All-gather equal blocks along dimension 0, without a gradient."""
    if group.handle is None:
        return x
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group.handle)
    return out


class _AllToAll(torch.autograd.Function):
    """Forward all-to-all over ep; backward the all-to-all with the splits exchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        splits: tuple[Sequence[int], Sequence[int]],
        backward_splits: tuple[Sequence[int], Sequence[int]],
        group: Group,
    ) -> Tensor:
        ctx.splits, ctx.group = backward_splits, group
        return exchange(x, splits[0], splits[1], group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.splits
        return exchange(gradient, send, receive, ctx.group), None, None, None


def all_to_all(
    x: Tensor,
    splits: tuple[Sequence[int], Sequence[int]],
    group: Group,
    backward_splits: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """Send rows to the ranks that own their experts; a permutation of rows, factor 1.

    Forward splits = (send, receive), backward (receive, send). Group ep. Who must call: every rank
    of the EP group, also with no rows.
    """
    if group.handle is None:
        return x
    backward = backward_splits or (splits[1], splits[0])
    out: Tensor = _AllToAll.apply(x, splits, backward, group)
    return out


class _GatherRows(torch.autograd.Function):
    """Forward all-gather of uneven rows over etp; backward reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_rows(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_rows(gradient, ctx.sizes, ctx.group), None, None


class _ScatterRows(torch.autograd.Function):
    """Forward reduce-scatter (sum) of uneven rows over etp; backward all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _scatter_rows(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_rows(gradient, ctx.sizes, ctx.group), None, None


def gather_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Give every expert-TP rank the rows of all of them.

    Forward all-gather over etp, backward reduce-scatter (sum over the slices of the expert width,
    each of which adds its part): exact adjoint, factor 1. Who must call: every rank of the group.
    """
    if group.handle is None:
        return x
    out: Tensor = _GatherRows.apply(x, sizes, group)
    return out


def scatter_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Add up the slices' partial outputs and return to each expert-TP rank its own rows.

    Forward reduce-scatter over etp, backward all-gather: exact adjoint, factor 1.
    """
    if group.handle is None:
        return x
    out: Tensor = _ScatterRows.apply(x, sizes, group)
    return out


def _gather_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    longest = max(sizes)
    whole = x.new_empty(longest * group.size, *x.shape[1:])
    _all_gather(whole, _padded(x, longest), group=group.handle)
    blocks = whole.view(group.size, longest, *x.shape[1:])
    return torch.cat([block[:n] for block, n in zip(blocks, sizes, strict=True)])


def _scatter_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    longest = max(sizes)
    blocks = [_padded(part, longest) for part in x.split(list(sizes))]
    own = x.new_empty(longest, *x.shape[1:])
    _reduce_scatter(own, torch.cat(blocks), group=group.handle)
    return own[: sizes[group.index]]
