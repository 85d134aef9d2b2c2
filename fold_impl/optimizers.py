"""Optimizers by the names a DeepSpeed config uses.

Owns the table of optimizers; all but Lion are torch's own. Must not know sharding. Easy to get
wrong: as in DeepSpeed, "Adam" decays decoupled unless `adam_w_mode` is false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fold_impl.config import ConfigError, OptimizerConfig


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (arXiv:2302.06675, algorithm 2), decoupled weight decay.

    update = sign(b1 m + (1 - b1) g) + weight_decay w;  w -= lr update;  m = b2 m + (1 - b2) g.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, _: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                momentum = state.setdefault("exp_avg", torch.zeros_like(weight))
                update = momentum.mul(b1).add_(weight.grad, alpha=1 - b1).sign_()
                update.add_(weight, alpha=group["weight_decay"])
                weight.sub_(update, alpha=group["lr"])
                momentum.mul_(b2).add_(weight.grad, alpha=1 - b2)


_DEEPSPEED_ONLY = ("adam_w_mode", "torch_adam")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {},
    "Adam": {"weight_decay": 0.0},
    "AdamW": {"weight_decay": 0.0},
    "Lion": {},
}
"""Where DeepSpeed's defaults differ from torch's, a config means DeepSpeed's."""


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Make the optimizer a config's `optimizer` section names.

    Raises:
        ConfigError: options the optimizer does not take.
    """
    adam = torch.optim.AdamW if config.decoupled_weight_decay else torch.optim.Adam
    kinds: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
        "SGD": torch.optim.SGD,
        "Adam": adam,
        "AdamW": adam,
        "Lion": Lion,
    }
    given = {k: v for k, v in config.params.items() if k not in _DEEPSPEED_ONLY}
    options = {**_DEFAULTS[config.type], **given}
    try:
        return kinds[config.type](parameters, **options)
    except (TypeError, ValueError) as error:
        allowed = "the parameters of the optimizer in torch.optim"
        raise ConfigError(str(error), "optimizer.params", dict(options), allowed) from error
