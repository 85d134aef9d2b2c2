"""What fold_impl hands to a harness: read back at the right moment, replayed, tapped, planted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fold_impl.adapter import FoldImplementation
from fold_impl.config import ConfigError
from fold_impl.points import POINTS
from parity import case, models
from parity.implementation import Implementation, RankContext
from parity.layout import Layout
from tests.worlds import run_ranks

SPEC = case.Model(layers=2, hidden=48, heads=4, mlp_width=8, vocab=8, experts=4, expert_width=4)
LR = 0.1


@dataclass(frozen=True)
class Context:
    """A world of one: no group can be asked for."""

    rank: int = 0
    layout: Layout = field(default_factory=lambda: Layout(1))
    new_group: Any = None


def written(**changes: Any) -> dict[str, Any]:
    """Write a config."""
    return {
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "folding": {"preset": models.preset(SPEC)},
        **changes,
    }


def tiny() -> models.Tiny:
    """Make the model."""
    return models.build(SPEC, 0, idle_expert=True)


def built(**changes: Any) -> FoldImplementation:
    """Build the implementation on one rank."""
    made = FoldImplementation()
    made.build(tiny(), written(**changes), Context())
    return made


def batch(seed: int, tokens: int = 5) -> dict[str, Any]:
    """Draw one micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(8, (2, 1, tokens), generator=generator)
    return {"input_ids": ids, "labels": labels, "loss_scale": 1 / tokens}


def naive(seeds: list[int]) -> tuple[list[float], dict[str, Tensor]]:
    """Give losses and mean gradient of the unfolded model."""
    model = tiny()
    losses = [model(**batch(seed)) for seed in seeds]
    leaves = dict(model.named_parameters())
    found = torch.autograd.grad(sum(losses) / len(losses), list(leaves.values()))
    return [float(x.detach()) for x in losses], dict(zip(leaves, found, strict=True))


def routing_of(made: FoldImplementation) -> list[list[Tensor]]:
    """Give the routing of the last step, of which nothing may be missing."""
    assert all(t is not None for layers in made.routing() for t in layers)
    return [[t for t in layers if t is not None] for layers in made.routing()]


def test_it_is_an_implementation_with_points_and_replay() -> None:
    """Structurally: no import of the harness is needed on its side."""
    made = FoldImplementation()
    assert isinstance(made, Implementation)
    assert made.name == "fold_impl"
    assert made.fault_points is POINTS
    assert all(callable(getattr(made, name)) for name in ("replay", "plant", "taps"))


def test_step_gives_each_micro_batchs_loss_before_the_division_by_gas() -> None:
    """gas 2: two losses, those of the naive model."""
    losses = built(gradient_accumulation_steps=2).step([batch(0), batch(1)])
    assert losses == [pytest.approx(x, rel=1e-13) for x in naive([0, 1])[0]]


def test_gradients_are_reduced_but_not_clipped_and_outlive_the_step() -> None:
    """A limit far below the norm changes weights, not the gradients handed over, nor the norm."""
    made = built(gradient_clipping=1e-3)
    before = {n: t.clone() for n, t in made.parameters().items()}
    made.step([batch(0)])
    expected = naive([0])[1]
    norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    for name, gradient in made.gradients().items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
        moved = made.parameters()[name] - before[name]
        assert float(moved.norm()) <= LR * 1e-3
    assert made.grad_norm() == pytest.approx(norm, rel=1e-12)


def test_placements_parameters_and_gradients_speak_of_the_same_names() -> None:
    """Every name of the original model, each with a family."""
    made = built()
    made.step([batch(0)])
    names = {name for name, _ in tiny().named_parameters()}
    assert set(made.placements()) == set(made.parameters()) == set(made.gradients()) == names
    assert made.placements()["layers.1.moe.router.weight"].family == "router"


def test_routing_is_that_of_the_last_step_by_micro_batch_and_layer() -> None:
    """Two micro-batches of 5 and 3 tokens, two layers, top 2; the next step replaces it."""
    made = built(gradient_accumulation_steps=2)
    made.step([batch(0), batch(1, tokens=3)])
    shapes = [[tuple(t.shape) for t in layers] for layers in routing_of(made)]
    assert shapes == [[(5, 2), (5, 2)], [(3, 2), (3, 2)]]
    made.step([batch(0, tokens=1), batch(1, tokens=2)])
    assert [layers[0].shape[0] for layers in routing_of(made)] == [1, 2]


