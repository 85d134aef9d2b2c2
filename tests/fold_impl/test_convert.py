"""An ordinary model becomes a folded one: names, families, cuts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fold_impl.config import ConfigError
from fold_impl.convert import cut, fold
from fold_impl.dispatch import scatter_share
from fold_impl.families import FoldedParameter, Shard
from fold_impl.groups import FoldGroups, Group, build_groups
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from fold_impl.presets import Preset
from fold_impl.reduce import reduce_gradients
from fold_impl.router import AuxiliaryOptions
from fold_impl.tensor_parallel import RowParallelLinear, leave_lanes
from parity import case, models
from tests.worlds import alone, fold_groups, random, run_ranks

SPEC = case.Model(
    layers=1, hidden=48, heads=4, mlp_width=8, vocab=8, experts=4, expert_width=4, shared_width=4
)


def tiny(**changes: Any) -> models.Tiny:
    """Make the small model of the harness."""
    return models.build(SPEC.model_copy(update=changes), 0, idle_expert=False)


def described(**changes: Any) -> dict[str, Any]:
    """Give the model's own description of itself as a preset."""
    return {**models.preset(SPEC), **changes}


def groups_of(layout: FoldLayout, rank: int) -> FoldGroups:
    """Make groups without communicating: converting a model takes none."""
    return build_groups(layout, rank, tuple)


def convert(
    model: nn.Module, layout: FoldLayout | None = None, rank: int = 0, **changes: Any
) -> dict[str, FoldedParameter]:
    """Fold a model for one rank and give its parameters by name."""
    groups = groups_of(layout or FoldLayout(1), rank)
    preset = Preset.from_dict(described(**changes))
    parameters = fold(model, preset, groups, AuxiliaryOptions(), Points())
    return {parameter.name: parameter for parameter in parameters}


# ---------------------------------------------------------------- names, families, cuts

E = (Shard("ep", 0), Shard("etp", 1))
TABLE = {
    "embedding.weight": ("embedding", ()),
    "layers.0.attention_norm.weight": ("layernorm", ()),
    "layers.0.attention_norm.bias": ("layernorm", ()),
    "layers.0.attention.q.weight": ("attention", (Shard("tp", 0),)),
    "layers.0.attention.q.bias": ("attention", (Shard("tp", 0),)),
    "layers.0.attention.o.weight": ("attention", (Shard("tp", 1),)),
    "layers.0.attention.o.bias": ("attention", ()),
    "layers.0.mlp.w1.weight": ("dense", (Shard("tp", 0),)),
    "layers.0.mlp.w2.weight": ("dense", (Shard("tp", 1),)),
    "layers.0.mlp.w2.bias": ("dense", ()),
    "layers.0.moe.router.weight": ("router", ()),
    "layers.0.moe.router.bias": ("router", ()),
    "layers.0.moe.experts.w1": ("expert", E),
    "layers.0.moe.experts.w3": ("expert", E),
    "layers.0.moe.experts.w2": ("expert", (Shard("ep", 0), Shard("etp", 2))),
    "layers.0.moe.shared.w3.weight": ("shared_expert", (Shard("tp", 0),)),
    "layers.0.moe.shared.w2.weight": ("shared_expert", (Shard("tp", 1),)),
    "layers.0.moe.shared.w2.bias": ("shared_expert", ()),
    "norm.weight": ("layernorm", ()),
    "head.weight": ("dense", ()),
}


def test_every_parameter_keeps_its_name_and_has_a_family_and_cuts() -> None:
    """Names of the original model, none lost and none new; families and cuts by hand."""
    names = [name for name, _ in tiny(biases=True).named_parameters()]
    found = convert(tiny(biases=True), FoldLayout(8, 2, 2, 2))
    assert set(found) == set(names)
    for name, (family, shards) in TABLE.items():
        assert (found[name].family, found[name].placement.shards) == (family, shards), name


def test_names_and_order_are_the_same_on_every_rank() -> None:
    """Buckets are filled in this order: another one would add up different parameters."""
    layout = FoldLayout(8, 2, 2, 2)
    orders = [list(convert(tiny(), layout, rank)) for rank in range(8)]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("rank", range(8))
