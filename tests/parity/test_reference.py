"""The oracle: against finite differences and hand-made numbers, and how safe it says routing is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import batches, case, models, reference

SMALL = {
    "model.layers": 1,
    "model.heads": 4,
    "model.mlp_width": 8,
    "model.vocab": 7,
    "model.experts": 4,
    "model.expert_width": 4,
}


def small(dp: int, **fields: Any) -> case.Case:
    """Make a small case of `dp` ranks without folding."""
    return case.make({**SMALL, "shape.world": dp, **fields}, suite="s", file="f")


def evaluated(
    made: case.Case, weights: dict[str, Tensor] | None = None, **kwargs: Any
) -> tuple[reference.Evaluation, models.Tiny, dict[str, Tensor]]:
    """Evaluate the first step of a case at its initial weights, or at given ones."""
    model = models.build(made.model, 0, idle_expert=made.data.idle_expert)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    drawn = batches.make(made, made.layout.dp, 1, 0)
    for probes in (batch.probes for rank in drawn for batch in rank):
        if probes is not None:  # the last norm's is cut off from its input: no loss's gradient
            probes[:, -1] = 0.0
    return reference.evaluate(made, model, weights or own, drawn, **kwargs), model, own


OBJECTIVES = [
    {},
    {"engine.gas": 2, "auxiliary.load_balance": 0.3, "auxiliary.z_loss": 0.2},
    {"auxiliary.load_balance": 0.3, "auxiliary.scope": "global"},
    {"shape.world": 4, "shape.tp": 2, "data.lane_varying": True},
    {"model.tied": True, "model.biases": True, "model.shared_width": 4},
]


@pytest.mark.parametrize("fields", OBJECTIVES)
def test_the_gradient_is_that_of_the_loss_by_central_differences(fields: dict[str, Any]) -> None:
    """Along one random direction through all weights, at h = 1e-5: error h^2 and 1e-16 / h."""
    made = small(**{"dp": 2, **fields}) if "shape.world" not in fields else small(4, **fields)
    truth, _, weights = evaluated(made)
    assert set(truth.gradients) == set(weights)
    generator = torch.Generator().manual_seed(1)
    direction = {
        n: torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for n, w in weights.items()
    }
    h = 1e-5 / math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
    ends = [
        evaluated(made, {n: w + s * h * direction[n] for n, w in weights.items()})[0]
        for s in (1, -1)
    ]
    slope = sum(float((truth.gradients[n] * d).sum()) for n, d in direction.items())
    differences = (ends[0].loss - ends[1].loss) / (2 * h)
    size = truth.norm * math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
    # the load f is constant along the way: probabilities carry the auxiliary gradient alone
    assert abs(slope - differences) <= 1e-7 * size


def test_the_objective_is_the_mean_token_loss_over_all_ranks_and_micro_batches() -> None:
    """Uneven tokens: each token counts the same, not each rank."""
    made = small(3, **{"engine.gas": 2})
    truth, model, _ = evaluated(made)
    total, tokens = 0.0, 0
    for rank in batches.make(made, 3, 1, 0):
        for batch in rank:
            total += float(model(batch.input_ids, batch.labels, 1.0).detach())
            tokens += batch.input_ids.numel()
    assert truth.loss == pytest.approx(total / tokens, rel=1e-13)
    squares = sum(float(g.square().sum()) for g in truth.gradients.values())
    assert truth.norm == pytest.approx(math.sqrt(squares), rel=1e-14)


def test_routing_is_told_by_dp_rank_micro_batch_and_layer() -> None:
    """Shapes follow the uneven tokens; an idle expert appears nowhere and has zero gradient."""
    made = small(2, **{"engine.gas": 2})
    truth, _, _ = evaluated(made)
    drawn = batches.make(made, 2, 1, 0)
    for rank, row in zip(truth.routing, drawn, strict=True):
        assert [layers[0].shape for layers in rank] == [(b.input_ids.numel(), 2) for b in row]
    picks = torch.cat([layers[0] for rank in truth.routing for layers in rank])
    assert set(picks.flatten().tolist()) == {0, 1, 2}
    idle = truth.gradients["layers.0.moe.experts.w1"]
    assert not idle[3].any()
    assert all(idle[e].any() for e in range(3))


def test_the_routing_alone_is_that_of_the_whole_evaluation() -> None:
    """A forward chooses as forward and backward do."""
    made = small(2, **{"engine.gas": 2})
    truth, model, weights = evaluated(made)
    chosen = reference.routing(made, model, weights, batches.make(made, 2, 1, 0))
    for rank, expected in zip(chosen, truth.routing, strict=True):
        for layers, wanted in zip(rank, expected, strict=True):
            assert all(map(torch.equal, layers, wanted))
    assert len(chosen) == made.layout.dp


def test_a_parameter_that_is_not_used_has_a_zero_gradient() -> None:
    """Weights may name more than the model reads; None becomes zero."""
    made = small(1)
    _, _, weights = evaluated(made)
    unused = {**weights, "unused": torch.ones(3)}
    model = models.build(made.model, 0, idle_expert=True)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    drawn = batches.make(made, 1, 1, 0)
    assert not reference.evaluate(made, model, unused, drawn).gradients["unused"].any()


def test_weights_of_low_precision_are_taken_as_they_are() -> None:
    """bfloat16 weights give the truth at their rounded values, in float64."""
    made = small(1)
    low = {n: w.bfloat16() for n, w in evaluated(made)[2].items()}
    first, second = (
        evaluated(made, low)[0],
        evaluated(made, {n: w.double() for n, w in low.items()})[0],
    )
    assert first.loss == second.loss
    assert all(g.dtype == torch.float64 for g in first.gradients.values())


def test_a_replayed_routing_is_used_and_forgotten() -> None:
    """All tokens to experts 3 and 0: the idle expert has a gradient, the next evaluation not."""
    made = small(2)
    truth, model, weights = evaluated(made)
    forced = [
        [[torch.tensor([[3, 0]]).expand(len(layer), 2) for layer in micro] for micro in rank]
        for rank in truth.routing
    ]
    drawn = batches.make(made, 2, 1, 0)
    replayed = reference.evaluate(made, model, weights, drawn, forced)
    grads = replayed.gradients["layers.0.moe.experts.w1"]
    assert [bool(g.any()) for g in grads] == [True, False, False, True]
    again = reference.evaluate(made, model, weights, drawn)
    assert again.loss == truth.loss
    own = reference.evaluate(made, model, weights, drawn, truth.routing)
    assert own.loss == truth.loss


def test_a_tied_weight_has_the_gradient_of_both_its_uses() -> None:
    """Embedding and head apart, at the same values: their gradients add up to the tied one's."""
    tied, apart = small(1, **{"model.tied": True}), small(1)
    whole, _, weights = evaluated(tied)
    split, _, _ = evaluated(apart, {**weights, "head.weight": weights["embedding.weight"]})
    both = split.gradients["embedding.weight"] + split.gradients["head.weight"]
    torch.testing.assert_close(whole.gradients["embedding.weight"], both)