def test_replay_forces_the_experts_until_it_is_taken_back() -> None:
    """All tokens to experts 2 and 0; None gives the own choice again."""
    made, own = built(), built()
    own.step([batch(0)])
    forced = torch.tensor([[2, 0]]).expand(5, 2)
    made.replay([[forced, forced]])
    made.step([batch(0)])
    assert all(torch.equal(t, forced) for t in routing_of(made)[0])
    idle = made.gradients()["layers.0.moe.experts.w1"]
    assert idle is not None
    assert [bool(g.any()) for g in idle] == [True, False, True, False]
    fresh = built()
    fresh.replay([[forced, forced]])
    fresh.replay(None)
    fresh.step([batch(0)])
    assert torch.equal(routing_of(fresh)[0][0], routing_of(own)[0][0])


def test_a_tap_records_what_passes_and_changes_nothing() -> None:
    """Logits of two layers in two micro-batches, detached copies; gradients as without."""
    made, plain = built(gradient_accumulation_steps=2), built(gradient_accumulation_steps=2)
    record = made.taps(["router.logits", "moe.restored"])
    for each in (made, plain):
        each.step([batch(0), batch(1)])
    assert [tuple(t.shape) for t in record["router.logits"]] == [(5, 4)] * 4
    assert [tuple(t.shape) for t in record["moe.restored"]] == [(5, 48)] * 4
    assert not any(t.requires_grad for t in record["router.logits"])
    for name, gradient in plain.gradients().items():
        other = made.gradients()[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


def test_a_planted_transformation_acts_from_the_first_step() -> None:
    """Logits times 2 halve no loss but change it; at another layer index they would not."""
    faulty = FoldImplementation()
    faulty.plant("router.logits", lambda logits, layer: 2 * logits if layer == 0 else logits)
    missed = FoldImplementation()
    missed.plant("router.logits", lambda logits, layer: 2 * logits if layer == 9 else logits)
    for made in (faulty, missed):
        made.build(tiny(), written(), Context())
    true = naive([0])[0][0]
    assert faulty.step([batch(0)])[0] != pytest.approx(true, rel=1e-6)
    assert missed.step([batch(0)])[0] == pytest.approx(true, rel=1e-13)


@pytest.mark.parametrize("call", ["plant", "taps"])
def test_an_unknown_point_is_refused(call: str) -> None:
    """A fault or tap at a point that does not exist would never act."""
    made = FoldImplementation()
    with pytest.raises(KeyError, match=r"no point 'router\.logit'"):
        made.taps(["router.logit"]) if call == "taps" else made.plant("router.logit", abs)


def test_a_refused_config_is_refused_in_build() -> None:
    """Alike on every rank, in the config's words."""
    with pytest.raises(ConfigError, match=r"tensor_parallel\.autotp_size = 2"):
        built(tensor_parallel={"autotp_size": 2})


def test_ranks_hand_over_their_own_parts_under_full_names() -> None:
    """World 2, tp 2, ep 2: halves of attention and experts, the whole router."""

    def work(runtime: Any) -> dict[str, tuple[int, ...]]:
        made = FoldImplementation()
        context = RankContext(
            runtime.rank, Layout(2, tp=2, ep=2), runtime.device, "threads", runtime.new_group
        )
        sections = {
            "tensor_parallel": {"autotp_size": 2},
            "expert_parallel": {"enabled": True, "autoep_size": 2},
        }
        made.build(tiny(), written(**sections), context)
        made.step([batch(0)])
        assert {n: t.shape for n, t in made.parameters().items()} == {
            n: t.shape for n, t in made.gradients().items() if t is not None
        }
        return {n: tuple(t.shape) for n, t in made.parameters().items()}

    for shapes in run_ranks(2, work):
        assert shapes["layers.0.attention.q.weight"] == (24, 48)
        assert shapes["layers.0.attention.o.weight"] == (48, 24)
        assert shapes["layers.0.moe.experts.w1"] == (2, 4, 48)
        assert shapes["layers.0.moe.router.weight"] == (4, 48)


def test_a_step_of_another_number_of_micro_batches_is_not_passed_over() -> None:
    """One micro-batch at gas 2 never reaches the boundary: stale gradients would be read."""
    made = built(gradient_accumulation_steps=2)
    made.step([batch(0), batch(1)])
    with pytest.raises(AssertionError, match="2"):
        made.step([batch(2)])


@pytest.mark.parametrize("point", ["dispatch.splits", "reduce.rule", "moe.restore", "norm.total"])
def test_a_tap_at_a_point_where_no_tensor_passes_does_not_break_the_step(point: str) -> None:
    """`explain --taps` may name any point of `fault_points`."""
    made = built()
    made.taps([point])
    made.step([batch(0)])
