"""The folded MoE layer against the naive one: output, input gradient, every parameter's gradient.

Each dp rank has its own number of tokens and each lane its own output gradient, so that the
objective is the mean over lanes and dp ranks and nothing about it is uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fold_impl.convert import fold
from fold_impl.families import FoldedParameter, Rule
from fold_impl.groups import FoldGroups
from fold_impl.layout import FoldLayout
from fold_impl.moe import FoldedMoE
from fold_impl.points import Points
from fold_impl.presets import Preset
from fold_impl.reduce import reduce_gradients
from fold_impl.router import AuxiliaryOptions
from parity import case, models
from parity.collect import assemble
from parity.implementation import Placement, Shard
from parity.layout import Layout
from tests.worlds import U, fold_groups, random, run_ranks

LIMIT = 64 * U
NO_LOSS = AuxiliaryOptions()
SPEC = case.Model(hidden=48, experts=8, expert_width=4, top_k=2, mlp_width=12, heads=12)


class Holder(nn.Module):
    """A model that is one MoE block under the name `moe`."""

    def __init__(self, spec: case.Model) -> None:
        super().__init__()
        self.moe = models.MoE(spec)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.moe(x)
        return y


def holder(spec: case.Model, *, idle: bool = True) -> Holder:
    """Make a block whose weights depend on the spec alone; idle: no token wants the last expert."""
    model = Holder(spec).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(scale * random(*parameter.shape, seed=seed))
        if idle:
            model.moe.router.weight[:, 0] = 0.0
            model.moe.router.weight[-1, 0] = -9.0
    return model


def preset(spec: case.Model) -> Preset:
    """Describe the block to fold_impl, by the models' own description."""
    return Preset.from_dict({**models.preset(spec), "moe": "moe"})


@dataclass(frozen=True)
class World:
    """One layout with the tokens of every dp rank."""

    layout: FoldLayout
    tokens: Sequence[int]
    spec: case.Model = SPEC
    auxiliary: AuxiliaryOptions = NO_LOSS

    def x(self, dp_rank: int) -> Tensor:
        """Give the (T, H) input of one dp rank; feature 0 is positive, the idle expert hates it."""
        x = random(self.tokens[dp_rank], self.spec.hidden, seed=100 + dp_rank)
        x[:, 0] = 1.0 + x[:, 0].abs()
        return x

    def cotangent(self, dp_rank: int, lane: int) -> Tensor:
        """Give the output gradient of one lane of one dp rank."""
        shape = self.tokens[dp_rank], self.spec.hidden
        return random(*shape, seed=1000 + 50 * dp_rank + lane)


@dataclass(frozen=True)
class Found:
    """Outputs, input gradients by (dp rank, lane) and full parameter gradients."""

    outputs: dict[tuple[int, int], Tensor]
    inputs: dict[tuple[int, int], Tensor]
    gradients: dict[str, Tensor]
    missing: dict[str, tuple[int, ...]]
    indices: dict[tuple[int, int], Tensor]


def truth(world: World) -> Found:
    """Evaluate the naive block on all tokens under the objective."""
    layout, model = world.layout, holder(world.spec)
    tp, dp = layout.tp_size, layout.dp_size
    inputs = [world.x(r).requires_grad_() for r in range(dp)]
    total = torch.zeros((), dtype=torch.float64)
    outputs: dict[tuple[int, int], Tensor] = {}
    indices: dict[tuple[int, int], Tensor] = {}
    for r, x in enumerate(inputs):
        y = model(x) if len(x) else x  # the naive loop needs a token
        mean = torch.stack([world.cotangent(r, lane) for lane in range(tp)]).mean(0)
        total = total + (y * mean).sum()
        outputs |= {(r, lane): y.detach() for lane in range(tp)}
        indices |= {(r, lane): model.moe.indices_TK for lane in range(tp) if len(x)}
    leaves = dict(model.named_parameters())
    found = torch.autograd.grad(total, [*inputs, *leaves.values()])
    by_rank = {(r, lane): found[r] for r in range(dp) for lane in range(tp)}
    gradients = {n: g / dp for n, g in zip(leaves, found[dp:], strict=True)}
    return Found(outputs, by_rank, gradients, {}, indices)


