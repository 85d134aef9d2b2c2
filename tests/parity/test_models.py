"""The small model: what its MoE computes, that nothing is cast down, and what is declared of it."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity import case, models

SPEC = case.Model(layers=2, hidden=48, heads=4, mlp_width=8, vocab=9, experts=6, expert_width=4)


def spec(**changes: Any) -> case.Model:
    """Give the small spec with some fields changed."""
    return SPEC.model_copy(update=changes)


def tokens(seed: int, length: int = 6) -> tuple[Tensor, Tensor]:
    """Draw one sequence of tokens and its labels."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(9, (2, 1, length), generator=generator)
    return ids, labels


def hand_made(top_k: int, **changes: Any) -> models.MoE:
    """Make a MoE whose output can be told by hand.

    Router logits are x0 * (0, ln 2, ln 3, ln 6): at x0 = 1 softmax gives (1, 2, 3, 6) / 12. Expert
    e maps entry 0 to (e + 1) * silu(x0) * x0 in entry 0.
    """
    layer = models.MoE(spec(experts=4, expert_width=1, top_k=top_k, **changes)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.router.weight[:, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0]).double().log()
        layer.experts.w1[:, 0, 0] = 1.0
        layer.experts.w3[:, 0, 0] = 1.0
        layer.experts.w2[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    return layer


ONE = 1 / (1 + math.exp(-1))
"""silu(1) * 1."""


@pytest.mark.parametrize(
    ("top_k", "changes", "expected"),
    [
        (1, {}, 4.0),  # the best expert alone, its weight divided by itself
        (1, {"normalize": False}, 4.0 * 6 / 12),
        (2, {}, (4 * 6 + 3 * 3) / 9),
        (2, {"normalize": False}, (4 * 6 + 3 * 3) / 12),
        (4, {}, (4 * 6 + 3 * 3 + 2 * 2 + 1) / 12),
        (1, {"score": "sigmoid", "normalize": False}, 4.0 * 6 / 7),
        (2, {"score": "sigmoid"}, (4 * 6 / 7 + 3 * 3 / 4) / (6 / 7 + 3 / 4)),
    ],
)
def test_the_moe_gives_the_weighted_sum_of_the_best_experts(
    top_k: int, changes: dict[str, Any], expected: float
) -> None:
    """One token, by hand: softmax (1, 2, 3, 6) / 12, sigmoid of ln n is n / (n + 1)."""
    layer = hand_made(top_k, **changes)
    x = torch.zeros(1, 1, 48, dtype=torch.float64)
    x[..., 0] = 1.0
    y = layer(x).detach()
    assert float(y[0, 0, 0]) == pytest.approx(expected * ONE, rel=1e-14)
    assert not y[0, 0, 1:].any()
    assert layer.indices_TK.tolist() == [[3, 2, 1, 0][:top_k]]


def test_forced_experts_replace_the_choice_and_their_scores_weigh_them() -> None:
    """Experts 0 and 1 of softmax (1, 2): (1 * 1 + 2 * 2) / 3."""
    layer = hand_made(2)
    layer.forced_TK = torch.tensor([[0, 1]])
    x = torch.zeros(1, 48, dtype=torch.float64)
    x[0, 0] = 1.0
    assert float(layer(x)[0, 0].detach()) == pytest.approx(5 / 3 * ONE, rel=1e-14)


def test_a_shared_expert_is_added_to_every_token_once() -> None:
    """With routed experts at zero the output is the shared expert's."""
    layer = hand_made(1, shared_width=4)
    assert layer.shared is not None
    with torch.no_grad():
        layer.experts.w2.zero_()
        for parameter in layer.shared.parameters():
            parameter.fill_(0.25)
    x = torch.linspace(0, 1, 96, dtype=torch.float64).view(2, 48)
    assert torch.equal(layer(x), layer.shared(x))
    assert layer.shared(x).any()


def test_ties_go_to_the_lowest_index() -> None:
    """Equal logits: experts 0 and 1; one larger: that one first."""
    assert models.best_experts(torch.zeros(1, 4), 2).tolist() == [[0, 1]]
    assert models.best_experts(torch.tensor([[0.0, 0.0, 0.0, 1e-9]]), 2).tolist() == [[3, 0]]


# ---------------------------------------------------------------- the whole model


class Watch(TorchFunctionMode):
    """Note every floating dtype that an operation gives other than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.low: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64:
            self.low.add(f"{func} -> {out.dtype}")
        return out


@pytest.mark.parametrize("changes", [{}, {"biases": True, "shared_width": 4, "score": "sigmoid"}])
def test_no_operation_leaves_float64(changes: dict[str, Any]) -> None:
    """A hidden downcast would cap every comparison at 6e-8."""
    model = models.build(spec(**changes), 0, idle_expert=True)
    ids, labels = tokens(0)
    with Watch() as watch:
        loss = model(ids, labels, 0.5, torch.zeros(3, 1, 6, 48, dtype=torch.float64))
    assert loss.dtype == torch.float64
    assert watch.low == set()


def test_the_watch_sees_a_downcast() -> None:
    """It would have seen `.float()` anywhere."""
    with Watch() as watch:
        torch.ones(2, dtype=torch.float64).float().double()
    assert len(watch.low) == 1


def test_the_loss_is_the_sum_of_token_losses_times_its_scale() -> None:
    """A zero head gives ln V per token: 6 tokens, scale 1/2, 3 ln 9."""
    model = models.build(SPEC, 0, idle_expert=True)
    with torch.no_grad():
        model.head.weight.zero_()
    assert float(model(*tokens(0), 0.5).detach()) == pytest.approx(3 * math.log(9), rel=1e-14)


def test_attention_does_not_see_the_future() -> None:
    """Changing the last token changes the last token's logits only."""
    model = models.build(SPEC, 0, idle_expert=True)
    attention = model.blocks()[0].attention
    x = torch.randn(1, 4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, -1] += 1.0
    first, second = attention(x), attention(other)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.allclose(first[:, -1], second[:, -1])


def test_a_probe_adds_its_product_with_every_moe_output_and_the_last_norm() -> None:
    """Linear in the probe; through the norm's input no gradient returns."""
    model = models.build(SPEC, 0, idle_expert=True)
    ids, labels = tokens(0)
    probe = torch.randn(
        3, 1, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    plain, one, two = (float(model(ids, labels, 1.0, p).detach()) for p in (None, probe, 2 * probe))
    assert two - plain == pytest.approx(2 * (one - plain), rel=1e-12)
    assert abs(one - plain) > 1e-3
    norm_only = probe.clone()
    norm_only[:2] = 0.0
    difference = model(ids, labels, 1.0, norm_only) - model(ids, labels, 1.0)
    names = dict(model.named_parameters())
    found = torch.autograd.grad(difference, list(names.values()), allow_unused=True)
    reached = {n for n, g in zip(names, found, strict=True) if g is not None and g.norm() > 1e-9}
    assert reached == {"norm.weight"}


def test_weights_depend_on_the_arguments_alone() -> None:
    """The global generator may stand anywhere; another seed gives other weights."""
    first = models.build(SPEC, 3, idle_expert=True)
    torch.rand(7)
    same, other = (models.build(SPEC, seed, idle_expert=True) for seed in (3, 4))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, same.get_parameter(name)), name
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_tied_head_is_the_embedding() -> None:
    """One parameter under the embedding's name."""
    model = models.build(spec(tied=True), 0, idle_expert=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 4, "biases": True}, {"score": "sigmoid", "shared_width": 4}]
)
def test_no_token_chooses_the_last_expert_when_it_shall_idle(
    seed: int, changes: dict[str, Any]
) -> None:
    """In every layer and for every seed; the others share the tokens."""
    model = models.build(spec(**changes), seed, idle_expert=True)
    ids = torch.arange(9).repeat(2).view(1, -1)
    model(ids, ids, 1.0)
    for layer in models.moe_layers(model):
        chosen = set(layer.indices_TK.flatten().tolist())
        assert 5 not in chosen
        assert len(chosen) >= 3