def test_a_rank_keeps_its_own_part_of_every_cut_weight(rank: int) -> None:
    """World 8, tp ep etp 2: lane r % 2, ep rank r // 2 % 2, expert slice r % 2."""
    full, found = dict(tiny().named_parameters()), convert(tiny(), FoldLayout(8, 2, 2, 2), rank)
    lane, ep, etp = rank % 2, rank // 2 % 2, rank % 2
    half = slice(24 * lane, 24 * lane + 24)
    own, width = slice(2 * ep, 2 * ep + 2), slice(2 * etp, 2 * etp + 2)
    expected = {
        "layers.0.attention.q.weight": full["layers.0.attention.q.weight"][half],
        "layers.0.attention.o.weight": full["layers.0.attention.o.weight"][:, half],
        "layers.0.moe.experts.w1": full["layers.0.moe.experts.w1"][own, width],
        "layers.0.moe.experts.w2": full["layers.0.moe.experts.w2"][own, :, width],
        "layers.0.moe.router.weight": full["layers.0.moe.router.weight"],
    }
    for name, part in expected.items():
        assert torch.equal(found[name].parameter, part), name


def test_a_part_lives_in_memory_of_its_own() -> None:
    """A view would keep the full weight alive and stride through it."""
    for name, found in convert(tiny(), FoldLayout(8, 2, 2, 2)).items():
        parameter = found.parameter
        assert parameter.is_contiguous(), name
        assert parameter.is_leaf, name
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 8, name


def test_nothing_is_copied_where_nothing_is_cut() -> None:
    """At world 1 all parameters are the model's own objects."""
    model = tiny()
    before = dict(model.named_parameters())
    assert all(found.parameter is before[name] for name, found in convert(model).items())


def test_tied_weights_stay_tied_and_are_listed_once() -> None:
    """Embedding and head share one weight before and after; it is reduced once."""
    model = tiny(tied=True)
    found = convert(model, FoldLayout(2, 2, 2))
    assert "head.weight" not in found
    assert model.head.weight is model.embedding.weight


def test_frozen_weights_stay_frozen_when_cut() -> None:
    """The part of a parameter that needs no gradient needs none."""
    model = tiny()
    model.get_parameter("layers.0.attention.q.weight").requires_grad_(False)
    found = convert(model, FoldLayout(2, 2, 2))
    assert not found["layers.0.attention.q.weight"].parameter.requires_grad
    assert found["layers.0.attention.k.weight"].parameter.requires_grad


def test_only_the_shared_experts_output_is_scattered() -> None:
    """Attention and dense MLP add their lanes up, the shared expert keeps this lane's rows."""
    model = tiny()
    convert(model, FoldLayout(2, 2, 2))
    leaves = {n: m.leave for n, m in model.named_modules() if isinstance(m, RowParallelLinear)}
    assert leaves == {
        "layers.0.attention.o": leave_lanes,
        "layers.0.mlp.w2": leave_lanes,
        "layers.0.moe.shared.w2": scatter_share,
    }


def test_a_norm_inside_attention_is_a_norm() -> None:
    """The innermost module with a family decides, and a norm's type says what it is."""
    model = tiny()
    model.get_submodule("layers.0.attention").add_module("q_norm", nn.RMSNorm(12))
    found = convert(model, partial=[r"attention\.q_norm"])
    assert found["layers.0.attention.q_norm.weight"].family == "layernorm"
    assert found["layers.0.attention.q_norm.weight"].partial
    assert not found["layers.0.attention_norm.weight"].partial


def test_the_folded_model_computes_the_same_loss_in_a_world_of_one() -> None:
    """Every module replaced, nothing cut: equal to the last bits."""
    model, ids = tiny(biases=True), torch.tensor([[1, 5, 2, 7, 0]])
    before = float(model(ids, ids.roll(1), 0.2).detach())
    convert(model)
    assert float(model(ids, ids.roll(1), 0.2).detach()) == pytest.approx(before, rel=1e-14)


