"""Who goes where and with which weight, and the auxiliary losses, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from fold_impl.router import (
    CORRECTION_BIAS,
    AuxiliaryOptions,
    Choice,
    Router,
    RouterOptions,
    auxiliary_loss,
    choose,
)
from tests.worlds import alone, fold_groups, random, run_ranks

LN2, LN3 = math.log(2.0), math.log(3.0)
LOGITS = torch.tensor([[0.0, LN2, LN3], [LN3, 0.0, LN2]], dtype=torch.float64)
"""Softmax: (1, 2, 3) / 6 and (3, 1, 2) / 6; sigmoid: (1/2, 2/3, 3/4) and (3/4, 1/2, 2/3)."""


def pick(
    logits: Tensor, top_k: int, score: str = "softmax", normalize: bool = True, **kwargs: Any
) -> Choice:
    """Choose with nothing planted."""
    options = RouterOptions(top_k, score, normalize)
    forced, bias = kwargs.get("forced"), kwargs.get("bias")
    return choose(logits, options, forced, lambda _, value: value, bias)


def test_weights_add_up_to_one_unless_it_is_said_that_they_do_not() -> None:
    """The default of Mixtral and of the small model."""
    choice = choose(LOGITS, RouterOptions(2), None, lambda _, value: value)
    assert choice.weights_TK.sum(-1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("score", "normalize", "expected"),
    [
        ("softmax", True, [[3 / 5, 2 / 5], [3 / 5, 2 / 5]]),
        ("softmax", False, [[3 / 6, 2 / 6], [3 / 6, 2 / 6]]),
        ("sigmoid", False, [[3 / 4, 2 / 3], [3 / 4, 2 / 3]]),
        ("sigmoid", True, [[9 / 17, 8 / 17], [9 / 17, 8 / 17]]),
    ],
)
def test_the_largest_logits_are_chosen_best_first_and_weighted(
    score: str, normalize: bool, expected: list[list[float]]
) -> None:
    """Top 2 of three experts, all four ways to weigh them."""
    choice = pick(LOGITS, 2, score, normalize)
    assert choice.indices_TK.tolist() == [[2, 1], [0, 2]]
    torch.testing.assert_close(choice.weights_TK, torch.tensor(expected, dtype=torch.float64))


def test_a_correction_bias_changes_the_choice_and_not_the_weights() -> None:
    """Sigmoid (1/2, 2/3, 3/4) + (1/2, 0, -1/4) puts expert 0 first and drops 2; weights as ever."""
    bias = torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64)
    choice = pick(LOGITS[:1], 2, "sigmoid", False, bias=bias)
    assert choice.indices_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(choice.weights_TK[0].tolist(), [1 / 2, 2 / 3])


def test_on_a_tie_the_lowest_index_wins_and_the_least_difference_breaks_it() -> None:
    """Four equal logits give experts 0 and 1; one unit in the last place more gives 3 and 0."""
    equal = torch.ones(1, 4, dtype=torch.float64)
    assert pick(equal, 2).indices_TK.tolist() == [[0, 1]]
    equal[0, 3] = math.nextafter(1.0, 2.0)
    assert pick(equal, 2).indices_TK.tolist() == [[3, 0]]


def test_forced_experts_are_weighted_by_their_own_scores() -> None:
    """Replay takes the indices, the weights and their gradient still come from the logits."""
    logits = LOGITS.clone().requires_grad_()
    choice = pick(logits, 2, normalize=False, forced=torch.tensor([[0, 1], [0, 1]]))
    torch.testing.assert_close(
        choice.weights_TK.detach(), torch.tensor([[1, 2], [3, 1]], dtype=torch.float64) / 6
    )
    assert torch.autograd.grad(choice.weights_TK[0, 0], logits)[0][0].abs().sum() > 0


def test_the_gradient_of_a_single_normalised_weight_is_nothing() -> None:
    """w / w = 1: with top-1 the main loss does not reach the router, unless not normalised."""
    logits = random(5, 4, seed=1).requires_grad_()
    probe = random(5, 1, seed=2)
    (normalised,) = torch.autograd.grad((pick(logits, 1).weights_TK * probe).sum(), logits)
    plain = pick(logits, 1, normalize=False).weights_TK
    assert normalised.abs().max() < 1e-15
    assert torch.autograd.grad((plain * probe).sum(), logits)[0].norm() > 1e-2


# ---------------------------------------------------------------- auxiliary losses

CHOSEN = torch.tensor([[2], [0]])
"""Top 1 of LOGITS: loads (1, 0, 1) of 2 tokens; mean probability (4, 3, 5) / 12."""
BALANCE = 3 * (0.5 * 4 / 12 + 0.5 * 5 / 12)
"""E * sum_e f_e P_e."""
Z = math.log(6.0) ** 2
"""logsumexp of both rows is ln(1 + 2 + 3)."""


def auxiliary(
    logits: Tensor, indices: Tensor, options: AuxiliaryOptions, dp: Any = None, **kwargs: Any
) -> Tensor:
    """Compute the loss of one layer."""
    router = RouterOptions(indices.shape[1], kwargs.get("score", "softmax"))
    choice = Choice(logits, indices, torch.empty(0))
    points = kwargs.get("points", Points())
    return auxiliary_loss(choice, router, options, dp or alone().dp, points, layer=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (AuxiliaryOptions(load_balance=1.0), BALANCE),
        (AuxiliaryOptions(z_loss=1.0), Z),
        (AuxiliaryOptions(load_balance=0.5, z_loss=0.25, scope="global"), BALANCE / 2 + Z / 4),
    ],
)
def test_auxiliary_losses_of_two_tokens_by_hand(options: AuxiliaryOptions, expected: float) -> None:
    """Coefficients times E * sum f P and mean logsumexp^2; on one rank scopes agree."""
    assert options.active
    assert float(auxiliary(LOGITS, CHOSEN, options)) == pytest.approx(expected, rel=1e-15)


def test_load_counts_assignments_over_tokens_as_hugging_face_does() -> None:
    """With top 2 a perfectly even load is K = 2, not 1."""
    even = torch.zeros(2, 4, dtype=torch.float64)
    indices = torch.tensor([[0, 1], [2, 3]])
    assert float(auxiliary(even, indices, AuxiliaryOptions(load_balance=1.0))) == pytest.approx(2)


def test_sigmoid_scores_become_probabilities_before_they_are_averaged() -> None:
    """Rows (1/2, 2/3, 3/4) sum to 23/12: probability of expert 2 is 9/23 in the first row."""
    one = auxiliary(LOGITS[:1], CHOSEN[:1], AuxiliaryOptions(load_balance=1.0), score="sigmoid")
    assert float(one) == pytest.approx(3 * 9 / 23, rel=1e-15)


def test_inactive_means_both_coefficients_are_zero() -> None:
    """The scope alone asks for nothing."""
    assert not AuxiliaryOptions(scope="global").active


def global_and_rank(scope: str) -> tuple[list[float], list[Tensor], Tensor, float]:
    """Compute shares of two dp ranks x two lanes with 3 and 5 tokens, and the truth over all 8.

    Returns:
        Loss and logit gradient of every rank, gradient and value of the loss over all tokens.
    """
    options = AuxiliaryOptions(load_balance=0.7, z_loss=0.3, scope=scope)
    logits = random(8, 4, seed=5)
    indices = logits.topk(2).indices
    rows = [slice(0, 3), slice(3, 8)]

    def work(runtime: Any) -> tuple[float, Tensor]:
        groups = fold_groups(runtime, FoldLayout(4, tp_size=2))
        mine = rows[groups.dp.index]
        own = logits[mine].clone().requires_grad_()
        loss = auxiliary(own, indices[mine], options, groups.dp)
        return float(loss.detach()), torch.autograd.grad(loss, own)[0]

    found = run_ranks(4, work)
    whole = logits.clone().requires_grad_()
    truth = auxiliary(whole, indices, options)
    (gradient,) = torch.autograd.grad(truth, whole)
    return [f[0] for f in found], [f[1] for f in found], gradient, float(truth.detach())


def test_global_scope_is_the_loss_over_the_tokens_of_all_dp_ranks() -> None:
    """The mean of the dp shares is the whole loss, the gradient dp times the whole one's rows."""
    losses, gradients, whole, truth = global_and_rank("global")
    assert (losses[0] + losses[2]) / 2 == pytest.approx(truth, rel=1e-14)
    torch.testing.assert_close(torch.cat([gradients[0], gradients[2]]) / 2, whole)


