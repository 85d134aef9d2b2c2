"""Token rows to assignment rows and back, as gathers in both directions.

Owns the local permutations around the experts. Must not know ranks. Easy to get wrong: autograd's
own backward of an index is a scatter-add with atomics - slow in bfloat16 and another sum every
run - where the inverse permutation is known and a gather does it exactly.

Shapes: T tokens, K top_k, H hidden, N = T * K assignments. `order` (N,): assignment at each place
when sorted by expert; `slot` (N,): its inverse, the place of each assignment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse(order: Tensor) -> Tensor:
    """Invert a permutation (N,)."""
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.numel(), device=order.device)
    return slot


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return gradient.index_select(0, slot), None, None


def permute(x_NH: Tensor, order: Tensor, slot: Tensor) -> Tensor:
    """Reorder rows: place i takes row order[i]; backward reorders by the inverse `slot`."""
    out: Tensor = _Permute.apply(x_NH, order, slot)
    return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, slot: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        by_token = gradient.index_select(0, slot).view(-1, ctx.top_k, gradient.shape[1])
        return by_token.sum(1), None, None, None


def spread(x_TH: Tensor, order: Tensor, slot: Tensor, top_k: int) -> Tensor:
    """Copy each token's row once per assignment, in expert order: (T, H) -> (N, H)."""
    out: Tensor = _Spread.apply(x_TH, order, slot, top_k)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, slot)
        tokens, top_k = weights.shape
        by_token = rows.index_select(0, slot).view(tokens, top_k, rows.shape[1])
        return torch.bmm(weights.unsqueeze(1), by_token).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, slot = ctx.saved_tensors
        tokens, top_k = weights.shape
        spread_rows = gradient.index_select(0, order // top_k)
        to_rows = spread_rows * weights.flatten().index_select(0, order).unsqueeze(1)
        by_token = rows.index_select(0, slot).view(tokens, top_k, rows.shape[1])
        to_weights = torch.bmm(by_token, gradient.unsqueeze(2)).squeeze(2)
        return to_rows, to_weights, None, None


def combine(rows_NH: Tensor, weights_TK: Tensor, order: Tensor, slot: Tensor) -> Tensor:
    """Add up each token's rows with its routing weights: (N, H), (T, K) -> (T, H)."""
    out: Tensor = _Combine.apply(rows_NH, weights_TK, order, slot)
    return out
