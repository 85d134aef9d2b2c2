"""Reference optimizers in float64, written naively from the published formulas.

Owns what one optimizer step should do to a weight. Must not know `torch.optim`, shards or
engines. Easy to get wrong: Adam adds weight decay to the gradient and eps outside the square
root; AdamW and Lion decay the weight itself; momentum starts from the first gradient, undamped.

Sources: Polyak momentum as in torch.optim.SGD (dampening 0); Kingma and Ba 2015, algorithm 1;
Loshchilov and Hutter 2019, algorithm 2; Chen et al. 2023 (Lion), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parity.case import Optimizer

LINEAR = frozenset({"sgd", "momentum"})
"""Optimizers whose delta is linear in the gradients: a factor on a gradient shows exactly."""
CLIP_EPS = 1e-6
"""Added to the norm by torch.nn.utils.clip_grad_norm_ and by DeepSpeed."""


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Give the factor min(1, max_norm / (norm + 1e-6)) of every gradient; max_norm 0: off."""
    if max_norm == 0.0:
        return 1.0
    return min(1.0, max_norm / (norm + CLIP_EPS))


class ReferenceOptimizer:
    """One optimizer and its state by parameter name, float64 throughout.

    Attributes:
        argument: name -> of the last step, the quantity on which a sign-like delta rests: Lion's
            b1 m + (1 - b1) g, Adam's sqrt(vhat), which after one step is |g|. Zero only where
            (but for cancellation under Lion) no gradient has ever come.
        terms: name -> size of the terms of `argument`: b1 |m| + (1 - b1) |g|, sqrt(vhat).
    """

    def __init__(self, spec: Optimizer, lr: float) -> None:
        """Start with an empty state; `lr` is the step size, `spec.lr` is not read."""
        self.spec, self.lr = spec, lr
        self.num_steps = 0
        self.argument: dict[str, Tensor] = {}
        self.terms: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._rms: dict[str, float] = {}
        self._cross: dict[str, Tensor] = {}

    @property
    def linear(self) -> bool:
        """Tell whether the delta is linear in the gradients."""
        return self.spec.name in LINEAR

    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Advance the state by one step.

        Args:
            weights: name -> weight before the step, float64.
            gradients: name -> gradient, float64, already clipped; no None: a parameter without
                a gradient has the gradient zero.

        Returns:
            Name -> delta to add to the weight, float64.
        """
        self.num_steps += 1
        rule = {
            "sgd": self._sgd,
            "momentum": self._momentum,
            "adam": self._adam,
            "adamw": self._adamw,
            "lion": self._lion,
        }[self.spec.name]
        return {name: rule(name, weights[name], grad) for name, grad in gradients.items()}

    def _decayed(self, weight: Tensor, grad: Tensor) -> Tensor:
        """L2 decay: g + wd w."""
        return grad + self.spec.weight_decay * weight if self.spec.weight_decay else grad

    def _sgd(self, _name: str, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute -lr (g + wd w)."""
        return -self.lr * self._decayed(weight, grad)

    def _momentum(self, name: str, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute -lr b_t with b_1 = g, b_t = mu b_(t-1) + g."""
        grad = self._decayed(weight, grad)
        buffer = self._first.get(name)
        buffer = grad.clone() if buffer is None else self.spec.momentum * buffer + grad
        self._first[name] = buffer
        return -self.lr * buffer

    def _adam(self, name: str, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute -lr mhat / (sqrt(vhat) + eps) with g + wd w as gradient."""
        return self._adam_direction(name, self._decayed(weight, grad))

    def _adamw(self, name: str, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute -lr wd w - lr mhat / (sqrt(vhat) + eps)."""
        delta = self._adam_direction(name, grad)
        decay = self.lr * self.spec.weight_decay
        return delta - decay * weight if decay else delta

    def _adam_direction(self, name: str, grad: Tensor) -> Tensor:
        beta1, beta2 = self.spec.betas
        mean = (1 - beta1) * grad + beta1 * self._first.get(name, 0.0)
        square = (1 - beta2) * grad.square() + beta2 * self._second.get(name, 0.0)
        self._first[name], self._second[name] = mean, square
        mean_hat = mean / (1 - beta1**self.num_steps)
        root = (square / (1 - beta2**self.num_steps)).sqrt()
        self.argument[name] = self.terms[name] = root
        rms = float(grad.norm()) / max(1, grad.numel()) ** 0.5
        self._rms[name] = beta1 * self._rms.get(name, 0.0) + (1 - beta1) * rms
        cross = (1 - beta2) * rms * grad.abs()
        self._cross[name] = cross + beta2 * self._cross.get(name, 0.0)
        return -self.lr * mean_hat / (root + self.spec.eps)

    def amplification(self, name: str) -> Tensor:
        """Bound how much Adam's last step enlarges an error of the gradients, per element.

        With s = sqrt(vhat) + eps and gradients g_k each off by d times their rms R_k, to first
        order |change of mhat / s| <= d (sum a_k R_k + |mhat| / sqrt(vhat) / s sum c_k |g_k| R_k)
        / s, a and c the weights of the two averages. The factor after d is what is returned. In
        the first step both parts cancel (g / (|g| + eps) is a sign but for eps) to eps R / s^2.
        """
        beta1, beta2 = self.spec.betas
        root = self.argument[name]
        size = root + self.spec.eps
        rms = self._rms[name] / (1 - beta1**self.num_steps)
        if self.num_steps == 1:
            return self.spec.eps * rms / size.square()
        mean = self._first[name].abs() / (1 - beta1**self.num_steps)
        cross = self._cross[name] / (1 - beta2**self.num_steps)
        second = torch.where(root == 0.0, 0.0, mean * cross / (root * size))
        return (rms + second) / size

    def _lion(self, name: str, weight: Tensor, grad: Tensor) -> Tensor:
        """Compute -lr (sign(b1 m + (1 - b1) g) + wd w); then m = b2 m + (1 - b2) g."""
        beta1, beta2 = self.spec.betas
        mean = self._first.get(name, torch.zeros_like(grad))
        argument = beta1 * mean + (1 - beta1) * grad
        self.argument[name] = argument
        self.terms[name] = beta1 * mean.abs() + (1 - beta1) * grad.abs()
        self._first[name] = beta2 * mean + (1 - beta2) * grad
        return -self.lr * (argument.sign() + self.spec.weight_decay * weight)