def test_lanes_of_one_dp_rank_have_the_same_loss_and_are_not_added_up() -> None:
    """Lanes route the same tokens: counting them twice would leave f as it is but double T."""
    losses, gradients, _, _ = global_and_rank("global")
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    assert torch.equal(gradients[2], gradients[3])


def test_rank_scope_on_uneven_tokens_is_another_loss() -> None:
    """The near miss aux-per-rank: with local counts the mean of the shares is not the whole's."""
    losses, _, _, truth = global_and_rank("rank")
    assert abs((losses[0] + losses[2]) / 2 - truth) > 1e-3 * abs(truth)


def test_points_see_load_tokens_and_loss_and_may_change_them() -> None:
    """Doubling the load doubles the balance loss; the tap of the tokens reads 2."""
    points = Points()
    seen: dict[str, float] = {}
    points.plant("auxiliary.load", lambda load, **_: 2 * load)
    points.plant("auxiliary.tokens", lambda n, **_: seen.setdefault("tokens", float(n)))
    loss = auxiliary(LOGITS, CHOSEN, AuxiliaryOptions(load_balance=1.0), points=points)
    assert float(loss) == pytest.approx(2 * BALANCE)
    assert seen == {"tokens": 2.0}


def test_the_router_is_a_linear_map_that_adopts_the_given_parameters() -> None:
    """Logits x W^T + b; the parameters are the same objects, so ties and optimizers hold."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    bias = nn.Parameter(torch.tensor([0.5, 0.0]))
    router = Router(weight, bias)
    assert router(torch.tensor([[3.0, 1.0]])).tolist() == [[5.5, -1.0]]
    assert router.weight is weight
    assert router.bias is bias
    assert Router(weight, None)(torch.tensor([[3.0, 1.0]])).tolist() == [[5.0, -1.0]]


def test_a_correction_bias_is_saved_with_the_router_and_is_no_parameter() -> None:
    """As Hugging Face keeps it: a buffer, in the state dict, that no optimizer moves."""
    weight, correction_E = nn.Parameter(torch.zeros(2, 3)), torch.tensor([0.25, -0.25])
    router = Router(weight, None, correction_E)
    assert dict(router.named_buffers()) == {CORRECTION_BIAS: correction_E}
    assert set(router.state_dict()) == {"weight", CORRECTION_BIAS}
    assert [*Router(weight, None).state_dict()] == ["weight"]


def test_counts_of_many_tokens_are_exact_in_low_precision() -> None:
    """513 tokens: bfloat16 has no 513, nor 257 of them on one expert."""
    tokens = 513
    logits_TE = random(tokens, 4, seed=3)
    indices_TK = torch.zeros(tokens, 1, dtype=torch.int64)
    choice = Choice(logits_TE.bfloat16(), indices_TK, torch.ones(tokens, 1))
    options = AuxiliaryOptions(load_balance=1.0)
    loss = auxiliary_loss(choice, RouterOptions(1), options, alone().dp, Points(), 0)
    expected = 4 * float(logits_TE.bfloat16().double().softmax(-1)[:, 0].mean())
    assert loss.dtype is torch.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)