def folded(world: World, plant: Callable[[Points], None] | None = None) -> Found:
    """Run the folded block on every rank of the world and rebuild full gradients from shards."""
    results = run_ranks(world.layout.world_size, lambda runtime: one_rank(world, runtime, plant))
    layout = Layout(
        world.layout.world_size, world.layout.tp_size, world.layout.ep_size, world.layout.etp_size
    )
    at = [(layout.coordinate(r).dp, layout.coordinate(r).tp) for r in range(layout.world)]
    shards = [result["gradients"] for result in results]
    whole = assemble(layout, results[0]["placements"], shards)
    assert all(replica.entries == 0 for replica in whole.replicas.values()), whole.replicas
    return Found(
        {key: r["y"] for key, r in zip(at, results, strict=True)},
        {key: r["x"] for key, r in zip(at, results, strict=True)},
        dict(whole.filled),
        dict(whole.missing),
        {key: r["indices"] for key, r in zip(at, results, strict=True)},
    )


def one_rank(world: World, runtime: Any, plant: Callable[[Points], None] | None) -> dict[str, Any]:
    """Fold, run forward and backward with this lane's cotangent, reduce."""
    groups, points = fold_groups(runtime, world.layout), Points()
    if plant is not None:
        plant(points)
    model = holder(world.spec)
    parameters = fold(model, preset(world.spec), groups, world.auxiliary, points)
    x = world.x(groups.dp.index).requires_grad_()
    y = model(x)
    (y * world.cotangent(groups.dp.index, groups.tp.index)).sum().backward()
    assert all(p.parameter.grad is not None for p in parameters)
    reduce_gradients(parameters, groups, points)
    assert x.grad is not None
    layer = model.get_submodule("moe")
    assert isinstance(layer, FoldedMoE)
    assert layer.indices_TK is not None
    return {
        "y": y.detach(),
        "x": x.grad,
        "gradients": {p.name: p.parameter.grad for p in parameters},
        "placements": {p.name: as_theirs(p) for p in parameters},
        "indices": layer.indices_TK,
    }


def as_theirs(parameter: FoldedParameter) -> Placement:
    """Translate a placement for the harness's assembly."""
    cuts = (Shard(s.axis, s.dim, s.segments) for s in parameter.placement.shards)
    return Placement(parameter.family, tuple(cuts))


def error(actual: Tensor, expected: Tensor) -> float:
    """Give |actual - expected| / |expected|; of a zero expectation |actual|."""
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def errors(actual: Found, expected: Found) -> dict[str, float]:
    """Give the error of everything that can be wrong, by name."""
    found = {n: error(actual.gradients[n], g) for n, g in expected.gradients.items()}
    for name in ("outputs", "inputs"):
        mine, true = getattr(actual, name), getattr(expected, name)
        found[name] = max(error(mine[key], true[key]) for key in true)
    return found


def wrong(actual: Found, expected: Found) -> set[str]:
    """Name what is wrong."""
    return {name for name, size in errors(actual, expected).items() if not size <= LIMIT}


EXPERTS = {"moe.experts.w1", "moe.experts.w2", "moe.experts.w3"}

LAYOUTS = [
    # world, tp, ep, etp, tokens by dp rank
    (1, 1, 1, 1, [7]),
    (2, 2, 1, 1, [5]),
    (2, 1, 2, 1, [3, 6]),
    (4, 2, 4, 1, [5, 2]),  # an EP group over lanes and dp ranks
    (4, 4, 4, 1, [5]),  # shares of 2, 2, 1 and 0 tokens
    (4, 4, 2, 2, [1]),  # one token: three empty lanes
    (4, 2, 2, 2, [4, 3]),
    (4, 1, 1, 4, [2, 1, 3, 4]),  # expert slices over dp ranks
    (6, 3, 2, 1, [7, 2]),  # edp 3: ep neither divides nor is a multiple of tp
    (6, 2, 2, 1, [3, 0, 5]),  # a dp rank without a token
    (8, 2, 2, 2, [3, 1, 4, 2]),
]


@pytest.mark.parametrize(("world", "tp", "ep", "etp", "tokens"), LAYOUTS)
def test_the_folded_layer_is_the_naive_one_on_every_layout(
    world: int, tp: int, ep: int, etp: int, tokens: list[int]
) -> None:
    """Uneven and empty lanes, an idle expert, lane-varying consumers: all within 64 u."""
    cell = World(FoldLayout(world, tp, ep, etp), tokens)
    expected = truth(cell)
    found = folded(cell)
    assert wrong(found, expected) == set(), errors(found, expected)
    for key, indices in expected.indices.items():
        assert torch.equal(found.indices[key], indices)


