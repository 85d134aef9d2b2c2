"""Routed SwiGLU experts: this rank's slice of the stacked weights and the grouped product.

Owns the arithmetic of the experts. Must not know where rows come from. Easy to get wrong: an
expert with no rows still takes part, so that its gradient is zero and not None.

Shapes: L local experts, F local expert width, H hidden, N rows sorted by local expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


class RoutedExperts(nn.Module):
    """Local experts, holding parameters under the names of the module they replace.

    gate and up: (L, F, H) each, or one fused gate_up (L, 2F, H); down: (L, H, F). activation acts
    on the gate's output.
    """

    def __init__(
        self,
        names: ExpertNames,
        parameters: dict[str, nn.Parameter],
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self._names, self._activation = names, activation
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, x_NH: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert l to its counts[l] consecutive rows."""
        gate_up = self._fused()
        down = self.get_parameter(self._names.down)
        if x_NH.is_cuda and x_NH.dtype == torch.bfloat16 and _aligned(gate_up, down):
            return self._grouped(x_NH, gate_up, down, counts)
        return self._looped(x_NH, gate_up, down, counts)

    def _fused(self) -> Tensor:
        """Give the fused (L, 2F, H) weight, gate rows first."""
        if self._names.up is None:
            return self.get_parameter(self._names.gate)
        gate, up = (self.get_parameter(name) for name in (self._names.gate, self._names.up))
        return torch.cat((gate, up), dim=1)

    def _looped(self, x_NH: Tensor, gate_up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
        rows = []
        weights = zip(gate_up.unbind(0), down.unbind(0), strict=True)
        for x, (w13, w2) in zip(x_NH.split(list(counts)), weights, strict=True):
            gate, up = F.linear(x, w13).chunk(2, dim=-1)
            rows.append(F.linear(self._activation(gate) * up, w2))
        return torch.cat(rows)

    def _grouped(
        self, x_NH: Tensor, gate_up: Tensor, down: Tensor, counts: Sequence[int]
    ) -> Tensor:
        ends = torch.tensor(counts, device=x_NH.device).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x_NH, gate_up.transpose(-2, -1), offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        return torch._grouped_mm(self._activation(gate) * up, down.transpose(-2, -1), offs=ends)


def _aligned(*weights: Tensor) -> bool:
    """Tell whether rows are multiples of 16 bytes, as the grouped product on GPUs demands."""
    return all(size * w.element_size() % 16 == 0 for w in weights for size in w.shape[1:])


class ExpertNames:
    """Parameter names inside the experts module; `up` None means gate holds both, gate first."""

    def __init__(self, gate: str, up: str | None, down: str) -> None:
        self.gate, self.up, self.down = gate, up, down
