"""The data of a case: other tokens, another count of them, on every (dp rank, micro-batch, step).

Owns what each rank is fed. Must not know models' internals or implementations. Easy to get wrong:
lanes of one dp rank see the same tokens, but with a lane-varying consumer each its own probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.case import Case
from parity.implementation import Batch


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one dp rank in one micro-batch, with the probe of every lane.

    input_ids, labels: (B, S) int64; probes: (tp, layers + 1, B, S, H) in the case's dtype, or None.
    """

    input_ids: Tensor
    labels: Tensor
    loss_scale: float
    probes: Tensor | None

    def for_lane(self, lane: int) -> Batch:
        """Give the model's keyword arguments on one TP lane."""
        return self._arguments(None if self.probes is None else self.probes[lane])

    def for_mean(self, dtype: torch.dtype) -> Batch:
        """Give the keyword arguments under the objective: the mean over lanes."""
        return self._arguments(None if self.probes is None else self.probes.to(dtype).mean(0))

    def _arguments(self, probe: Tensor | None) -> Batch:
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "loss_scale": self.loss_scale,
            "probe": probe,
        }


StepBatches = Sequence[Sequence[MicroBatch]]
"""[dp rank][micro-batch]."""


def make(case: Case, dp: int, step: int, seed: int) -> list[list[MicroBatch]]:
    """Draw the batches of one step (1-based); loss_scale is dp * gas / (tokens of the step).

    With it an engine that averages over dp ranks and micro-batches ends at the mean token loss,
    however unevenly tokens lie. From step to step it changes by data.step_scale.
    """
    data, gas = case.data, case.engine.gas
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    extra = torch.randperm(dp * gas, generator=generator) if data.uneven else torch.zeros(dp * gas)
    lengths = [data.length + int(n) for n in extra]
    scale = dp * gas / (data.sequences * sum(lengths)) * data.step_scale ** (step - 1)
    drawn = [_draw(case, length, scale, generator) for length in lengths]
    return [drawn[rank * gas : (rank + 1) * gas] for rank in range(dp)]


def _draw(case: Case, length: int, scale: float, generator: torch.Generator) -> MicroBatch:
    shape = (case.data.sequences, length)
    tokens = torch.randint(case.model.vocab, (2, *shape), generator=generator)
    probes = None
    if case.data.lane_varying:
        size = (case.shape.tp, case.model.layers + 1, *shape, case.model.hidden)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        probes = (0.1 * noise).to(getattr(torch, case.engine.dtype))
    return MicroBatch(tokens[0], tokens[1], scale, probes)
