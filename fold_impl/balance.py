"""Correction bias of routers: the load of a whole step, and the sign rule that follows it.

Owns the update of what is no parameter and has no gradient. Must not know optimizers. Easy to get
wrong: all TP lanes of a dp rank see the same tokens, so only one lane counts. A factor common
to all counts (lanes, a recomputed forward) does not show in the bias: tests compare the counts.

Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437), 2.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fold_impl.checks import moe_blocks
from fold_impl.config import ConfigError
from fold_impl.groups import FoldGroups
from fold_impl.moe import FoldedMoE
from fold_impl.points import Points
from fold_impl.presets import Preset
from fold_impl.router import CORRECTION_BIAS


class CorrectionBias:
    """The correction biases of a model's routers, moved once per optimizer step."""

    def __init__(
        self, layers: Sequence[FoldedMoE], groups: FoldGroups, rate: float, points: Points
    ) -> None:
        """Begin to count; does nothing at rate 0.

        A bias is kept in float32 at least: in bf16 steps of 1e-3 are lost beside 0.5.
        """
        self._groups, self._rate, self._points = groups, rate, points
        self._layers = [layer for layer in layers if rate and _has_bias(layer.get_router())]
        for layer in self._layers:
            bias_E = layer.get_router().get_buffer(CORRECTION_BIAS)
            wide = bias_E.to(torch.promote_types(bias_E.dtype, torch.float32))
            setattr(layer.get_router(), CORRECTION_BIAS, wide)
        self.forget()

    def forget(self) -> None:
        """Begin the counts of a step anew."""
        for layer in self._layers:
            bias_E = layer.get_router().get_buffer(CORRECTION_BIAS)
            layer.load_E = torch.zeros_like(bias_E, dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Add rate * sign(mean load - load of an expert) to each bias, by the counts of the step.

        Forward: one all-reduce (sum) of all layers' counts over the stage, to which lanes other
        than the first add zero: integers, equal on every rank. Who must call: every rank of the
        stage, once per optimizer step.
        """
        if not self._layers:
            return
        load = torch.cat([_load(layer) for layer in self._layers])
        if not self._points("bias.counted", self._groups.tp.index == 0):
            load.zero_()
        if self._groups.stage.handle is not None:
            dist.all_reduce(load, group=self._groups.stage.handle)
        load = self._points("bias.load", load)
        sizes = [layer.num_experts for layer in self._layers]
        for layer, load_E in zip(self._layers, load.split(sizes), strict=True):
            bias_E = layer.get_router().get_buffer(CORRECTION_BIAS)
            bias_E += self._rate * towards_mean(load_E).to(bias_E.dtype)
        self.forget()


def towards_mean(load_E: Tensor) -> Tensor:
    """Give sign(mean - load) of each expert, exactly: of sum - E * load, all integers."""
    return (load_E.sum() - load_E.numel() * load_E).sign()


def broadcast_biases(layers: Sequence[FoldedMoE], groups: FoldGroups) -> None:
    """Give every rank the first one's correction biases: no parameters, but they choose experts.

    Who must call: every rank of the stage.
    """
    routers = [layer.get_router() for layer in layers]
    groups.stage.broadcast([r.get_buffer(CORRECTION_BIAS) for r in routers if _has_bias(r)])


def check_rate(model: nn.Module, preset: Preset, rate: float) -> None:
    """Refuse a rate for a model without a correction bias, before it is folded.

    Raises:
        ConfigError: no router has the buffer.
    """
    blocks = [model.get_submodule(name) for name in moe_blocks(model, preset)]
    if rate and not any(_has_bias(block.get_submodule(preset.router)) for block in blocks):
        problem = f"no router of the model has a buffer {CORRECTION_BIAS}"
        raise ConfigError(problem, "folding.correction_bias_rate", rate, [0.0])


def _has_bias(router: nn.Module) -> bool:
    return CORRECTION_BIAS in dict(router.named_buffers(recurse=False))


def _load(layer: FoldedMoE) -> Tensor:
    assert layer.load_E is not None, "counting begins in the constructor"
    return layer.load_E
