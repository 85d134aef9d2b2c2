"""Hugging Face models as cases: weights from the seed, no float32 in the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity import batches, case, hugging_face, models, reference
from parity.case import Model

pytest.importorskip("transformers", reason="transformers is in the extra `models`")
NAMES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")


class LowPrecision(TorchDispatchMode):
    """Collect the operators that make a floating tensor below float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize < 8:
                self.seen.add(str(func))
        return out


def spec(name: str) -> Model:
    """Give a tiny model whose heads three and two lanes can share."""
    return Model.model_validate({"name": name, "heads": 6})


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw one sequence of nine tokens and its labels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(37, (2, 1, 9), generator=generator)
    return drawn[0], drawn[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_low_precision_tensor_appears_when_lifted(name: str) -> None:
    """Forward and backward of the lifted reference make float64 tensors only."""
    balance = 0.02 if name in ("mixtral", "qwen3_moe") else 0.0
    model = hugging_face.build(spec(name), 0, idle_expert=True, load_balance=balance)
    with hugging_face.lifted(), LowPrecision() as watch:
        loss = model(*tokens(), 0.1)
        loss.backward()
    assert watch.seen == set()
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_without_lifting_float32_does_appear(name: str) -> None:
    """The watch trips on the models' own casts, so the test above can fail."""
    model = hugging_face.build(spec(name), 0, idle_expert=True)
    with LowPrecision() as watch:
        model(*tokens(), 0.1)
    assert watch.seen


@pytest.mark.parametrize("name", NAMES)
def test_last_expert_is_idle(name: str) -> None:
    """No token of any MoE layer chooses the last expert, all choose top_k of the others."""
    model = hugging_face.build(spec(name), 3, idle_expert=True)
    with hugging_face.lifted():
        model(*tokens(3), 0.1)
    assert len(model.gates) == (2 if name == "mixtral" else 1)
    for gate in model.gates:
        assert gate.indices_TK.shape == (9, 2)
        assert int(gate.indices_TK.max()) < 11


@pytest.mark.parametrize("name", NAMES)
def test_margin_bounds_the_logit_change_that_flips_a_token(name: str) -> None:
    """Moving every logit by less than half the margin leaves the choice as it is."""
    model = hugging_face.build(spec(name), 1, idle_expert=True)
    with hugging_face.lifted():
        model(*tokens(1), 0.1)
    gate = model.gates[0]
    margin, before = gate.margin(), gate.indices_TK.sort(-1).values
    logits_TE = gate.logits_TE.detach()  # asking the gate again overwrites what it remembers
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        noise = torch.rand(logits_TE.shape, generator=generator, dtype=torch.float64) - 0.5
        with hugging_face.lifted():
            shifted = _choose(gate, logits_TE + 0.99 * margin * noise)
        assert torch.equal(shifted.sort(-1).values, before)


def _choose(gate: hugging_face.Gate, logits_TE: Tensor) -> Tensor:
    """Let the model's own gate choose from given logits: inputs are the logits, weights one."""
    module = gate.module
    identity = torch.nn.Parameter(torch.eye(logits_TE.shape[1], dtype=torch.float64))
    kept, module.weight = module.weight, identity
    hidden = module.hidden_dim
    setattr(module, "hidden_dim", logits_TE.shape[1])  # noqa: B010 - typed as a submodule
    try:
        indices: Tensor = module(logits_TE)[2]
    finally:
        module.weight = kept
        setattr(module, "hidden_dim", hidden)  # noqa: B010 - typed as a submodule
    return indices


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_made_near_by_trails_by_no_more_than_the_logits_moved(name: str) -> None:
    """Whatever the model's own gate chooses from logits that are up to 0.8 apart is no far choice.

    The idle expert in the place of a chosen one is.
    """
    model = hugging_face.build(spec(name), 1, idle_expert=True)
    with hugging_face.lifted():
        model(*tokens(1), 0.1)
    gate = model.gates[-1]
    logits_TE, own = gate.logits_TE.detach(), gate.indices_TK
    generator = torch.Generator().manual_seed(7)
    flips = 0
    for _ in range(40):
        noise = torch.rand(logits_TE.shape, generator=generator, dtype=torch.float64) - 0.5
        with hugging_face.lifted():
            near = _choose(gate, logits_TE + 0.8 * noise)
        gate.logits_TE, gate.indices_TK = logits_TE, near
        assert gate.margin() >= -0.8
        flips += not torch.equal(near.sort(-1).values, own.sort(-1).values)
    assert flips > 5
    gate.indices_TK = own.clone()
    gate.indices_TK[4, 1] = 11
    assert gate.margin() < -0.8


@pytest.mark.parametrize("name", NAMES)
def test_forcing_its_own_choice_changes_nothing(name: str) -> None:
    """Loss (a load-balance loss included) and gradients are those of the free gate."""
    balance = 0.5 if name in ("mixtral", "qwen3_moe") else 0.0
    model = hugging_face.build(spec(name), 2, idle_expert=True, load_balance=balance)
    with hugging_face.lifted():
        free = model(*tokens(2), 0.1)
        wanted = torch.autograd.grad(free, list(model.parameters()))
        for gate in model.gates:
            gate.forced_TK = gate.indices_TK
        forced = model(*tokens(2), 0.1)
        found = torch.autograd.grad(forced, list(model.parameters()))
    assert float(forced.detach()) == pytest.approx(float(free.detach()), rel=1e-14)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_forced_experts_are_used_and_their_lead_is_told() -> None:
    """Another choice gives another loss, is what the gate remembers, and trails by the margin."""
    model = hugging_face.build(spec("mixtral"), 2, idle_expert=True, load_balance=0.5)
    gate = model.gates[-1]
    with hugging_face.lifted():
        free = float(model(*tokens(2), 0.1).detach())
        assert gate.margin() > 0
        other = gate.indices_TK.clone()
        other[4, 1] = 11  # the idle expert: the last one anybody would choose
        gate.forced_TK = other
        assert float(model(*tokens(2), 0.1).detach()) != free
    assert torch.equal(gate.indices_TK, other)
    logits = gate.logits_TE[4].detach()
    left = logits[[e for e in range(12) if e not in other[4].tolist()]].max()
    assert gate.margin() == pytest.approx(float(logits[11] - left))


def test_a_forced_choice_is_also_the_load_balance_losss() -> None:
    """The logits handed on have the forced experts on top, and are the gate's own elsewhere."""
    model = hugging_face.build(spec("mixtral"), 2, idle_expert=True)
    gate = model.gates[0]
    gate.logits_TE = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    lifted = gate._lifted(torch.tensor([[0, 2]]))
    assert lifted.topk(2).indices.sort().values.tolist() == [[0, 2]]
    assert lifted.tolist()[0] == pytest.approx([3.0, 2.0, 2.0], abs=1e-8)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_the_shares_of_a_forced_choice_add_up_too(name: str) -> None:
    """Where the choices are not the gates' own, the shares are those of the same choices."""
    made = case.make(
        {"model.name": name, "model.heads": 6, "model.layers": 2, "shape.world": 2},
        suite="s", file="f",
    )  # fmt: skip
    model = models.build_for(made, 0)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    drawn = batches.make(made, 2, 1, 0)
    free = reference.evaluate(made, model, weights, drawn)
    forced = [[[t.clone() for t in layers] for layers in rank] for rank in free.routing]
    forced[0][0][0][0, 0] = made.model.experts - 1  # the idle one
    truth = reference.evaluate(made, model, weights, drawn, forced)
    names = [n for n in weights if n.endswith("gate.weight")]
    found = reference.shares(made, model, weights, drawn, names, truth.routing)
    for router in names:
        total = torch.stack([part[router] for rank in found.main for part in rank]).sum(0)
        torch.testing.assert_close(total, truth.gradients[router])
        assert not torch.allclose(total, free.gradients[router])
