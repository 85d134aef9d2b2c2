"""A run that begins somewhere else than it must, though every number it gives fits itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fold_impl.adapter import FoldImplementation
from parity.judge import Judge
from tests.parity.test_explain import Here, case

CASE = case(shape__world=4, shape__tp=2, shape__ep=2, steps=2)


class Drifting(FoldImplementation):
    """Changes its weights after they were read, as an average or a late synchronisation would."""

    def grad_norm(self) -> float:
        """Give the norm, and move a weight."""
        with torch.no_grad():
            for parameter in self._engine.folded_parameters:
                if parameter.name == "head.weight":
                    parameter.parameter.mul_(1.001)
        return super().grad_norm()


class Elsewhere(FoldImplementation):
    """Begins with a head of its own."""

    def build(self, model: Any, config: Any, context: Any) -> None:
        """Build, and change what was given."""
        with torch.no_grad():
            model.head.weight.mul_(1 + 2.0**-40)
        super().build(model, config, context)


@pytest.mark.parametrize(
    ("implementation", "step", "said"),
    [
        (Drifting, 2, "before step 2 it is not what step 1 left"),
        (Elsewhere, 1, "before step 1 it is not the weight that was given"),
    ],
)
def test_a_step_begins_where_it_must(implementation: type, step: int, said: str) -> None:
    """One row for the tensor, the size of the difference in it."""
    judge = Judge(implementation=f"{__name__}:{implementation.__name__}", pool=Here())
    rows = [r for r in judge.rows(CASE) if r.reason == said]
    folded = [r for r in rows if r.shape["tp"] == 2]
    assert [(r.quantity, r.tensor, r.step, r.verdict) for r in folded] == [
        ("update", "head.weight", step, "fail")
    ]
    assert folded[0].scale == pytest.approx(1.001 if step == 2 else 1.0, rel=1e-9)