# ---------------------------------------------------------------- cut


def lane(index: int, size: int) -> Group:
    """Make a group to cut by; none is communicated with."""
    return Group(tuple(range(size)), index, None)


def test_a_fused_weight_is_cut_in_each_of_its_segments() -> None:
    """Rows g0 g1 g2 g3 u0 u1 u2 u3 over two: g0 g1 u0 u1 and g2 g3 u2 u3, not g's and u's."""
    rows = torch.arange(8)
    parts = [cut(rows, Shard("etp", 0, segments=2), lane(i, 2), "w").tolist() for i in (0, 1)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert cut(rows, Shard("etp", 0), lane(0, 2), "w").tolist() == [0, 1, 2, 3]


def test_a_cut_takes_the_named_dimension_only() -> None:
    """Columns 2 and 3 of a (2, 6) matrix for the second of three lanes."""
    matrix = torch.arange(12).view(2, 6)
    assert cut(matrix, Shard("tp", 1), lane(1, 3), "w").tolist() == [[2, 3], [8, 9]]


def test_a_fused_gate_up_expert_is_folded_like_two_weights() -> None:
    """With up None the gate holds both halves, each cut over etp on its own."""
    model = tiny()
    experts = model.get_submodule("layers.0.moe.experts")
    w1, w3 = experts.get_parameter("w1"), experts.get_parameter("w3")
    fused = torch.cat([w1, w3], dim=1).detach()
    del experts.w1, experts.w3
    experts.register_parameter("gate_up_proj", nn.Parameter(fused))
    found = convert(model, FoldLayout(2, 2, 1, 2), rank=1, gate="gate_up_proj", up=None)
    part = found["layers.0.moe.experts.gate_up_proj"].parameter
    assert torch.equal(part, torch.cat([w1[:, 2:], w3[:, 2:]], dim=1))


# ---------------------------------------------------------------- partial: heads behind a norm


class Headed(nn.Module):
    """Projection, a norm inside each head, output projection: what Qwen3's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(48, 8, bias=False)
        self.q_norm = nn.RMSNorm(2)
        self.o = nn.Linear(8, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head of width 2."""
        heads = torch.tanh(self.q_norm(self.q(x).unflatten(-1, (-1, 2))))
        y: Tensor = self.o(heads.flatten(-2))
        return y


class HeadedBlock(nn.Module):
    """Such an attention before a MoE block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Headed()
        self.moe = models.MoE(SPEC)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.3 * random(*parameter.shape, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        y: Tensor = self.moe(x + self.attention(x))
        return y


def norm_gradients(partial: list[str]) -> list[Tensor]:
    """Give the gradient of the norm's weight on both lanes."""

    def work(runtime: Any) -> Tensor:
        groups = fold_groups(runtime, FoldLayout(2, 2, 2))
        model = HeadedBlock().double()
        table = described(
            moe="moe",
            column=[r"attention\.q", r"shared\.w[13]"],
            row=[r"attention\.o", r"shared\.w2"],
            regions=["attention", "shared"],
            partial=partial,
        )
        parameters = fold(model, Preset.from_dict(table), groups, AuxiliaryOptions(), Points())
        (model(random(5, 48, seed=50)) * random(5, 48, seed=51)).sum().backward()
        reduce_gradients(parameters, groups, Points())
        gradient = model.get_parameter("attention.q_norm.weight").grad
        assert gradient is not None
        return gradient

    return run_ranks(2, work)


def test_a_replicated_norm_that_sees_one_lanes_heads_is_summed_over_lanes() -> None:
    """`partial` modules follow SUM; as AVERAGE the gradient would miss a factor tp = 2."""
    model = HeadedBlock().double()
    (model(random(5, 48, seed=50)) * random(5, 48, seed=51)).sum().backward()
    true = model.attention.q_norm.weight.grad
    assert true is not None
    for gradient in norm_gradients([r"attention\.q_norm"]):
        torch.testing.assert_close(gradient, true, rtol=1e-12, atol=1e-13)
    for gradient in norm_gradients([]):
        torch.testing.assert_close(2 * gradient, true, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "changes", "key", "words"),
    [
        (FoldLayout(1), {"moe": "blocks"}, "folding.preset.moe", "no module of Tiny"),
        (
            FoldLayout(3, ep_size=3),
            {},
            "expert_parallel.autoep_size",
            "dimension 0 = 4 of layers.0.moe.experts.w1; allowed: 1, 2, 4",
        ),
        (
            FoldLayout(3, etp_size=3),
            {},
            "expert_parallel.expert_tensor_parallel_size",
            "dimension 1 = 4 of layers.0.moe.experts.w1; allowed: 1, 2, 4",
        ),
        (
            FoldLayout(3, tp_size=3),
            {},
            "tensor_parallel.autotp_size",
            "dimension 0 = 8 of layers.0.mlp.w1.weight; allowed: 1, 2, 4, 8",
        ),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(
    layout: FoldLayout, changes: dict[str, Any], key: str, words: str
) -> None:
    """The message names key, value, tensor and the values that would do; alike on every rank."""
    said = set()
    for rank in range(layout.world_size):
        with pytest.raises(ConfigError) as refusal:
            convert(tiny(), layout, rank, **changes)
        assert refusal.value.key == key
        said.add(str(refusal.value))
    assert len(said) == 1
    assert words in said.pop()


def test_sizes_that_just_divide_are_not_refused() -> None:
    """Near miss: 4 experts over 4, width 4 over 4, mlp 8 over 8 lanes."""
    convert(tiny(heads=8, shared_width=8), FoldLayout(8, 8, 4), column=[r"mlp\.w[13]"])
    convert(tiny(), FoldLayout(4, 1, 1, 4))


def test_noise_on_the_input_of_a_block_is_refused() -> None:
    """It would differ between lanes, which must route alike."""
    model = tiny()
    model.get_submodule("layers.0.moe").jitter_noise = 0.1  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"layers\.0\.moe\.jitter_noise = 0\.1: not supported"):
        convert(model)


def test_heads_that_the_lanes_cannot_share_are_refused_where_the_module_says_how_many() -> None:
    """A cut of width 8 over 4 lanes would split 2 heads of width 4."""

    class Sizes:
        num_attention_heads = 2

    model = tiny()
    model.get_submodule("layers.0.attention").config = Sizes()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"does not divide num_attention_heads = 2 .*: 1, 2$"):
        convert(model, FoldLayout(4, 4, 4))
    convert(model, FoldLayout(2, 2, 2))


