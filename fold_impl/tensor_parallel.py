"""The dense path over TP lanes: column- and row-parallel linears and their two collectives.

Owns Megatron's f and g (arXiv:1909.08053, section 3). Must not know MoE. Easy to get wrong: f
*sums* lanes because each holds a part of the input's gradient; the boundary of the MoE layer
averages, because there each lane's gradient already carries a factor tp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from fold_impl.groups import Group
from fold_impl.points import Points


class _Enter(torch.autograd.Function):
    """Forward identity; backward all-reduce (sum) over tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group.handle)
        return gradient, None


class _Leave(torch.autograd.Function):
    """Forward all-reduce (sum) over tp; backward identity."""

    @staticmethod
    def forward(_: Any, x: Tensor, group: Group) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group.handle)
        return x

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def enter_lanes(x: Tensor, group: Group) -> Tensor:
    """Hand a replicated activation to sharded weights.

    Group tp. Forward identity, backward all-reduce: the lanes' parts of the input gradient add up.
    Factor 1 under a lane-uniform loss. Who must call: every lane.
    """
    if group.handle is None:
        return x
    out: Tensor = _Enter.apply(x, group)
    return out


def leave_lanes(x: Tensor, group: Group) -> Tensor:
    """Add up the lanes' partial outputs.

    Group tp. Forward all-reduce, backward identity: with a lane-uniform loss every lane already
    has the whole output gradient. Factor 1. Who must call: every lane.
    """
    if group.handle is None:
        return x
    out: Tensor = _Leave.apply(x, group)
    return out


class ColumnParallelLinear(nn.Module):
    """This lane's rows of a linear's weight (out / tp, in); output is this lane's columns.

    Args:
        weight: (out / tp, in).
        bias: (out / tp,) or None.
        group: tp.
        enters: whether the module itself hands its input to the lanes; False inside a region
            whose input did so once for all its linears.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, *, enters: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.group, self.enters = weight, bias, group, enters

    def forward(self, x: Tensor) -> Tensor:
        """Apply the lane's part."""
        return F.linear(enter_lanes(x, self.group) if self.enters else x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This lane's columns of a linear's weight (out, in / tp); output summed over lanes.

    The replicated bias is added after the sum, once. `leave` is the collective that sums.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        group: Group,
        points: Points,
        leave: Callable[[Tensor, Group], Tensor] = leave_lanes,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.group, self.points = weight, bias, group, points
        self.leave: Callable[[Tensor, Group], Tensor] = leave

    def forward(self, x: Tensor) -> Tensor:
        """Apply the lane's part and add up."""
        leave: Callable[[Tensor, Group], Tensor] = self.points("lanes.leave", self.leave)
        y: Tensor = leave(F.linear(x, self.weight), self.group)
        if self.bias is None:
            return y
        bias: Tensor = self.points("linear.bias", self.bias, tp_size=self.group.size)
        return y + bias


def enter_region(module: nn.Module, group: Group, points: Points | None = None) -> None:
    """Make a module hand its first input to the lanes once, for all column-parallel linears in it.

    One all-reduce in backward instead of one per linear.
    """
    table = points or Points()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        enter = table("lanes.enter", enter_lanes, module=module)
        if args:
            return (enter(args[0], group), *args[1:]), kwargs
        hidden = enter(kwargs["hidden_states"], group)
        return args, {**kwargs, "hidden_states": hidden}

    if group.handle is not None:
        module.register_forward_pre_hook(hook, with_kwargs=True)


class SharedTailLinear(nn.Module):
    """A replicated linear whose last `tail` output columns feed the sharded heads directly.

    Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) makes one rotary key
    for all heads: each lane's heads give a part of its gradient, while the rest of the output
    reaches the lanes through a column-parallel linear that adds the parts up by itself.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, tail: int, group: Group
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.tail, self.group = weight, bias, tail, group

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear, handing the tail to the lanes."""
        y = F.linear(x, self.weight, self.bias)
        head, tail = y.split([y.shape[-1] - self.tail, self.tail], dim=-1)
        return torch.cat([head, enter_lanes(tail, self.group)], dim=-1)