# ---------------------------------------------------------------- margin


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1.0), (2, 0.25), (3, 2.0), (4, math.inf)])
def test_the_margin_is_the_smallest_gap_behind_the_last_chosen(top_k: int, expected: float) -> None:
    """Two tokens: logits 4 3 2 0 and 3 2 1.75 -1, shuffled."""
    logits = torch.tensor([[2.0, 4.0, 0.0, 3.0], [1.75, -1.0, 3.0, 2.0]])
    assert reference.selection_margin(logits, top_k) == expected


def test_an_exact_tie_is_no_margin_unless_it_is_declared() -> None:
    """4 3 3 0: top 2 cuts the tie. Declared, what counts is 4 - 3 and 3 - 0."""
    logits = torch.tensor([[3.0, 4.0, 0.0, 3.0]])
    assert reference.selection_margin(logits, 2) == 0.0
    assert reference.selection_margin(logits, 2, ties=True) == 1.0
    near = torch.tensor([[3.0, 4.0, 0.0, 3.0 + 2**-20]])
    assert reference.selection_margin(near, 2, ties=True) == 2**-20


def test_the_evaluations_margin_is_the_smallest_of_all_tokens_and_layers() -> None:
    """Against the logits of the model itself, batch by batch."""
    made = small(2, **{"model.layers": 2})
    truth, model, _ = evaluated(made)
    gaps = []
    for rank in batches.make(made, 2, 1, 0):
        model(**rank[0].for_lane(0))
        for layer in models.moe_layers(model):
            top = layer.logits_TE.detach().topk(3).values
            gaps.append(float((top[:, 1] - top[:, 2]).min()))
    assert truth.margin == pytest.approx(min(gaps), rel=1e-12)


