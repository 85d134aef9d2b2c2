"""One run inside a rank: the config it writes, what it feeds, when it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity import batches, case, models, trial
from parity.implementation import Placement, RankContext, Refusal, Shard
from parity.layout import Layout

HERE = "tests.parity.test_trial"
TINY = {
    "model.layers": 1,
    "model.heads": 4,
    "model.mlp_width": 8,
    "model.vocab": 7,
    "model.experts": 4,
    "model.expert_width": 4,
}


def order(
    implementation: str = f"{HERE}:Fake", /, *, layout: Layout | None = None, **fields: Any
) -> Any:
    """Order a run of a small case, by default unfolded in a world of one."""
    made = case.make({**TINY, "shape.world": 1, **fields}, suite="s", file="f")
    return trial.Order(made, implementation, layout or made.layout, 7, 0.25, 1.5)


def runtime(rank: int = 0) -> Any:
    """Stand for `parity.rank.RankRuntime`."""
    return SimpleNamespace(
        rank=rank, device=torch.device("cpu"), backend="gloo", new_group=lambda ranks: ranks
    )


class Fake:
    """An implementation that remembers what it was given and reuses its memory like an engine."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)
        self.fed: list[Mapping[str, Any]] = []
        self.planted: list[tuple[str, Any]] = []

    def build(self, model: nn.Module, config: Mapping[str, Any], context: RankContext) -> None:
        """Remember all."""
        self.model, self.config, self.context = model, config, context
        assert context.new_group((0, 1)) == (0, 1)

    def step(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[float]:
        """Change the weight in place."""
        self.fed += micro_batches
        self.weight += 1.0
        return [float(batch["input_ids"].numel()) for batch in micro_batches]

    def placements(self) -> Mapping[str, Any]:
        """Give a placement that is structurally one, of another class."""
        shard = SimpleNamespace(axis="tp", dim=0, segments=2)
        placed = SimpleNamespace(family="dense", shards=[shard])
        return {"w": placed, "v": placed}

    def parameters(self) -> Mapping[str, Tensor]:
        """Give the memory that the next step overwrites."""
        return {"w": self.weight, "v": self.weight}

    def gradients(self) -> Mapping[str, Tensor | None]:
        """Give one gradient in bfloat16 and one that is missing."""
        return {"w": self.weight.bfloat16(), "v": None}

    def grad_norm(self) -> float:
        """Give a norm."""
        return 3.0

    def routing(self) -> list[list[Tensor]]:
        """Give one map."""
        return [[torch.tensor([[1]])]]


class Full(Fake):
    """One with the optional members."""

    forced: Any = None

    def plant(self, point: str, transform: Any) -> None:
        """Remember."""
        self.planted.append((point, transform))

    def taps(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Give a record that fills later."""
        return {name: [torch.tensor([1.0, 2.0])] for name in names}

    def replay(self, routing: Any) -> None:
        """Remember."""
        type(self).forced = routing

    fault_points: Mapping[str, str] = {}

    def save(self, path: str) -> None:
        """Do nothing."""

    def load(self, path: str) -> None:
        """Do nothing."""


def test_before_and_after_are_copies_of_each_step() -> None:
    """An engine reuses its memory: 1 -> 2, then 2 -> 3, and not 3 throughout."""
    result = trial.run(runtime(), order(steps=2))
    seen = [[pieces.tensors()["w"] for pieces in (s.before, s.after)] for s in result.steps]
    ones = torch.ones(2)
    torch.testing.assert_close(seen, [[ones, 2 * ones], [2 * ones, 3 * ones]])


def test_what_travels_is_numpy_and_16_bit_floats_are_float32() -> None:
    """None stays None; losses, norm and routing are handed on."""
    step = trial.run(runtime(), order()).steps[0]
    (array,) = step.gradients.flats
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    gradients = step.gradients.tensors()
    assert gradients["v"] is None
    torch.testing.assert_close(gradients["w"], torch.full((2,), 2.0))
    assert (step.losses, step.grad_norm) == ([5.0], 3.0)
    assert step.routing[0][0].tolist() == [[1]]


def test_placements_become_our_own_and_absent_members_are_named() -> None:
    """No foreign class travels; Fake offers none of the optional members, Full all."""
    result = trial.run(runtime(), order())
    assert result.placements == dict.fromkeys("wv", Placement("dense", (Shard("tp", 0, 2),)))
    assert set(result.absent) == {"replay", "taps", "fault_points", "save", "load"}
    assert trial.run(runtime(), order(f"{HERE}:Full")).absent == ()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_model_arrives_with_the_cases_weights_in_its_dtype(dtype: str) -> None:
    """The float64 weights of the order's seed, rounded once."""
    made = Fake()
    fields: dict[str, Any] = {"engine.dtype": dtype}
    found = order(**fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "find", lambda _: lambda: made)
        trial.run(runtime(), found)
    expected = models.build(found.case.model, 7, idle_expert=True)
    for name, weight in made.model.named_parameters():
        true = expected.get_parameter(name).detach().to(getattr(torch, dtype))
        assert torch.equal(weight.detach(), true), name


def fed(rank: int, layout: Layout, **fields: Any) -> Mapping[str, Any]:
    """Give the first batch a rank is fed in a lane-varying case of world 4, tp 2."""
    made = Fake()
    shape: dict[str, Any] = {"shape.world": 4, "shape.tp": 2, "data.lane_varying": True, **fields}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "find", lambda _: lambda: made)
        trial.run(runtime(rank), order(layout=layout, **shape))
    return made.fed[0]


def test_a_folded_rank_is_fed_its_dp_ranks_tokens_and_its_lanes_probe() -> None:
    """World 4, tp 2: rank 3 is dp rank 1, lane 1; the baseline's rank 1 gets the lanes' mean."""
    shape: dict[str, Any] = {"shape.world": 4, "shape.tp": 2, "data.lane_varying": True}
    drawn = batches.make(order(**shape).case, 2, 1, 7)[1][0]
    folded, plain = fed(3, Layout(4, tp=2)), fed(1, Layout(2))
    assert drawn.probes is not None
    assert torch.equal(folded["input_ids"], drawn.input_ids)
    assert torch.equal(folded["probe"], drawn.probes[1])
    assert torch.equal(plain["input_ids"], drawn.input_ids)
    assert torch.equal(plain["probe"], drawn.probes.mean(0))


# ---------------------------------------------------------------- planting, taps, replay


def add(value: int, amount: int, **context: int) -> int:
    """Add an option and whatever the context gives."""
    return value + amount + sum(context.values())


class Counting:
    """A fault that remembers: fires from its second call on."""

    def __init__(self, amount: int) -> None:
        self.amount, self.calls = amount, 0

    def __call__(self, value: int) -> int:
        """Add the amount after the first call."""
        self.calls += 1
        return value + (self.amount if self.calls > 1 else 0)


def planted(fault: trial.Planted) -> Any:
    """Run with a fault planted and give the transformation the implementation was handed."""
    made = Full()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "find", lambda _: lambda: made)
        trial.run(runtime(), replace(order(), planted=(fault,)))
    ((point, transform),) = made.planted
    assert point == fault.point
    return transform