def test_without_idling_the_last_expert_is_chosen_like_any_other() -> None:
    """The near miss: over a few seeds it gets tokens."""
    ids = torch.arange(9).view(1, -1)
    chosen = set()
    for seed in range(3):
        model = models.build(SPEC, seed, idle_expert=False)
        model(ids, ids, 1.0)
        chosen |= set(models.moe_layers(model)[0].indices_TK.flatten().tolist())
    assert chosen == set(range(6))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_tied_experts_have_equal_logits_in_groups_of_three(biases: bool, idle: bool) -> None:
    """Experts 0 1 2 and 3 4 5 bit for bit; an idle last one leaves its group."""
    model = models.build(spec(biases=biases), 0, idle_expert=idle, ties=True)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)(*tokens(0), 1.0)
        for layer in models.moe_layers(model):
            logits = layer.logits_TE
            assert torch.equal(logits[:, 0], logits[:, 1])
            assert torch.equal(logits[:, 3], logits[:, 4])
            assert torch.equal(logits[:, 3], logits[:, 5]) is not idle
            assert not torch.equal(logits[:, 0], logits[:, 3])


# ---------------------------------------------------------------- what is declared


def test_the_preset_names_modules_and_parameters_that_exist() -> None:
    """Every pattern matches, every attribute is there."""
    full = spec(shared_width=4)
    preset, model = models.preset(full), models.build(full, 0, idle_expert=True)
    names = [name for name, _ in model.named_modules()]
    blocks = [model.get_submodule(n) for n in names if re.fullmatch(preset["moe"], n)]
    assert [n for n in names if re.fullmatch(preset["moe"], n)] == models.moe_names(full)
    for block in blocks:
        experts = block.get_submodule(preset["experts"])
        assert {n for n, _ in experts.named_parameters()} == {
            preset[key] for key in ("gate", "up", "down")
        }
        assert block.get_submodule(preset["router"]).get_parameter("weight").shape == (6, 48)
        assert isinstance(block.get_submodule(preset["shared_experts"]), nn.Module)
    for pattern in itertools.chain(preset["column"], preset["row"], preset["regions"]):
        assert any(re.search(rf"(^|\.)(?:{pattern})$", name) for name in names), pattern
    assert any(re.fullmatch(preset["attention"], name) for name in names)


