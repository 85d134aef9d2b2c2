"""Optimizers by their DeepSpeed names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fold_impl.config import ConfigError, OptimizerConfig
from fold_impl.optimizers import Lion, make_optimizer


def weight(value: float, gradient: float | None) -> nn.Parameter:
    """Make one weight with a gradient."""
    parameter = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    parameter.grad = None if gradient is None else torch.tensor([gradient], dtype=torch.float64)
    return parameter


@pytest.mark.parametrize(
    ("name", "params", "kind"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
        ("Adam", {"lr": 0.1}, torch.optim.AdamW),
        ("Adam", {"lr": 0.1, "adam_w_mode": False}, torch.optim.Adam),
        ("Adam", {"lr": 0.1, "adam_w_mode": True, "torch_adam": True}, torch.optim.AdamW),
        ("AdamW", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}, torch.optim.AdamW),
        ("Lion", {"lr": 0.1, "betas": (0.8, 0.9)}, Lion),
    ],
)
def test_a_name_makes_the_optimizer_deepspeed_would(
    name: str, params: dict[str, Any], kind: type[torch.optim.Optimizer]
) -> None:
    """Adam is decoupled unless adam_w_mode is false; options reach the parameter group."""
    made = make_optimizer(OptimizerConfig(name, params), [weight(1.0, 1.0)])
    assert type(made) is kind
    for key in set(params) - {"adam_w_mode", "torch_adam"}:
        assert made.param_groups[0][key] == params[key]


def test_decay_of_adam_is_decoupled_unless_told_not_to() -> None:
    """g = 0, wd = 1/2, lr = 1/10, w = 2: decoupled w shrinks by lr wd w = 1/10, L2 steps by lr."""
    stepped = []
    for mode in (True, False):
        w = weight(2.0, 0.0)
        params = {"lr": 0.1, "weight_decay": 0.5, "adam_w_mode": mode}
        make_optimizer(OptimizerConfig("Adam", params), [w]).step()
        stepped.append(float(w.detach()))
    assert stepped == [pytest.approx(2 - 0.1), pytest.approx(2 - 0.1 / (1 + 1e-8), rel=1e-12)]


def test_two_steps_of_lion_by_hand() -> None:
    """b 0.9, 0.99, lr 1, wd 0.1; g = 1, then -0.05: m keeps the sign of the second step positive.

    w0 = 2: update = sign(0.1) + 0.2 = 1.2, w = 0.8, m = 0.01.
    Then c = 0.009 - 0.005 = 0.004 > 0: update = 1 + 0.08, w = -0.28.
    """
    w = weight(2.0, 1.0)
    lion = Lion([w], lr=1.0, betas=(0.9, 0.99), weight_decay=0.1)
    lion.step()
    assert float(w.detach()) == pytest.approx(0.8, rel=1e-14)
    assert float(lion.state[w]["exp_avg"]) == pytest.approx(0.01, rel=1e-14)
    w.grad = torch.tensor([-0.05], dtype=torch.float64)
    lion.step()
    assert float(w.detach()) == pytest.approx(-0.28, rel=1e-14)


def test_lion_without_a_gradient_leaves_weight_and_state_alone() -> None:
    """None is no gradient, not zero: neither decay nor state."""
    w = weight(2.0, None)
    lion = Lion([w], lr=1.0, weight_decay=0.1)
    lion.step()
    assert float(w.detach()) == 2.0
    assert not lion.state


def test_options_the_optimizer_does_not_take_are_refused() -> None:
    """The message is torch's, the key is the config's."""
    with pytest.raises(ConfigError, match=r"optimizer\.params .*unexpected keyword argument 'mu'"):
        make_optimizer(OptimizerConfig("SGD", {"lr": 0.1, "mu": 0.9}), [weight(1.0, 1.0)])