def test_a_planted_function_is_bound_to_its_options_and_given_the_context() -> None:
    """1 + 10 from the options + 100 from the context."""
    transform = planted(trial.Planted("router.logits", f"{HERE}:add", {"amount": 10}))
    assert transform(1, layer=100) == 111


def test_a_planted_class_is_made_once_per_rank_and_may_remember() -> None:
    """The first call passes, the second adds."""
    transform = planted(trial.Planted("router.logits", f"{HERE}:Counting", {"amount": 10}))
    assert [transform(1), transform(1)] == [1, 11]


def test_taps_are_copied_when_the_steps_are_done() -> None:
    """Only where asked for."""
    asked = replace(order(f"{HERE}:Full"), taps=("moe.restored",))
    assert [t.tolist() for t in trial.run(runtime(), asked).taps["moe.restored"]] == [[1.0, 2.0]]
    assert trial.run(runtime(), order(f"{HERE}:Full")).taps == {}


def test_a_replay_reaches_the_implementation_for_its_own_dp_rank() -> None:
    """[step][dp rank][micro-batch][layer]; one that cannot replay refuses in words."""
    shape: dict[str, Any] = {"shape.world": 2}
    maps = [[[[np.array([[dp]])]] for dp in range(2)]]
    trial.run(runtime(1), replace(order(f"{HERE}:Full", **shape), replay=maps))
    assert Full.forced[0][0].tolist() == [[1]]
    with pytest.raises(Refusal, match="replay"):
        trial.run(runtime(), replace(order(**shape), replay=maps))


