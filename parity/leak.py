"""Is a difference of float64 tensors the round-off of a lower precision, and of which one.

Owns the rule behind the verdict `leak`. Must not know rows or thresholds of other dtypes. Easy to
get wrong: a coefficient 1e-3 off, a lost row or a slightly wrong direction must never pass as
round-off, and true round-off on a short tensor has a scale that is not 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from parity.compare import Metrics

LEAK_LIMIT = 1e-2
"""Largest error that may be called a leak."""
ROUNDINGS = 64.0
"""Most round-offs of the low dtype an error may have, as in every other threshold."""
_LEAKS = {
    "float32": (2.0**-24, 2.0**-28),
    "bfloat16": (2.0**-8, 2.0**-10),
    "float16": (2.0**-11, 2.0**-15),
}
"""Low dtype -> unit round-off and smallest error; one rounding has an error of 0.4 round-offs."""
_GRID_BITS = 40
"""Sums of a few dozen float32 numbers stay on a grid of 40 bits; float64 results have 53."""


def leaked_dtype(
    actual: Tensor, expected: Tensor, found: Metrics, divisors: Iterable[int] = (1,)
) -> str | None:
    """Name the low dtype whose round-off the difference of two float64 tensors looks like.

    With d = g1 - g0, all of these must hold, for one low unit round-off v:

    1. error <= 1e-2 and v/16 <= error <= 64 v: a few roundings, or one among many shares (below
       bfloat16's v/4 it is taken for float16; the name is a hint).
    2. |scale - 1| < error * max(1/10, min(4/5, 4/sqrt(n))), n = (sum g0^2)^2 / sum g0^4. For
       d_i = eps_i g_i with independent eps, (scale - 1) / error has mean 0 and deviation
       1/sqrt(n): on a norm weight of 48 entries true round-off exceeds 1/10 every other time.
       A pure scale error has |scale - 1| = error and fails at every n.
    3. Local: |d_ij| <= c v max(|g0_ij|, s_ij) on every entry, s_ij the size a rank-one variance
       model gives it (rms of row * rms of column / rms of all); c = 1024 for float32, 64 for
       16 bits, so that c v < 1 and a lost row (d = -g0) never passes.
    4. Spread: no entry holds 0.7 of |d|^2, and no row where at least 8 rows have a gradient; or
       the same of z = |d| / max(|g0|, s), since few large entries take most of honest rounding.
    5. For 16 bits, where an honest error of 1e-3 (a coefficient slightly off) would pass 1-4:
       99 of 100 entries of k g1 have at most 40 significant bits for some k of `divisors` (what
       a low-precision reduction leaves behind, k undoing an average), or |d| <= 4 v |g0| there.

    Returns:
        float32, float16, bfloat16 or None.
    """
    if found.error is None or found.excess is None or not 0.0 < found.error <= LEAK_LIMIT:
        return None
    a, e = actual.detach().double(), expected.detach().double()
    if abs(found.excess) >= found.error * _alignment(e):
        return None
    a, e = (t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, -1) for t in (a, e))
    d = (a - e).abs()
    z = torch.where(d == 0.0, 0.0, d / torch.maximum(e.abs(), _rank_one(e)))
    if not (_is_spread(z, e) or _is_spread(d, e)):
        return None
    for name, (unit, smallest) in _LEAKS.items():
        largest = (1024 if name == "float32" else 64) * unit
        if not smallest <= found.error <= ROUNDINGS * unit or not bool((z <= largest).all()):
            continue
        if name == "float32" or _is_rounded(a, e, d, unit, divisors):
            return name
    return None


def _alignment(e: Tensor) -> float:
    scaled = e / e.abs().max()
    count = float(scaled.square().sum() ** 2 / scaled.pow(4).sum())
    return max(0.1, min(0.8, 4.0 / math.sqrt(count)))


def _rank_one(e: Tensor) -> Tensor:
    """Size of every entry of a matrix by the rank-one model of its variances."""
    square = e.square()
    if e.shape[0] == 1:
        return square.mean().sqrt()
    mean = square.mean()
    return (square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / mean).sqrt()


def _is_spread(d: Tensor, e: Tensor) -> bool:
    """Tell whether no entry, and of 8 rows or more no row, holds 0.7 of the squares."""
    square = d.square()
    most = 0.7 * float(square.sum())
    if float(square.max()) > most:
        return False
    alive = int((e != 0.0).any(1).sum())
    return alive < 8 or float(square.sum(1).max()) <= most


def _is_rounded(a: Tensor, e: Tensor, d: Tensor, unit: float, divisors: Iterable[int]) -> bool:
    if float((d <= 4 * unit * e.abs()).double().mean()) >= 0.99:
        return True
    for k in sorted(set(divisors)):
        mantissa, _ = torch.frexp(a * k)
        grid = torch.round(mantissa * 2.0**_GRID_BITS) / 2.0**_GRID_BITS
        if float(((mantissa - grid).abs() <= 2.0**-51).double().mean()) >= 0.99:
            return True
    return False
