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
    "batch.inputs": "keyword arguments of one micro-batch's forward; context: micro_batch",
    "batch.loss": "micro-batch loss before backward; context: micro_batch, gas",
    "router.logits": "(T, E) logits; context: layer",
    "router.indices": "(T, K) chosen experts; context: layer",
    "router.weights": "(T, K) routing weights; context: layer",
    "auxiliary.scope": "'rank' or 'global': whose tokens are counted; context: layer",
    "auxiliary.load": "(E,) tokens per expert over the scope; context: layer",
    "auxiliary.tokens": "number of tokens over the scope; context: layer",
    "auxiliary.load_balance": "scalar load balance of a layer, before its coefficient; layer",
    "auxiliary.z_loss": "scalar z-loss of a layer, before its coefficient; context: layer",
    "auxiliary.loss": "scalar auxiliary loss of a layer; context: layer",
    "bias.counted": "whether this lane's token counts enter the sum over the stage; context: none",
    "bias.load": "(L * E,) tokens of a step per layer and expert over all ranks; context: none",
    "moe.input": "boundary function over tp (x, group) -> x; context: layer, group",
    "moe.entered": "(T, H) behind the input boundary; context: layer",
    "dispatch.share": "(first, past-the-last) token row this lane keeps; context: tokens, layer",
    "dispatch.experts": "(share * K,) expert of every assignment of the share; context: layer",
    "dispatch.rows": "(rows, H) this lane's share sorted by expert, before all-to-all; layer",
    "dispatch.splits": "(send, receive) row counts per EP rank; context: layer",
    "dispatch.backward_splits": "(send, receive) used by the adjoint; context: layer",
    "dispatch.exchange": "all-to-all (x, splits, group, backward) -> x; layer, way: there, back",
    "dispatch.received": "(rows, H) in the order the experts take them; context: layer, counts",
    "expert.gather": "expert-TP gather (x, sizes, group) -> x; context: layer",
    "expert.output": "(rows, H) leaving the local experts; context: layer, counts",
    "expert.scatter": "expert-TP reduce-scatter (x, sizes, group) -> x; context: layer",
    "expert.partial": "(rows, H) after the expert-TP reduction; context: layer",
    "combine.weights": "(share, K) routing weights met by the returned rows; context: layer",
    "moe.combined": "(share, H) this lane's combined rows; context: layer",
    "moe.restore": "restore function over tp (x, tokens, group) -> x; context: layer, group",
    "moe.restored": "(T, H) output of the layer on every lane; context: layer",
    "shared.output": "(share, H) output of the shared experts for this lane's rows; context: layer",
    "lanes.enter": "hand-over to TP-sharded weights (x, group) -> x; context: module",
    "lanes.leave": "sum of a row-parallel linear over tp (x, group) -> x; context: none",
    "linear.bias": "replicated bias of a row-parallel linear; context: tp_size",
    "reduce.due": "whether gradients are reduced after a micro-batch; context: micro_batch, gas",
    "reduce.gradient": "local accumulated gradient before reduction; context: name, family, sizes",
    "reduce.rule": "reduction rule of a parameter; context: name, family, sizes",
    "reduce.bucket": "flat bucket just before its collective; context: rule, members",
    "reduce.reduced": "gradient after reduction; context: name, family, sizes",
    "step.accumulate": "gradient kept across micro-batches; context: name, micro_batch, gas",
    "norm.square": "this rank's weighted square of one gradient; context: name, family, replicas",
    "norm.reduce": "collective (square, group=) that adds up the ranks' squares; context: none",
    "norm.total": "global gradient norm; context: none",
    "clip.coefficient": "factor on all gradients; context: norm, limit",
    "step.boundary": "whether the step ends with a micro-batch; context: micro_batch, gas",
    "step.reduced": "all parameters, between reduction and norm; context: none",
    "step.gradient": "gradient handed to the optimizer; context: name, family",
    "step.optimizer": "torch optimizer just before its update; context: none",
    "step.order": "'clip, update' order of the optimizer step; context: none",
    "checkpoint.placement": "placement a tensor is saved and loaded by; context: name, family",
    "checkpoint.part": "loaded part before it is set; context: name, family, state, layout, saved",
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