# ---------------------------------------------------------------- config


def written(**fields: Any) -> dict[str, Any]:
    """Write the config of a folded case of world 8."""
    shape: dict[str, Any] = {"shape.world": 8, "shape.tp": 2, "shape.ep": 2, "shape.etp": 2}
    return trial.config(order(**{**shape, **fields}))


def test_the_config_is_a_deepspeed_one_with_two_sections_and_ours() -> None:
    """Sizes, gas, clip and lr of the order; nothing of ours outside "folding"."""
    config = written(**{"engine.gas": 3, "data.sequences": 2, "auxiliary.z_loss": 0.5})
    assert config["tensor_parallel"] == {"autotp_size": 2}
    assert config["expert_parallel"] == {
        "enabled": True,
        "autoep_size": 2,
        "expert_tensor_parallel_size": 2,
    }
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_clipping"] == 1.5
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.25, "weight_decay": 0.0}}
    folding = config["folding"]
    assert (folding["engine"], folding["strategy"], folding["z_loss_coef"]) == (
        "native",
        "route_full",
        0.5,
    )
    assert "zero_optimization" not in config
    assert "bf16" not in config
    assert "sequence_parallel_size" not in config


def test_a_ulysses_size_is_handed_over_and_refused_in_the_implementations_words() -> None:
    """Not dropped: a case that asks for it is not judged as one that does not."""
    fields: dict[str, Any] = {"shape.world": 2, "engine.sequence_parallel_size": 2}
    asked = order("fold_impl", **fields)
    assert trial.config(asked)["sequence_parallel_size"] == 2
    with pytest.raises(Exception, match="sequence_parallel_size = 2: Ulysses") as refusal:
        trial.run(runtime(), asked)
    assert getattr(refusal.value, "refusal", False)


def test_the_baselines_config_has_no_folding_sizes() -> None:
    """Its layout says 1, whatever the case's shape."""
    config = trial.config(order(layout=Layout(4), **{"shape.world": 8, "shape.tp": 2}))
    assert config["tensor_parallel"]["autotp_size"] == 1
    assert config["expert_parallel"]["autoep_size"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("momentum", "SGD", {"momentum": 0.9}),
        ("adam", "Adam", {"betas": [0.9, 0.95], "eps": 1e-8, "adam_w_mode": False}),
        ("adamw", "AdamW", {"betas": [0.9, 0.95], "eps": 1e-8, "adam_w_mode": True}),
        ("lion", "Lion", {"betas": [0.9, 0.95]}),
    ],
)
def test_optimizers_are_written_with_all_their_constants(
    name: str, kind: str, extra: dict[str, Any]
) -> None:
    """None is left to a default that differs between engines; plain Adam says so."""
    section = written(**{"optimizer.name": name, "optimizer.weight_decay": 0.5})["optimizer"]
    assert section["type"] == kind
    assert section["params"] == {"lr": 0.25, "weight_decay": 0.5, **extra}


def test_deepspeeds_engine_gets_its_stage_and_precision() -> None:
    """ZeRO 2 in bfloat16."""
    config = written(**{"engine.name": "deepspeed", "engine.zero": 2, "engine.dtype": "bfloat16"})
    assert config["zero_optimization"] == {"stage": 2}
    assert config["bf16"] == {"enabled": True}


def test_options_of_a_case_are_merged_into_their_sections() -> None:
    """A table extends the section that is there; anything else is set."""
    options = {
        "engine.options.tensor_parallel.tp_overlap_comm": True,
        "engine.options.steps_per_print": 5,
    }
    config = written(**options)
    assert config["tensor_parallel"] == {"autotp_size": 2, "tp_overlap_comm": True}
    assert config["steps_per_print"] == 5


def test_gradients_are_those_of_the_parameters_where_nothing_else_is_offered() -> None:
    """Without `gradients()`: `.grad` of each; a copy that has none shows as None."""
    weight = nn.Parameter(torch.ones(2))
    weight.sum().backward()
    plain: Any = SimpleNamespace(parameters=lambda: {"a": weight, "b": weight.detach()})
    found = trial._gradients(plain)
    assert found["a"] is weight.grad
    assert found["b"] is None
    plain.gradients = lambda: {"a": weight}
    assert trial._gradients(plain) == {"a": weight}
