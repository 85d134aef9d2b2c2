"""How the field compares gradients, beside ours: one yes or no a practice for one planted run.

Owns the practices and their tolerances. Must not know faults. Easy to get wrong: each practice
compares with the non-folded run, as its users do, and sees only what they look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from parity.judge import Comparison
from parity.store import Row

RATIO = 5e-3
"""Norms of two tensors are called equal within this."""
ATOL, RTOL = 1e-1, 5e-3
"""DeepSpeed's tests of its own folding."""
COSINE = 0.99
GLOBAL_NORM = 5e-2
LOSS = 1e-2
"""Loss curves that overlay to the eye."""


@dataclass(frozen=True)
class Seen:
    """One judged case as a detector sees it."""

    made_of: Comparison
    rows: Sequence[Row]

    @property
    def optimizer(self) -> str:
        """Name of the case's optimizer."""
        return self.made_of.case.optimizer.name

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give name, folded and non-folded gradient of the first step."""
        folded, baseline = self.made_of.folded.steps[0], self.made_of.baseline.steps[0]
        yield from _pairs(folded.gradients.filled, baseline.gradients.filled)

    def weights(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give name, folded and non-folded weight after the last step."""
        folded, baseline = self.made_of.folded.steps[-1], self.made_of.baseline.steps[-1]
        yield from _pairs(folded.after.filled, baseline.after.filled)


def _pairs(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, tensor in expected.items():
        found = actual.get(name)
        yield name, torch.zeros_like(tensor) if found is None else found, tensor


def _ratio_off(actual: Tensor, expected: Tensor) -> bool:
    expected_norm = float(expected.norm())
    if expected_norm == 0.0:
        return False  # no ratio: practice skips it
    return not abs(float(actual.norm()) / expected_norm - 1.0) <= RATIO


def norm_ratio(seen: Seen) -> bool:
    """Compare the norm of every gradient."""
    return any(_ratio_off(a, e) for _, a, e in seen.gradients())


def _far(actual: Tensor, expected: Tensor) -> bool:
    return not torch.allclose(actual, expected, rtol=RTOL, atol=ATOL)


def upstream(seen: Seen) -> bool:
    """Compare the router gate and one LayerNorm elementwise, as DeepSpeed's tests do."""
    chosen = [(n, a, e) for n, a, e in seen.gradients() if n.endswith("router.weight")][:1]
    chosen += [(n, a, e) for n, a, e in seen.gradients() if "norm" in n][:1]
    return any(_far(a, e) for _, a, e in chosen)


def upstream_all(seen: Seen) -> bool:
    """Compare every gradient elementwise at the same tolerance."""
    return any(_far(a, e) for _, a, e in seen.gradients())


def cosine(seen: Seen) -> bool:
    """Compare the direction of every gradient."""
    for _, actual, expected in seen.gradients():
        size = float(actual.norm() * expected.norm())
        if size > 0.0 and not float((actual * expected).sum()) / size >= COSINE:
            return True
    return False


def global_norm(seen: Seen) -> bool:
    """Compare the engine's own global gradient norm."""
    folded, baseline = seen.made_of.folded.steps, seen.made_of.baseline.steps
    pairs = ((f.norms[0], b.norms[0]) for f, b in zip(folded, baseline, strict=True))
    return any(n is None or m is None or not abs(n / m - 1.0) <= GLOBAL_NORM for n, m in pairs)


def loss_curve(seen: Seen) -> bool:
    """Compare the loss of every step."""
    folded, baseline = seen.made_of.folded.steps, seen.made_of.baseline.steps
    pairs = zip(folded, baseline, strict=True)
    return any(not math.isclose(f.loss, b.loss, rel_tol=LOSS) for f, b in pairs)


def weights_after(optimizers: Sequence[str]) -> Callable[[Seen], bool]:
    """Make a comparison of the norm of every weight after the last step."""

    def compare(seen: Seen) -> bool:
        if seen.optimizer not in optimizers:
            return False
        return any(_ratio_off(a, e) for _, a, e in seen.weights())

    return compare


def ours(seen: Seen) -> bool:
    """Judge by rows."""
    return any(row.verdict in ("fail", "leak") for row in seen.rows)


DETECTORS: Mapping[str, Callable[[Seen], bool]] = MappingProxyType(
    {
        "norm ratio": norm_ratio,
        "upstream": upstream,
        "upstream, all": upstream_all,
        "cosine": cosine,
        "global norm": global_norm,
        "loss curve": loss_curve,
        "weights, Adam": weights_after(("adam", "adamw")),
        "weights, SGD": weights_after(("sgd", "momentum")),
        "ours": ours,
    }
)
LEGEND: Mapping[str, str] = MappingProxyType(
    {
        "norm ratio": f"norm of every gradient within {RATIO:g} of the non-folded one",
        "upstream": f"router gate and one LayerNorm, atol {ATOL:g} / rtol {RTOL:g}: the tolerance "
        "of DeepSpeed's own folding tests",
        "upstream, all": "the same tolerance on every gradient",
        "cosine": f"cosine of every gradient at least {COSINE:g}",
        "global norm": f"the engine's global gradient norm within {GLOBAL_NORM:.0%}",
        "loss curve": f"loss of every step within {LOSS:.0%}",
        "weights, Adam": f"norm of every weight after Adam's step(s) within {RATIO:g}",
        "weights, SGD": "the same after SGD's",
        "ours": "the rows of this harness",
    }
)