def test_twenty_four_ranks_in_an_odd_shape_are_exact() -> None:
    """tp 4, dp 6; ep 3, etp 2, edp 4, twelve experts of width 4."""
    spec = SPEC.model_copy(update={"experts": 12})
    cell = World(FoldLayout(24, 4, 3, 2), [5, 2, 3, 1, 4, 6], spec)
    expected = truth(cell)
    found = folded(cell)
    assert wrong(found, expected) == set(), errors(found, expected)


OPTIONS = [
    {"top_k": 1, "normalize": False},
    {"top_k": 4},
    {"score": "sigmoid"},
    {"score": "sigmoid", "normalize": False},
    {"normalize": False},
    {"biases": True},
    {"shared_width": 6},
    {"shared_width": 6, "biases": True, "top_k": 4, "score": "sigmoid"},
]


@pytest.mark.parametrize(
    "changes", OPTIONS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())
)
def test_every_router_and_expert_option_is_the_naive_one(changes: dict[str, Any]) -> None:
    """Top-k 1, 2, 4, both scores, with and without normalising, biases, a shared expert."""
    cell = World(FoldLayout(4, 2, 2, 2), [5, 2], SPEC.model_copy(update=changes))
    expected = truth(cell)
    found = folded(cell)
    assert wrong(found, expected) == set(), errors(found, expected)


def test_top_one_with_normalised_weights_gives_the_router_round_off_only() -> None:
    """A structural zero: nothing to compare with, everything else exact."""
    cell = World(FoldLayout(4, 2, 4), [5, 2], SPEC.model_copy(update={"top_k": 1}))
    expected = truth(cell)
    found = folded(cell)
    assert wrong(found, expected) <= {"moe.router.weight"}
    scale = expected.gradients["moe.experts.w1"].norm()
    assert found.gradients["moe.router.weight"].norm() < LIMIT * scale


def test_an_idle_expert_has_a_zero_gradient_on_the_rank_that_owns_it() -> None:
    """Never None: the last expert's rows of w1 are zeros, its neighbour's are not."""
    found = folded(World(FoldLayout(4, 2, 4), [5, 2]))
    assert found.missing == {}
    assert not found.gradients["moe.experts.w1"][-1].any()
    assert found.gradients["moe.experts.w1"].any()


# ---------------------------------------------------------------- what each rule protects from

FAULTY = World(FoldLayout(4, 2, 4), [5, 2])


def planted(point: str, transform: Callable[..., Any], cell: World = FAULTY) -> set[str]:
    """Name what is wrong with a transformation planted."""
    return wrong(folded(cell, lambda points: points.plant(point, transform)), truth(cell))


def test_a_tap_changes_nothing() -> None:
    """Near miss of every fault below: planting the identity is no fault."""
    assert planted("moe.restored", lambda y, **_: y) == set()


@pytest.mark.parametrize(
    ("family", "rule", "hit"),
    [
        ("router", Rule.SUM, {"moe.router.weight"}),
        ("expert", Rule.EXPERT, EXPERTS),
        ("embedding", Rule.SUM, set()),
    ],
)
def test_a_wrong_reduction_rule_hits_its_family_alone(
    family: str, rule: Rule, hit: set[str]
) -> None:
    """SUM on the router, EXPERT on the experts: nothing else moves."""

    def change(right: Rule, **facts: Any) -> Rule:
        return rule if facts["family"] == family else right

    assert planted("reduce.rule", change) == hit


def own_rows_only(_: Any, group: Any, layer: int) -> Any:
    """Replace the restore by one whose backward keeps the own lane's gradient, times tp."""
    from fold_impl.dispatch import restore_combined, share_bounds

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, own: Tensor, tokens: int) -> Tensor:
            ctx.bounds = share_bounds(tokens, group)
            return restore_combined(own.detach(), tokens, group)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient[slice(*ctx.bounds)] * group.size, None

    return lambda own, tokens, _: Own.apply(own, tokens)


@dataclass(frozen=True)
class UniformWorld(World):
    """Every lane of a dp rank has the same consumer."""

    def cotangent(self, dp_rank: int, lane: int) -> Tensor:  # noqa: ARG002 - all lanes alike
        """Give lane 0's output gradient to all lanes."""
        return super().cotangent(dp_rank, 0)


