"""Hugging Face models as cases: weights from the seed, no float32 in the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity import hugging_face
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
    return Model.model_validate({"name": name, "heads": 6})


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
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
    kept, module.weight = module.weight, identity  # type: ignore[assignment]
    hidden, module.hidden_dim = module.hidden_dim, logits_TE.shape[1]  # type: ignore[assignment]
    try:
        indices: Tensor = module(logits_TE)[2]
    finally:
        module.weight, module.hidden_dim = kept, hidden  # type: ignore[assignment]
    return indices