# ---------------------------------------------------------------- auxiliary losses by hand

LN2, LN3 = math.log(2.0), math.log(3.0)
FIRST = torch.tensor([[0.0, LN3]], dtype=torch.float64)
"""Rank 0, one token: softmax (1/4, 3/4), expert 1."""
SECOND = torch.tensor([[0.0, LN3], [LN2, 0.0], [LN3, 0.0]], dtype=torch.float64)
"""Rank 1, three tokens: (1/4, 3/4), (2/3, 1/3), (3/4, 1/4); experts 1, 0, 0."""
PICKS = [torch.tensor([[1]]), torch.tensor([[1], [0], [0]])]


def auxiliary(scope: str, balance: float, z: float) -> float:
    """Compute the loss of the two ranks above."""
    spec = case.Auxiliary(load_balance=balance, z_loss=z, scope=scope)
    return float(reference.auxiliary_loss(spec, "softmax", [FIRST, SECOND], PICKS))


def test_load_balance_of_each_scope_by_hand() -> None:
    """E sum f P: rank scope is the mean of 2 * 3/4 and 2 * (2/3 * 5/9 + 1/3 * 4/9) = 28/27.

    P of rank 1 is ((1/4 + 2/3 + 3/4) / 3, ...) = (5/9, 4/9). Global: f = (1/2, 1/2): exactly 1.
    """
    assert auxiliary("rank", 1.0, 0.0) == pytest.approx((3 / 2 + 28 / 27) / 2, rel=1e-14)
    assert auxiliary("global", 1.0, 0.0) == pytest.approx(1.0, rel=1e-14)


def test_z_loss_of_each_scope_by_hand() -> None:
    """logsumexp: ln 4 | ln 4, ln 3, ln 4. Rank: mean of means; global: mean over four tokens."""
    four, three = math.log(4) ** 2, math.log(3) ** 2
    assert auxiliary("rank", 0.0, 1.0) == pytest.approx((four + (2 * four + three) / 3) / 2)
    assert auxiliary("global", 0.0, 2.0) == pytest.approx(2 * (3 * four + three) / 4)


def test_sigmoid_scores_are_normalised_before_they_are_averaged() -> None:
    """Logits 0 and ln 3: sigmoid 1/2 and 3/4, probability 2/5 and 3/5; expert 1: 2 * 3/5."""
    spec = case.Auxiliary(load_balance=1.0)
    loss = reference.auxiliary_loss(spec, "sigmoid", [FIRST], PICKS[:1])
    assert float(loss) == pytest.approx(6 / 5, rel=1e-14)


# ---------------------------------------------------------------- shares


def test_the_shares_of_ranks_and_micro_batches_add_up_to_the_gradient() -> None:
    """Main and auxiliary parts of the case's own scope; tokens are counted."""
    both = {"auxiliary.load_balance": 0.3, "auxiliary.z_loss": 0.2}
    made = small(2, **{"engine.gas": 2, **both})
    truth, model, weights = evaluated(made)
    drawn = batches.make(made, 2, 1, 0)
    names = ["layers.0.moe.router.weight", "layers.0.moe.experts.w1", "head.weight"]
    found = reference.shares(made, model, weights, drawn, names, truth.routing)
    assert found.tokens == [[b.input_ids.numel() for b in rank] for rank in drawn]
    for name in names:
        parts = [found.main[r][m][name] for r in (0, 1) for m in (0, 1)]
        for loss in reference.AUXILIARY:
            parts += [found.auxiliary["rank", loss][r][m][name] for r in (0, 1) for m in (0, 1)]
        torch.testing.assert_close(torch.stack(parts).sum(0), truth.gradients[name])