def test_keeping_own_rows_in_the_restore_is_wrong_for_lane_varying_consumers() -> None:
    """Experts, router and input all lose what the other lanes contribute."""
    assert planted("moe.restore", own_rows_only) == {"moe.router.weight", "inputs", *EXPERTS}


def test_keeping_own_rows_in_the_restore_is_invisible_with_equal_lanes() -> None:
    """Why the matrix varies lanes: with one consumer for all, the fault has no effect."""
    cell = UniformWorld(FAULTY.layout, FAULTY.tokens)
    assert planted("moe.restore", own_rows_only, cell) == set()


def without_boundary(*_: Any, **__: Any) -> Any:
    """Replace the boundary by the identity."""
    return lambda x, _: x


def test_without_the_input_boundary_only_what_is_below_the_layer_is_wrong() -> None:
    """Fault input-grad-partial: the parameters of the layer itself do not see it."""
    assert planted("moe.input", without_boundary) == {"inputs"}


def test_rolled_experts_are_permuted_not_scaled() -> None:
    """Fault expert-index-roll: the output is wrong and with it everything behind."""
    hit = planted("router.indices", lambda i, **_: (i + 1) % SPEC.experts)
    assert {"outputs", *EXPERTS} <= hit


# ---------------------------------------------------------------- auxiliary loss


def aux_losses(scope: str) -> tuple[list[Tensor], Tensor]:
    """Give each rank's router gradient from the auxiliary loss alone, and the true one."""
    options = AuxiliaryOptions(load_balance=0.5, z_loss=0.1, scope=scope)
    cell = replace(FAULTY, auxiliary=options)

    def work(runtime: Any) -> Tensor:
        groups, points, model = fold_groups(runtime, cell.layout), Points(), holder(cell.spec)
        parameters = fold(model, preset(cell.spec), groups, options, points)
        model(cell.x(groups.dp.index))
        layer = model.get_submodule("moe")
        assert isinstance(layer, FoldedMoE)
        assert isinstance(layer.auxiliary, Tensor)
        layer.auxiliary.backward()
        reduce_gradients(parameters, groups, points)
        gradient = model.get_parameter("moe.router.weight").grad
        assert gradient is not None
        return gradient

    model = holder(cell.spec)
    logits, picks = [], []
    for r in range(cell.layout.dp_size):
        model(cell.x(r))
        logits.append(model.moe.logits_TE)
        picks.append(model.moe.indices_TK)
    from parity.reference import auxiliary_loss

    spec = case.Auxiliary(load_balance=0.5, z_loss=0.1, scope=scope)
    loss = auxiliary_loss(spec, "softmax", logits, picks)
    (true,) = torch.autograd.grad(loss, model.moe.router.weight)
    return run_ranks(cell.layout.world_size, work), true


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_the_auxiliary_loss_reaches_the_router_without_the_restores_factor(scope: str) -> None:
    """Its path never passes the restore: every lane has the whole gradient, AVERAGE keeps it."""
    gradients, true = aux_losses(scope)
    assert all(error(gradient, true) <= LIMIT for gradient in gradients)


def test_the_two_scopes_differ_on_uneven_tokens() -> None:
    """Otherwise the test above could not tell them apart."""
    assert error(aux_losses("rank")[1], aux_losses("global")[1]) > 1e-3


# ---------------------------------------------------------------- counting, replay


def test_the_dispatch_moves_every_assignment_once() -> None:
    """Rows sent by all ranks: T * K in all, not tp times as many; a lane drops the others' rows."""
    sent: list[int] = []

    def count(rows: Tensor, layer: int) -> Tensor:
        sent.append(len(rows))
        return rows

    folded(FAULTY, lambda points: points.plant("dispatch.rows", count))
    assert sum(sent) == (5 + 2) * SPEC.top_k
    assert sorted(sent) == [2 * 1, 2 * 1, 2 * 2, 2 * 3]  # shares: 3 and 2 of 5 tokens, 1 and 1 of 2


def test_forced_experts_replace_the_own_choice() -> None:
    """With replay every token goes to experts 0 and 3; only they get a gradient."""

    def work(runtime: Any) -> Tensor:
        groups: FoldGroups = fold_groups(runtime, FAULTY.layout)
        model = holder(SPEC)
        fold(model, preset(SPEC), groups, AuxiliaryOptions(), Points())
        layer = model.get_submodule("moe")
        assert isinstance(layer, FoldedMoE)
        x = FAULTY.x(groups.dp.index)
        layer.forced_TK = torch.tensor([[0, 3]]).expand(len(x), 2)
        model(x).sum().backward()
        gradient = model.get_parameter("moe.experts.w1").grad
        assert gradient is not None
        return gradient

    found = torch.cat(run_ranks(4, work))
    assert [bool(g.any()) for g in found] == [True, False, False, True, *[False] * 4]


