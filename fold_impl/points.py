"""Named places inside the implementation where a value can be watched or replaced.

Owns the table of transformations of one engine. Must not know what a tap or a fault is. Easy to
get wrong: a point passes on whatever its transformation returns, so a watcher returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Transform = Callable[..., Any]

POINTS: dict[str, str] = {
    "groups.table": "rank tables of one axis: tuple of tuples; context: axis",
    "batch.loss": "micro-batch loss before backward; context: micro_batch, gas",
    "router.logits": "(T, E) logits; context: layer",
    "router.indices": "(T, K) chosen experts; context: layer",
    "router.weights": "(T, K) routing weights; context: layer",
    "auxiliary.load": "(E,) tokens per expert over the scope; context: layer",
    "auxiliary.tokens": "number of tokens over the scope; context: layer",
    "auxiliary.loss": "scalar auxiliary loss of a layer; context: layer",
    "moe.input": "boundary function over tp (x, group) -> x; context: layer, group",
    "moe.entered": "(T, H) behind the input boundary; context: layer",
    "dispatch.rows": "(rows, H) this lane's share sorted by expert, before all-to-all; layer",
    "dispatch.splits": "(send, receive) row counts per EP rank; context: layer",
    "dispatch.backward_splits": "(send, receive) used by the adjoint; context: layer",
    "dispatch.received": "(rows, H) in the order the experts take them; context: layer, counts",
    "expert.output": "(rows, H) leaving the local experts; context: layer, counts",
    "expert.partial": "(rows, H) after the expert-TP reduction; context: layer",
    "combine.weights": "(share, K) routing weights met by the returned rows; context: layer",
    "moe.combined": "(share, H) this lane's combined rows; context: layer",
    "moe.restore": "restore function over tp (x, tokens, group) -> x; context: layer, group",
    "moe.restored": "(T, H) output of the layer on every lane; context: layer",
    "shared.output": "(share, H) output of the shared experts for this lane's rows; context: layer",
    "linear.bias": "replicated bias of a row-parallel linear; context: tp_size",
    "reduce.gradient": "local accumulated gradient before reduction; context: name, family, sizes",
    "reduce.rule": "reduction rule of a parameter; context: name, family, sizes",
    "reduce.bucket": "flat bucket just before its collective; context: rule",
    "reduce.reduced": "gradient after reduction; context: name, family, sizes",
    "step.accumulate": "gradient kept across micro-batches; context: name, micro_batch, gas",
    "norm.square": "this rank's weighted square of one gradient; context: name, family, replicas",
    "norm.total": "global gradient norm; context: none",
    "clip.coefficient": "factor on all gradients; context: norm, limit",
    "step.order": "'clip, update' order of the optimizer step; context: none",
}
"""Point -> what passes there."""


class Points:
    """Table of planted transformations; calling it hands a value through its point."""

    def __init__(self) -> None:
        self._transforms: dict[str, list[Transform]] = {}

    def plant(self, point: str, transform: Transform) -> None:
        """Add a transformation; several at one point run in the order they were planted.

        Raises:
            KeyError: no such point.
        """
        if point not in POINTS:
            raise KeyError(f"no point {point!r}; there are: {', '.join(sorted(POINTS))}")
        self._transforms.setdefault(point, []).append(transform)

    def __call__(self, point: str, value: Any, **context: Any) -> Any:
        """Pass a value through a point."""
        for transform in self._transforms.get(point, ()):
            value = transform(value, **context)
        return value
