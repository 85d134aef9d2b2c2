"""The structural Protocol an implementation offers to the harness (SPEC section 4).

Owns the vocabulary both sides share: families, shards, placements, batches and the context of a
rank. Must not know any implementation. Easy to get wrong: gradients are those *after* every
reduction and *before* clipping, each rank handing over its own shard under the full logical name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from parity import registry
from parity.errors import UsageError
from parity.layout import Layout

Family = Literal[
    "router", "layernorm", "dense", "attention", "embedding", "expert", "shared_expert"
]
FAMILIES: tuple[Family, ...] = (
    "router",
    "layernorm",
    "dense",
    "attention",
    "embedding",
    "expert",
    "shared_expert",
)
Batch = Mapping[str, Any]
"""Keyword arguments of the model's forward for one micro-batch; it returns the scalar loss."""
Routing = Sequence[Sequence[Tensor]]
"""[micro_batch][MoE layer] -> (num_tokens, top_k) int64 expert indices, best first."""
Transform = Callable[..., Any]
"""value, **context -> value to use instead (a planted fault, or a tap returning its input)."""


@dataclass(frozen=True)
class Shard:
    """One cut of a tensor: dimension `dim` over `axis`, in `segments` equal interleaved blocks.

    A fused (2F, H) gate-up weight cut over etp has segments=2: each half is cut on its own.
    """

    axis: Literal["tp", "ep", "etp"]
    dim: int
    segments: int = 1


@dataclass(frozen=True)
class Placement:
    """Family of a parameter and how a rank's tensor is cut from the full logical one.

    Ranks with equal coordinates on every shard axis hold replicas of one another.
    """

    family: Family
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class RankContext:
    """What a rank is given: who it is, where it computes, and how it gets process groups."""

    rank: int
    layout: Layout
    device: torch.device
    backend: str
    new_group: Callable[[Sequence[int]], Any]
    """ranks -> ProcessGroup holding them (cached by rank tuple), None where this rank is absent;
    every rank of the world calls it with the same tables in the same order."""


@runtime_checkable
class Implementation(Protocol):
    """A trainer under test. One object is built once and stepped in order.

    Optional members (their absence is noted in the results): `gradients()`, `grad_norm()`,
    `replay(routing)`, `fault_points` with `plant(point, transform)`, `taps()`, and `save(path)` /
    `load(path)`, where load returns notes on what it could not restore exactly (or None), and may
    be called at another layout. With them `optimizer_state()` -> {parameter: {entry: this rank's
    part, or a number}} may stand, so that what an update only hints at is compared itself.

    gradients() -> this rank's shard of every gradient of the last step (or None), reduced, not
    clipped. Without it: `.grad` of what `parameters()` gives.

    grad_norm() -> the engine's own global gradient norm of the last step, before clipping. Without
    it, or where it gives None, its row is skipped; what it clips is judged by the update.
    """

    def build(self, model: nn.Module, config: Mapping[str, Any], context: RankContext) -> None:
        """Take a full, unsharded model (same weights on every rank) and a DeepSpeed-style config.

        `config` already holds sizes, optimizer, gas, clipping and precision; the model is in the
        case's dtype on the context's device. `model(**batch)` returns the micro-batch loss.
        """

    def step(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Run forward and backward on each micro-batch, then one optimizer step.

        Returns:
            This rank's loss of each micro-batch, before any division by gas.
        """

    def placements(self) -> Mapping[str, Placement]:
        """Map every full logical parameter name to family and cuts; equal on every rank."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Give this rank's shard of every parameter now (master weights where they exist)."""

    def routing(self) -> Routing:
        """Give the experts chosen in the last step on this rank's tokens."""


REQUIRED: tuple[str, ...] = (
    "build",
    "step",
    "placements",
    "parameters",
    "routing",
)
OPTIONAL: tuple[str, ...] = (
    "gradients",
    "grad_norm",
    "replay",
    "taps",
    "fault_points",
    "save",
    "load",
)


class Refusal(Exception):  # noqa: N818 - a verdict of the implementation, not an error of ours
    """Raised where the implementation itself refuses the case; the text is its own words.

    Any exception with a true attribute `refusal` counts as one, so no import is needed.
    """

    refusal = True


def find(name: str) -> Callable[[], Implementation]:
    """Find what makes an implementation: a name of the entry-point group, or `module:attr`.

    Raises:
        UsageError: no such name, module or attribute, or a member of the Protocol is missing.
    """
    made = registry.load(name)
    missing = [m for m in REQUIRED if not hasattr(made, m)]
    if missing:
        raise UsageError(f"implementation {name!r} lacks {', '.join(missing)}")
    factory: Callable[[], Implementation] = made if isinstance(made, type) else lambda: made
    return factory
