"""Small full tensors of one made-up model, with the noise and the judging the tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parity.collect import Assembled, assemble
from parity.compare import UNIT_ROUNDOFF, RowContext, gradient_rows
from parity.implementation import Placement, Shard
from parity.layout import Layout
from parity.store import Row

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAYOUT = Layout(4, tp=2, ep=2)
PLACEMENTS = {
    "experts": Placement("expert", (Shard("ep", 0),)),
    "q": Placement("attention", (Shard("tp", 0),)),
    "norm": Placement("layernorm"),
    "norm2": Placement("layernorm"),
    "router": Placement("router"),
}
SHAPES = {"experts": (4, 12, 20), "q": (24, 20), "norm": (48,), "norm2": (48,), "router": (4, 48)}
Tensors = dict[str, Tensor]


def context(dtype: torch.dtype = F64, **changes: Any) -> RowContext:
    """Give the context every row of these tests shares."""
    shape = {"world": 4, "pp": 1, "tp": 2, "dp": 2, "ep": 2, "etp": 1, "edp": 2}
    engine = {"name": "native", "gas": 3, "backend": "gloo"}
    base = RowContext("case", "ours", shape, engine, "reference", 1, dtype, 0.5)
    return dataclasses.replace(base, **changes)


def draw(seed: int = 0, size: float = 1.0) -> Tensors:
    """Draw one float64 tensor per name; the last expert is idle."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: size * torch.randn(shape, generator=generator, dtype=F64)
        for name, shape in SHAPES.items()
    }
    tensors["experts"][-1] = 0.0
    return tensors


def given(tensors: Mapping[str, Tensor | None]) -> Assembled:
    """Assemble as if one rank had handed over the full tensors."""
    return assemble(Layout(1), {name: PLACEMENTS[name] for name in tensors}, [tensors])


def noisy(tensors: Tensors, roundoffs: float, dtype: torch.dtype, seed: int = 9) -> Tensors:
    """Add noise of the given relative norm, in u, to every expert and to every other tensor."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=F64)
        dims = tuple(range(1, tensor.dim())) if name == "experts" else None
        size = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
        noise *= size / torch.linalg.vector_norm(noise, dim=dims, keepdim=True)
        out[name] = tensor + roundoffs * UNIT_ROUNDOFF[dtype] * noise
    return out


def judged(
    actual: Mapping[str, Tensor | None],
    expected: Tensors,
    dtype: torch.dtype = F64,
    structural_zero: frozenset[str] = frozenset(),
) -> dict[str, Row]:
    """Judge gradients; rows by tensor."""
    rows = gradient_rows(
        context(dtype), given(actual), expected, PLACEMENTS, LAYOUT, structural_zero
    )
    for row in rows:
        row.to_json()
    return {str(row.tensor): row for row in rows}
