"""DeepSpeed's optimizers of 16-bit runs, put right where they are wrong for any layout.

Owns when a loss scale grows and what ZeRO-0 steps. Must not know groups or modules. Easy to get
wrong: gradients must be divided by the scale they were computed with (docs/findings/0001, 0009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


class StepwiseScaleOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer of ZeRO-1/2, whose dynamic loss scale grows after the step.

    DeepSpeed lets it grow first and then divides the gradients by the new scale: half an update.
    """

    _grows = False

    def _update_scale(self, has_overflow: bool = False) -> None:
        if has_overflow:
            super()._update_scale(True)
        self._grows = not has_overflow

    def step(self, closure: Any = None) -> None:
        """Update with the scale the gradients were computed with."""
        super().step(closure)
        if self._grows:
            super()._update_scale(False)
            self._grows = False


class StageZeroOptimizer(FP16_UnfusedOptimizer):  # type: ignore[misc]
    """DeepSpeed's 16-bit optimizer of ZeRO-0, with a norm that counts every shard once."""

    global_norm_of: Callable[[Iterable[tuple[nn.Parameter, Tensor]]], float]

    def initialize_optimizer_states(self) -> None:
        """Leave the states to the first step.

        DeepSpeed runs a step on zero gradients here: Adam's counter then starts at 1, and AdamW
        decays the master weights before training.
        """

    @property
    def scale_missed_by_backward(self) -> float:
        """Factor on the loss that `DeepSpeedEngine.backward` puts on for ZeRO optimizers only."""
        return float(self.loss_scale) if self.loss_scale_config.use_grad_scaling else 1.0

    def step(self, closure: Any = None) -> bool:
        """Update the masters, or skip the step on every rank alike if any gradient is not finite.

        One collective: the sum of squares over the stage, whose result is not finite exactly if
        some gradient of some rank is not.
        """
        assert closure is None
        pairs = list(paired(self.fp32_groups, self))
        for parameter, master in pairs:
            given = parameter.grad
            master.grad = torch.zeros_like(master) if given is None else given.to(master.dtype)
        scaled_norm = self.global_norm_of(pairs)
        if not math.isfinite(scaled_norm):
            return bool(self._skip_invalid_grad_norm())
        self.overflow = False
        self._global_grad_norm = scaled_norm / self.loss_scale_config.cur_scale
        self.unscale_and_clip_grads(scaled_norm)
        self._update_scale(False)
        self.optimizer.step()
        for parameter, master in pairs:
            master.grad = None
            parameter.data.copy_(master.data)
        return False


def model_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """Give the model's own parameters, group by group, behind any of the four optimizers."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            groups: list[list[nn.Parameter]] = getattr(optimizer, name)
            return groups
    return [group["params"] for group in optimizer.param_groups]


def paired(held: Any, optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Pair the model's parameters with what the optimizer holds for each."""
    for parameters, tensors in zip(model_groups(optimizer), held, strict=True):
        yield from zip(parameters, tensors, strict=True)