def test_the_rank_alone_needs_no_group() -> None:
    """`alone` fails when a process group is asked for."""
    fold(tiny(), Preset.from_dict(described()), alone(), AuxiliaryOptions(), Points())


# ---------------------------------------------------------------- what must not be lost silently


@pytest.mark.parametrize("holder", ["layers.0.moe", "layers.0.moe.experts", "layers.0.moe.router"])
def test_a_parameter_of_a_block_that_folding_does_not_know_is_refused(holder: str) -> None:
    """An expert bias or a gate of the shared expert would be dropped and training go on."""
    model = tiny()
    model.get_submodule(holder).register_parameter("extra", nn.Parameter(torch.ones(4)))
    with pytest.raises(ConfigError, match="extra"):
        convert(model)


def test_cutting_one_of_two_tied_weights_is_refused() -> None:
    """The head becomes a parameter of its own, which the embedding no longer follows."""
    with pytest.raises(ConfigError, match="tied"):
        convert(tiny(tied=True), FoldLayout(2, 2, 2), column=["head"], row=[], regions=[])


def test_tensor_parallelism_that_cuts_nothing_is_refused() -> None:
    """With misspelt patterns every lane computes the same thing, at tp times the cost."""
    with pytest.raises(ConfigError, match="tensor_parallel"):
        convert(tiny(shared_width=0), FoldLayout(2, 2, 2), shared_experts=None,
                column=["misspelt"], row=[], regions=[])  # fmt: skip
