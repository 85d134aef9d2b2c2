"""A world of ranks inside one test: groups and tensors for `parity.threads.run_ranks`.

Owns what tests of folded layers share. Must not know what they compute. Easy to get wrong: the
process group of a thread is thread-local, so everything a rank does stays in `work`.
"""

from __future__ import annotations

from typing import Any

import torch

from fold_impl.groups import FoldGroups, Group, build_groups
from fold_impl.layout import FoldLayout
from parity.threads import ThreadRuntime, run_ranks

__all__ = ["U", "alone", "fold_groups", "random", "run_ranks", "whole_world"]
U = 2.0**-53
"""Unit round-off of float64."""


def whole_world(runtime: ThreadRuntime) -> Group:
    """Give the group of all ranks, as a folded layer would see it."""
    ranks = tuple(range(runtime.world_size))
    handle = runtime.new_group(ranks) if len(ranks) > 1 else None
    return Group(ranks, runtime.rank, handle)


def fold_groups(runtime: ThreadRuntime, layout: FoldLayout) -> FoldGroups:
    """Make the communicators of every axis."""
    return build_groups(layout, runtime.rank, runtime.new_group)


def alone(layout: FoldLayout | None = None) -> FoldGroups:
    """Give the groups of a world of one rank: no process group is made."""
    return build_groups(layout or FoldLayout(1), 0, _no_group)


def _no_group(ranks: Any) -> Any:
    raise AssertionError(f"a process group of {ranks} was asked for")


def random(*shape: int, seed: int) -> torch.Tensor:
    """Draw a float64 normal tensor that depends on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