def test_tokens_are_counted_where_it_is_asked_for_and_only_in_training() -> None:
    """Every forward that trains adds its assignments per expert; an idle expert counts 0."""

    def work(runtime: Any) -> Tensor:
        model = holder(SPEC)
        fold(model, preset(SPEC), fold_groups(runtime, FoldLayout(2, 2, 2)), NO_LOSS, Points())
        layer = model.moe
        assert isinstance(layer, FoldedMoE)
        layer.load_E = torch.zeros(SPEC.experts, dtype=torch.int64)
        x, forced_TK = random(3, SPEC.hidden, seed=3), torch.tensor([[0, 2], [2, 3], [2, 0]])
        layer.forced_TK = forced_TK
        model(x)
        model(x)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        return layer.load_E

    for load_E in run_ranks(2, work):
        assert load_E.tolist() == [4, 0, 6, 2, 0, 0, 0, 0]


def test_routing_weights_of_a_higher_precision_leave_the_output_in_the_models() -> None:
    """A gate that works in float64 beside a float32 model: the layer's output stays float32."""

    def work(runtime: Any) -> torch.dtype:
        model = holder(SPEC).float()
        model.moe.router = OwnGate(model.moe.router)  # type: ignore[assignment]
        table = {**models.preset(SPEC), "moe": "moe", "top_k": None}
        groups = fold_groups(runtime, FoldLayout(2, 2, 2))
        fold(model, Preset.from_dict(table), groups, NO_LOSS, Points())
        dtype: torch.dtype = model(random(3, SPEC.hidden, seed=3).float()).dtype
        return dtype

    assert run_ranks(2, work) == [torch.float32] * 2


def test_the_shape_of_the_input_is_kept() -> None:
    """(B, S, H) in, (B, S, H) out, the same numbers as for (B * S, H)."""

    def work(runtime: Any) -> tuple[Tensor, Tensor]:
        model = holder(SPEC)
        groups = fold_groups(runtime, FoldLayout(2, 2, 2))
        fold(model, preset(SPEC), groups, AuxiliaryOptions(), Points())
        x = random(6, SPEC.hidden, seed=3)
        return model(x).detach(), model(x.view(2, 3, -1)).detach()

    for flat, batched in run_ranks(2, work):
        assert batched.shape == (2, 3, SPEC.hidden)
        assert torch.equal(batched.view(6, -1), flat)


class OwnGate(nn.Module):
    """A model's own gate: logits, weights and indices at once, as in Hugging Face models."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight = router.get_parameter("weight")

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose by softmax, normalised over the chosen two."""
        logits_TE = nn.functional.linear(x_TH, self.weight).double()
        weights_TK, indices_TK = logits_TE.softmax(-1).topk(2)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), indices_TK


def test_a_models_own_gate_is_asked_instead_of_ours() -> None:
    """top_k None keeps the gate module; output and gradients are those of the same choice."""

    def work(runtime: Any) -> dict[str, Tensor]:
        groups, model = fold_groups(runtime, FoldLayout(2, 2, 2)), holder(SPEC)
        gate = OwnGate(model.moe.router)
        model.moe.router = gate  # type: ignore[assignment]
        table = {**models.preset(SPEC), "moe": "moe", "top_k": None}
        parameters = fold(model, Preset.from_dict(table), groups, AuxiliaryOptions(), Points())
        assert model.get_submodule("moe.router") is gate
        y = model(cell.x(0))
        (y * cell.cotangent(0, groups.tp.index)).sum().backward()
        reduce_gradients(parameters, groups, Points())
        gradient = model.get_parameter("moe.router.weight").grad
        assert gradient is not None
        return {"y": y.detach(), "router": gradient}

    cell = World(FoldLayout(2, 2, 2), [5])
    expected = truth(cell)
    for found in run_ranks(2, work):
        assert error(found["y"], expected.outputs[0, 0]) <= LIMIT
        assert error(found["router"], expected.gradients["moe.router.weight"]) <= LIMIT
