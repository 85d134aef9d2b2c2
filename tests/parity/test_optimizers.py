"""The reference optimizers against torch's in float64 and against hand calculation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.case import Optimizer
from parity.optimizers import ReferenceOptimizer, clip_coefficient

LR = 0.3
U = 2.0**-53
TORCH: dict[str, Callable[[Iterable[Tensor], Optimizer], torch.optim.Optimizer]] = {
    "sgd": lambda p, s: torch.optim.SGD(p, lr=LR, weight_decay=s.weight_decay),
    "momentum": lambda p, s: torch.optim.SGD(
        p, lr=LR, momentum=s.momentum, weight_decay=s.weight_decay
    ),
    "adam": lambda p, s: torch.optim.Adam(
        p, lr=LR, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
    ),
    "adamw": lambda p, s: torch.optim.AdamW(
        p, lr=LR, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
    ),
}


def follow(spec: Optimizer, seed: int, altered: Optimizer | None = None) -> float:
    """Run four steps of torch's optimizer and of ours; give the largest error of a delta."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(7, 3, generator=generator, dtype=torch.float64))
    theirs = TORCH[spec.name]([weight], spec)
    ours = ReferenceOptimizer(altered or spec, LR)
    largest = 0.0
    for _ in range(4):
        before = weight.detach().clone()
        weight.grad = torch.randn(7, 3, generator=generator, dtype=torch.float64)
        delta = ours.step({"w": before}, {"w": weight.grad.clone()})["w"]
        theirs.step()
        actual = weight.detach() - before
        largest = max(largest, float((actual - delta).norm() / delta.norm()))
    return largest


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_four_steps_match_torch_in_float64(name: Any, weight_decay: float, seed: int) -> None:
    """Deltas agree with torch.optim to rounding of w + delta."""
    assert follow(Optimizer(name=name, weight_decay=weight_decay), seed) <= 64 * U


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sgd", {"weight_decay": 0.1 + 1e-9}),
        ("momentum", {"momentum": 0.9 + 1e-9}),
        ("adam", {"betas": (0.9 + 1e-9, 0.95)}),
        ("adam", {"betas": (0.9, 0.95 + 1e-9)}),
        ("adam", {"eps": 2e-8}),
        ("adamw", {"weight_decay": 0.1 + 1e-9}),
    ],
    ids=["sgd-decay", "momentum", "beta1", "beta2", "eps", "adamw-decay"],
)
def test_a_constant_off_by_little_is_seen(name: Any, wrong: dict[str, Any]) -> None:
    """The comparison with torch is sharp enough to see each constant."""
    spec = Optimizer(name=name, weight_decay=0.1)
    assert follow(spec, 0, altered=spec.model_copy(update=wrong)) > 1e-11


def test_lion_by_hand() -> None:
    """lr 0.5, betas (0.5, 0.25), decay 0.5: two steps of Chen et al., algorithm 2, by hand.

    Step 1: m = 0, c = 0.5 g = (1, -2, 0), delta = -0.5 (sign c + 0.5 w) = (-1, 0, -1);
    m = 0.75 g = (1.5, -3, 0). Step 2: c = 0.5 m + 0.5 g = (-0.25, -1, 1.5),
    delta = -0.5 ((-1, -1, 1) + 0.5 w).
    """
    spec = Optimizer(name="lion", betas=(0.5, 0.25), weight_decay=0.5)
    lion = ReferenceOptimizer(spec, 0.5)
    w = torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64)
    first = lion.step({"w": w}, {"w": torch.tensor([2.0, -4.0, 0.0], dtype=torch.float64)})["w"]
    assert first.tolist() == [-1.0, 0.0, -1.0]
    second = lion.step({"w": w}, {"w": torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64)})["w"]
    assert second.tolist() == [0.0, 0.0, -1.5]
    assert lion.argument["w"].tolist() == [-0.25, -1.0, 1.5]
    assert lion.terms["w"].tolist() == [1.75, 2.0, 1.5]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adams_amplification_bounds_a_perturbed_step(num_steps: int, eps: float) -> None:
    """Errors of +-d R in every gradient move no element by more than d times the bound."""
    d = 1e-9
    generator = torch.Generator().manual_seed(num_steps)
    spec = Optimizer(name="adam", eps=eps)
    exact, moved = ReferenceOptimizer(spec, LR), ReferenceOptimizer(spec, LR)
    weights = {"w": torch.zeros(400, dtype=torch.float64)}
    deltas: list[Tensor] = []
    for _ in range(num_steps):
        grad = torch.randn(400, generator=generator, dtype=torch.float64)
        sign = torch.randn(400, generator=generator, dtype=torch.float64).sign()
        rms = float(grad.square().mean().sqrt())
        pair = {exact: grad, moved: grad + d * rms * sign}
        deltas = [optimizer.step(weights, {"w": g})["w"] for optimizer, g in pair.items()]
    change = (deltas[1] - deltas[0]).abs() / (LR * d)
    bound = exact.amplification("w")
    assert bool((change <= 1.001 * bound + 1e-4).all())
    assert float((change / bound).max()) > 0.1


def test_state_is_kept_by_name() -> None:
    """Two parameters do not share momentum."""
    momentum = ReferenceOptimizer(Optimizer(name="momentum", momentum=0.5), 1.0)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    weights = {"a": zero, "b": zero}
    momentum.step(weights, {"a": one, "b": 2 * one})
    deltas = momentum.step(weights, {"a": zero, "b": zero})
    assert (float(deltas["a"]), float(deltas["b"])) == (-0.5, -1.0)


def test_inputs_are_left_alone() -> None:
    """Neither weights nor gradients are written to, and state is no alias of a gradient."""
    momentum = ReferenceOptimizer(Optimizer(name="momentum"), 1.0)
    grad = torch.ones(2, dtype=torch.float64)
    momentum.step({"w": grad}, {"w": grad})
    grad.zero_()
    assert momentum.step({"w": grad}, {"w": grad})["w"].tolist() == [-0.9, -0.9]


@pytest.mark.parametrize(
    ("norm", "max_norm", "coefficient"),
    [(10.0, 0.0, 1.0), (1.0, 2.0, 1.0), (4.0, 1.0, 1 / (4 + 1e-6)), (1.0, 1.0, 1 / (1 + 1e-6))],
    ids=["off", "below", "above", "equal"],
)
def test_the_clip_coefficient_is_torchs(norm: float, max_norm: float, coefficient: float) -> None:
    """Gradients are multiplied by min(1, max / (norm + 1e-6)), as clip_grad_norm_ does."""
    assert clip_coefficient(norm, max_norm) == coefficient
    if max_norm:
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = torch.tensor([norm], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        assert float(parameter.grad) == pytest.approx(norm * coefficient, rel=1e-15)
