"""Runs that are not the run a case asks for, though every number they give fits itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fold_impl.adapter import FoldImplementation
from parity import case as cases
from parity import models
from parity.implementation import Family, Placement
from parity.judge import Judge
from parity.store import Row
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


class Whole:
    """Cuts nothing: every lane does all the work. Declares the dense path under another family."""

    declared: Mapping[str, Family] = {"attention": "embedding", "dense": "embedding"}

    def build(self, model: Any, config: Any, _context: Any) -> None:
        """Take the model as it is."""
        self.model, self.lr = model, config["optimizer"]["params"]["lr"]

    def step(self, micro_batches: Any) -> list[float]:
        """Train on one lane's tokens, which are every lane's."""
        self.model.zero_grad()
        losses, self.chosen = [], []
        for batch in micro_batches:
            loss = self.model(**batch)
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
            self.chosen.append([block.moe.indices_TK for block in self.model.blocks()])
        for weight in self.model.parameters():
            weight.data -= self.lr * weight.grad
        return losses

    def placements(self) -> dict[str, Placement]:
        """Say that no rank holds a part."""
        found = {}
        for name, _ in self.model.named_parameters():
            family = models.family_of(name)
            found[name] = Placement(self.declared.get(family, family))
        return found

    def parameters(self) -> dict[str, Any]:
        """Give the whole weights."""
        return dict(self.model.named_parameters())

    def routing(self) -> Any:
        """Give the experts chosen."""
        return self.chosen


class Mistaken(FoldImplementation):
    """Right in every number; declares the routers as dense."""

    def placements(self) -> dict[str, Any]:
        """Rename one family."""
        found: dict[str, Any] = dict(super().placements())
        for name in found:
            if "router" in name:
                found[name] = Placement("dense")
        return found


def failing(implementation: type) -> set[tuple[str | None, str | None, str | None]]:
    """Judge a folded case and give family, tensor and reason of what fails of it."""
    judge = Judge(implementation=f"{__name__}:{implementation.__name__}", pool=Here())
    made = case(shape__world=2, shape__tp=2)
    rows: list[Row] = [r for r in judge.rows(made) if r.shape["tp"] == 2]
    return {(r.family, r.tensor, r.reason) for r in rows if r.verdict == "fail"}


def test_weights_that_no_rank_cuts_fail_whatever_they_are_declared_to_be() -> None:
    """Both families are named, and every parameter that is declared under another one."""
    found = failing(Whole)
    assert {(f, t) for f, t, said in found if said == f"no {f} weight is sharded over tp = 2"} == {
        ("attention", None), ("dense", None),
    }  # fmt: skip
    said = "declared as embedding by placements(), in the model it is attention"
    assert ("attention", "layers.0.attention.q.weight", said) in found


def test_a_family_that_is_not_the_models_fails_by_name() -> None:
    """Two routers; nothing else is wrong."""
    said = "declared as dense by placements(), in the model it is router"
    assert failing(Mistaken) == {
        ("router", f"layers.{layer}.moe.router.weight", said) for layer in (0, 1)
    }


def test_every_model_has_linear_weights_that_tp_is_to_cut() -> None:
    """All but Mixtral's have both kinds; norms inside a head, gates and experts are none."""
    found: dict[str, dict[str, int]] = {}
    for name in ("tiny", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        fields = {"shape.world": 1, "model.name": name, "model.heads": 6}
        model = models.build_for(cases.make(fields, suite="s", file="f"), 0)
        names = [n for n, _ in model.named_parameters()]
        found[name] = {
            family: len({n.split(".")[-2] for n in names if re.search(pattern, n)})
            for family, pattern in models.LINEARS.items()
        }
    assert found["tiny"] == {"attention": 4, "dense": 3}
    assert found["mixtral"] == {"attention": 4, "dense": 0}
    assert found["qwen3_moe"] == {"attention": 4, "dense": 3}
    for name in ("deepseek_v2", "deepseek_v3"):
        assert found[name]["dense"] == 3
        assert found[name]["attention"] >= 4