@pytest.mark.parametrize(
    ("changes", "auxiliary", "expected"),
    [
        ({}, case.Auxiliary(), set()),
        ({"top_k": 1, "normalize": False}, case.Auxiliary(), set()),
        ({"top_k": 1}, case.Auxiliary(z_loss=0.1), set()),
        ({"top_k": 1}, case.Auxiliary(), {"moe.router.weight"}),
        ({"biases": True}, case.Auxiliary(), {"attention.k.bias"}),
        (
            {"top_k": 1, "biases": True},
            case.Auxiliary(),
            {"moe.router.weight", "moe.router.bias", "attention.k.bias"},
        ),
    ],
)
def test_structural_zeros_are_declared_and_nothing_else_is_zero(
    changes: dict[str, Any], auxiliary: case.Auxiliary, expected: set[str]
) -> None:
    """A key bias, and the router under one normalised expert: round-off only, all others not."""
    changed = spec(**changes)
    declared = models.structural_zeros(changed, auxiliary)
    assert declared == {f"layers.{layer}.{name}" for layer in (0, 1) for name in expected}
    model = models.build(changed, 0, idle_expert=True)
    loss = model(*tokens(0), 1.0)
    for layer in models.moe_layers(model):
        loss = loss + auxiliary.z_loss * layer.logits_TE.logsumexp(-1).square().mean()
    names = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()))
    sizes = {n: float(g.norm()) for n, g in zip(names, found, strict=True)}
    largest = max(sizes.values())
    assert {n for n, size in sizes.items() if size < 1e-12 * largest} == declared


def test_routing_can_be_forced_and_set_free_again() -> None:
    """One tensor per layer; None is the own choice; another number of layers is an error."""
    model = models.build(SPEC, 0, idle_expert=True)
    models.force_routing(models.gates(model), [torch.tensor([[0, 1]])] * 2)
    assert all(layer.forced_TK is not None for layer in models.moe_layers(model))
    models.force_routing(models.gates(model), [None, None])
    assert all(layer.forced_TK is None for layer in models.moe_layers(model))
    with pytest.raises(ValueError, match="shorter"):
        models.force_routing(models.gates(model), [None])


def test_a_scope_without_a_loss_brings_no_gradient_to_a_lone_routing_weight() -> None:
    """The weight of one expert a token is w / w = 1, whatever scope losses of size zero have."""
    spec = case.Model(top_k=1, normalize=True, layers=1)
    router = frozenset({"layers.0.moe.router.weight"})
    assert models.structural_zeros(spec, case.Auxiliary(scope="global")) == router
    assert not models.structural_zeros(spec, case.Auxiliary(scope="global", z_loss=0.1))
