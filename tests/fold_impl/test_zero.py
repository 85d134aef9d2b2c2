"""DeepSpeed's engine under folding: what it is told, what is put right, what is refused."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fold_impl.config import ConfigError, FoldConfig, Unsupported
from fold_impl.engine import NativeEngine, build_engine
from fold_impl.families import Family, FoldedParameter, Placement, Shard
from fold_impl.groups import FoldGroups, build_groups
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from parity import case, models
from parity.failure import Refused
from parity.gang import GangPool
from parity.rank import RankRuntime

# `deepspeed` warns on its own account when it is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:deepspeed.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]

SPEC = case.Model(layers=1, hidden=48, heads=4, mlp_width=8, vocab=8, experts=4, expert_width=4)
DEADLINE_S = 120.0
HERE = "tests.fold_impl.test_zero"
SGD = {"type": "SGD", "params": {"lr": 0.5}}


def written(*sizes: int, **sections: Any) -> dict[str, Any]:
    """Write a config for DeepSpeed's engine: sizes of tp, ep, etp; `folding` is added to."""
    tp, ep, etp = (*sizes, 1, 1, 1)[:3]
    folding = {"engine": "deepspeed", "preset": models.preset(SPEC), **sections.pop("folding", {})}
    parallel = {"enabled": True, "autoep_size": ep, "expert_tensor_parallel_size": etp}
    return {
        "optimizer": SGD,
        "tensor_parallel": {"autotp_size": tp},
        "expert_parallel": parallel,
        "folding": folding,
        **sections,
    }


@pytest.fixture(scope="module")
def zero() -> Any:
    """Import the module under test, which imports DeepSpeed."""
    return importlib.import_module("fold_impl.zero")


@pytest.fixture(scope="module")
def zero_plan() -> Any:
    """Import what DeepSpeed is told of groups, which imports DeepSpeed."""
    return importlib.import_module("fold_impl.zero_plan")


# --- the plan: pure, with names for process groups -----------------------------------------------


def as_text(ranks: Sequence[int]) -> str:
    """Stand for a process group."""
    return "".join(map(str, ranks))


def plan_of(zero_plan: Any, layout: FoldLayout, rank: int) -> dict[str, tuple[Any, ...]]:
    """Give (name, replicas, shards, factor) of one parameter of each rule."""

    def member(name: str, family: Family, *shards: Shard, partial: bool = False) -> FoldedParameter:
        return FoldedParameter(
            name, nn.Parameter(torch.zeros(1)), Placement(family, shards), partial
        )

    members = [
        member("average", "router"),
        member("sum", "layernorm", partial=True),
        member("skip", "attention", Shard("tp", 0)),
        member("expert", "expert", Shard("ep", 0), Shard("etp", 1)),
    ]
    groups: FoldGroups = build_groups(layout, rank, as_text)
    plan = zero_plan.make_plan(members, groups, as_text, Points())
    return {
        m.folded.name: (m.kind.name, m.kind.replicas.handle, m.kind.shards.handle, m.factor)
        for m in plan.members
    }


def test_each_rule_is_given_its_group_and_what_the_stage_leaves_owed(zero_plan: Any) -> None:
    """World 8, tp 2, ep 2, etp 2, rank 5: the tables of the specification."""
    plan = plan_of(zero_plan, FoldLayout(8, tp_size=2, ep_size=2, etp_size=2), 5)
    assert plan["average"] == (None, "01234567", "5", 1.0)
    assert plan["sum"] == (None, "01234567", "5", 2.0)
    assert plan["skip"] == ("ep_size_0", "1357", "45", 2.0)
    assert plan["expert"] == ("ep_size_4", "15", "4567", 1.0)


def test_a_group_of_one_is_a_group_and_not_the_whole_world(zero_plan: Any) -> None:
    """World 4, tp 2, ep 4, rank 2: every expert lives once, its edp group is rank 2 alone."""
    plan = plan_of(zero_plan, FoldLayout(4, tp_size=2, ep_size=4), 2)
    assert plan["expert"] == ("ep_size_4", "2", "0123", 1.0)
    assert plan["skip"] == ("ep_size_0", "02", "23", 2.0)


def test_without_folding_every_parameter_is_an_ordinary_one(zero_plan: Any) -> None:
    """World 3, all sizes 1: DeepSpeed is told nothing of experts."""
    plan = plan_of(zero_plan, FoldLayout(3), 0)
    assert set(plan.values()) == {(None, "012", "0", 1.0)}


def test_process_groups_are_asked_for_alike_on_every_rank(zero_plan: Any) -> None:
    """Also for tables a rank is not in: `torch.distributed.new_group` is collective."""
    layout = FoldLayout(8, tp_size=2, ep_size=2, etp_size=2)
    asked = []
    for rank in range(8):
        calls: list[tuple[int, ...]] = []

        def record(ranks: Sequence[int], calls: list[tuple[int, ...]] = calls) -> str:
            calls.append(tuple(ranks))
            return as_text(ranks)

        zero_plan.make_plan([], build_groups(layout, rank, record), record, Points())
        assert len(calls) == len(set(calls))
        asked.append(calls)
    assert all(calls == asked[0] for calls in asked)


def test_optimizer_groups_are_split_by_kind_and_keep_their_options(zero_plan: Any) -> None:
    """Two groups over two kinds become four; frozen parameters and empty groups leave."""
    layout = FoldLayout(4, tp_size=2, ep_size=4)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    weights[4].requires_grad = False
    folded = [
        FoldedParameter(str(i), w, Placement("expert" if i % 2 else "router"))
        for i, w in enumerate(weights)
    ]
    plan = zero_plan.make_plan(folded, build_groups(layout, 0, as_text), as_text, Points())
    groups: list[dict[str, Any]] = [
        {"params": weights[:2], "lr": 0.25},
        {"params": weights[2:4]},
        {"params": weights[4:]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    zero_plan.split_groups(optimizer, plan.members)
    found = [(g["name"], g.get("moe", False), g["lr"]) for g in optimizer.param_groups]
    assert found == [
        ("dense", False, 0.25), ("ep_size_4", True, 0.25),
        ("dense", False, 0.5), ("ep_size_4", True, 0.5),
    ]  # fmt: skip
    assert [id(g["params"][0]) for g in optimizer.param_groups] == [id(w) for w in weights[:4]]


# --- refusals ------------------------------------------------------------------------------------

ZERO = "zero_optimization"
BF16 = {"bf16": {"enabled": True}}
FP32_SUM = {"data_types": {"grad_accum_dtype": "fp32"}}
COALESCE = {"folding": {"coalesce_grad_reduction": True}}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({ZERO: {"stage": 3}}, "zero_optimization.stage"),
        ({ZERO: {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({ZERO: {"stage": 1, "reduce_scatter": False}}, "reduce_scatter"),
        ({ZERO: {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({ZERO: {"stage": 1, "contiguous_gradients": False}}, "contiguous_gradients"),
        ({ZERO: {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients"),
        ({ZERO: {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({**BF16, **FP32_SUM}, "data_types.grad_accum_dtype"),
        ({**COALESCE}, "folding.coalesce_grad_reduction"),
        ({ZERO: {"stage": 1}, **BF16, **FP32_SUM, **COALESCE}, "folding.coalesce_grad_reduction"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled"),
    ],
)
def test_paths_deepspeed_gets_wrong_or_lacks_are_refused_by_name(
    sections: dict[str, Any], key: str
) -> None:
    """Before anything is built, in the words of the config."""
    with pytest.raises(Unsupported) as refusal:
        FoldConfig.from_dict(written(2, 4, **copy.deepcopy(sections)), 4)
    assert refusal.value.key.endswith(key)


@pytest.mark.parametrize(
    "sections",
    [
        {ZERO: {"stage": 1, "contiguous_gradients": False}, **BF16, **FP32_SUM},
        {ZERO: {"stage": 0, "contiguous_gradients": False}},
        {ZERO: {"stage": 1}, **COALESCE},
        {ZERO: {"stage": 2}, **BF16, **FP32_SUM, **COALESCE},
        {ZERO: {"stage": 1, "round_robin_gradients": False, "reduce_scatter": True}},
        FP32_SUM,
    ],
)
def test_near_misses_are_accepted(sections: dict[str, Any]) -> None:
    """Neighbours of the refusals above that are right."""
    FoldConfig.from_dict(written(2, 4, **copy.deepcopy(sections)), 4)


def test_noncontiguous_gradients_without_shards_are_deepspeeds_own_business() -> None:
    """Nothing is folded: there is no other shard to be averaged with."""
    FoldConfig.from_dict(written(**{ZERO: {"stage": 1, "contiguous_gradients": False}}), 4)


def test_an_unknown_accumulation_dtype_is_a_mistake() -> None:
    """Neither DeepSpeed nor folding knows fp8 sums."""
    with pytest.raises(ConfigError, match="allowed: fp32"):
        FoldConfig.from_dict(written(data_types={"grad_accum_dtype": "fp8"}), 1)


def test_optimizers_schedules_and_dtypes_are_checked_before_groups_exist(zero: Any) -> None:
    """An optimizer that mixes entries, a schedule over unsplit groups, a float64 model."""
    model = nn.Linear(2, 2)
    config = FoldConfig.from_dict(written(), 1)
    rprop = torch.optim.Rprop(model.parameters())
    with pytest.raises(Unsupported, match="flat pieces"):
        zero.check(model, config, rprop, None)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1)
    with pytest.raises(ConfigError, match="split by family"):
        zero.check(model, config, sgd, schedule)
    zero.check(model, config, sgd, lambda optimizer: optimizer)
    with pytest.raises(Unsupported, match="float64"):
        zero.check(model.double(), config, sgd, None)


def build_refused(runtime: RankRuntime, _: Any) -> None:
    """Build what the config refuses."""
    config = FoldConfig.from_dict(written(2, 2, **{ZERO: {"stage": 3}}), runtime.world_size)
    build(config, runtime)


def test_a_refusal_is_every_ranks(deepspeed_ranks: GangPool) -> None:
    """No rank waits for another."""
    with pytest.raises(Refused, match="ZeRO-3 not supported yet"):
        deepspeed_ranks.run(2, f"{HERE}:build_refused", [None] * 2, DEADLINE_S)


# --- tasks: they run in the ranks ----------------------------------------------------------------


def build(config: FoldConfig, runtime: RankRuntime) -> Any:
    """Build an engine on the tiny model in float32."""
    model = models.build(SPEC, 0, idle_expert=True).float()
    return build_engine(model, config, runtime.rank, new_group=runtime.new_group)


def batch(seed: int) -> dict[str, Any]:
    """Draw five tokens and labels; the loss is their mean."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(8, (2, 1, 5), generator=generator)
    return {"input_ids": ids, "labels": labels, "loss_scale": 0.2}


def train(engine: Any, steps: int, dp_size: int, dp_rank: int) -> list[float]:
    """Run steps of one micro-batch; step s feeds dp rank d the batch s * dp + d."""
    losses = []
    for step in range(steps):
        loss = engine(**batch(step * dp_size + dp_rank))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def curve(runtime: RankRuntime, config: dict[str, Any]) -> list[float]:
    """Train ten steps; the losses of this rank."""
    engine = build(FoldConfig.from_dict(config, runtime.world_size), runtime)
    groups = engine.groups
    losses = train(engine, 10, groups.dp.size, groups.dp.index)
    engine.close()
    return losses


@pytest.mark.parametrize(("tp", "ep", "etp", "stage"), [(2, 4, 1, 0), (4, 2, 1, 1), (2, 2, 2, 2)])
def test_ten_steps_follow_the_curve_of_one_process(
    deepspeed_ranks: GangPool, tp: int, ep: int, etp: int, stage: int
) -> None:
    """float32, Adam, clipped, ZeRO-0, 1, 2 at three shapes against torch.optim on one model."""
    adam = {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-3}}
    config = written(tp, ep, etp, optimizer=adam, gradient_clipping=0.5, **{ZERO: {"stage": stage}})
    dp = 4 // tp
    found = deepspeed_ranks.run(4, f"{HERE}:curve", [config] * 4, DEADLINE_S)
    model = models.build(SPEC, 0, idle_expert=True)  # float64
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.0)
    for step in range(10):
        losses = [model(**batch(step * dp + rank)) for rank in range(dp)]
        optimizer.zero_grad()
        (sum(losses) / dp).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for rank in range(4):
            expected = float(losses[rank // tp].detach())
            assert found[rank][step] == pytest.approx(expected, rel=3e-6), (step, rank)


def scaled_updates(runtime: RankRuntime, order: tuple[int, dict[str, Any]]) -> list[float]:
    """Give the change of one weight in each of six steps whose gradient is 2^-4 everywhere."""
    stage, fp16 = order
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    accelerator.is_fp16_supported = lambda: False  # as on a CPU without AVX-512 FP16
    config = written(**{ZERO: {"stage": stage}}, fp16={"enabled": True, **fp16})
    engine = build(FoldConfig.from_dict(config, runtime.world_size), runtime)
    model = engine.module
    model.forward = lambda: sum(p.float().sum() for p in model.parameters()) / 16
    changes = []
    for _ in range(6):
        before = engine.master_weights()["norm.weight"][0].clone()
        engine.backward(engine())
        engine.step()
        changes.append(float(engine.master_weights()["norm.weight"][0] - before))
    engine.close()
    return changes


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "fp16",
    [
        {"loss_scale": 1.0},
        {"loss_scale": 1024.0},
        {"loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 2},
    ],
    ids=["one", "large", "growing"],
)
def test_a_float16_update_does_not_depend_on_the_loss_scale(
    deepspeed_ranks: GangPool, stage: int, fp16: dict[str, Any]
) -> None:
    """-0.5 / 16 every step; DeepSpeed's own is 1/1024 of it at stage 0, and half where it grows."""
    task = f"{HERE}:scaled_updates"
    for changes in deepspeed_ranks.run(2, task, [(stage, fp16)] * 2, DEADLINE_S):
        assert changes == pytest.approx([-0.03125] * 6, rel=1e-5)


def fresh_masters(runtime: RankRuntime, _: Any) -> tuple[bool, int]:
    """Start bf16 with AdamW at ZeRO-0: are masters the weights, how many states are there."""
    adam = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}}
    engine = build(FoldConfig.from_dict(written(optimizer=adam, **BF16), 1), runtime)
    model = {n: p.detach().float() for n, p in engine.module.named_parameters()}
    masters = engine.master_weights()
    same = all(torch.equal(masters[n], model[n]) for n in model)
    states = len(engine.optimizer.optimizer.state)
    engine.close()
    return same, states


def test_nothing_is_stepped_before_the_first_step(deepspeed_ranks: GangPool) -> None:
    """DeepSpeed's constructor would decay the masters and count one Adam step."""
    assert deepspeed_ranks.run(1, f"{HERE}:fresh_masters", [None], DEADLINE_S) == [(True, 0)]


def overflowing(
    runtime: RankRuntime, order: tuple[int, dict[str, Any], str]
) -> list[tuple[bool, bool, int]]:
    """Run three steps, one gradient of rank 3 infinite in the second: (moved, finite, skipped)."""
    stage, precision, name = order
    config = FoldConfig.from_dict(written(2, 4, **{ZERO: {"stage": stage}}, **precision), 4)
    engine = build(config, runtime)
    log = []
    for step in range(3):
        before = {n: w.clone() for n, w in engine.master_weights().items()}
        loss = engine(**batch(step))
        if step == 1 and runtime.rank == 3:
            loss = loss + (engine.module.get_parameter(name).float() * float("inf")).sum()
        engine.backward(loss)
        engine.step()
        after = engine.master_weights()
        moved = sum(not torch.equal(before[n], w) for n, w in after.items()) > len(after) // 2
        finite = all(bool(torch.isfinite(w).all()) for w in after.values())
        log.append((moved, finite, engine.skipped_steps))
    engine.close()
    return log


@pytest.mark.parametrize("name", ["layers.0.moe.experts.w1", "layers.0.attention.q.weight"])
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, BF16),
        (0, {"fp16": {"enabled": True, "loss_scale": 16.0}}),
        (1, {**BF16, **FP32_SUM}),
        (1, {"fp16": {"enabled": True, "loss_scale": 16.0}}),
        (2, {"fp16": {"enabled": True, "loss_scale": 16.0}}),
    ],
    ids=["z0-bf16", "z0-fp16", "z1-bf16-fp32", "z1-fp16", "z2-fp16"],
)
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(
    deepspeed_ranks: GangPool, stage: int, precision: dict[str, Any], name: str
) -> None:
    """In an expert's or a lane's part that the other ranks do not hold; then training goes on."""
    orders = [(stage, precision, name)] * 4
    for log in deepspeed_ranks.run(4, f"{HERE}:overflowing", orders, DEADLINE_S):
        assert log == [(True, True, 0), (False, True, 1), (True, True, 1)]


def two_engines(runtime: RankRuntime, _: Any) -> tuple[list[float], list[float]]:
    """Step engines of two layouts in turn: norms, and those of each engine alone."""
    configs = [
        FoldConfig.from_dict(written(*sizes, **{ZERO: {"stage": stage}}), 4)
        for sizes, stage in (((2, 4), 0), ((4, 2), 1))
    ]
    alone = []
    for config in configs:
        engine = build(config, runtime)
        train(engine, 2, 1, 0)
        alone.append(engine.get_global_grad_norm())
        engine.close()
    engines = [build(config, runtime) for config in configs]
    for step in range(2):
        for engine in engines:
            engine.backward(engine(**batch(step)))
            engine.step()
    together = [engine.get_global_grad_norm() for engine in engines]
    for engine in engines:
        engine.close()
    return alone, together


def test_engines_of_two_layouts_live_side_by_side(deepspeed_ranks: GangPool) -> None:
    """DeepSpeed keeps one table of groups for a process; each engine puts its own in."""
    for alone, together in deepspeed_ranks.run(4, f"{HERE}:two_engines", [None] * 4, DEADLINE_S):
        assert alone == together


def refused_calls(runtime: RankRuntime, _: Any) -> list[str]:
    """Call what DeepSpeed's engine offers and folding refuses; the keys named."""
    config = written(**{ZERO: {"stage": 1, "overlap_comm": True}})
    engine = build(FoldConfig.from_dict(config, 1), runtime)
    keys = []
    for call in (
        lambda: engine.no_sync().__enter__(),
        lambda: engine.deepspeed_io([]),
        lambda: engine.save_16bit_model("/nowhere"),
    ):
        try:
            call()
        except Unsupported as refusal:
            keys.append(refusal.key)
    engine.close()
    return keys


def test_calls_that_cannot_be_right_are_refused(deepspeed_ranks: GangPool) -> None:
    """no_sync beside overlap_comm, DeepSpeed's loader and its export."""
    found = deepspeed_ranks.run(1, f"{HERE}:refused_calls", [None], DEADLINE_S)
    overlap = "zero_optimization.overlap_comm"
    assert found == [[overlap, "training_data", "save_16bit_model"]]


def given_schedule(runtime: RankRuntime, _: Any) -> tuple[str, list[float], Tensor]:
    """Train with an own optimizer of two groups and a schedule made for it; learning rates."""
    model = models.build(SPEC, 0, idle_expert=True).float()
    named = dict(model.named_parameters())
    router = [p for n, p in named.items() if "router" in n]
    rest = [p for n, p in named.items() if "router" not in n]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": router, "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    config = FoldConfig.from_dict(written(2, 2, **{ZERO: {"stage": 1}}), 2)
    engine = build_engine(
        model, config, runtime.rank, optimizer, new_group=runtime.new_group,
        lr_scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, 1, 0.5),
    )  # fmt: skip
    before = engine.master_weights()["layers.0.moe.router.weight"].clone()
    train(engine, 2, 1, 0)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    moved = (engine.master_weights()["layers.0.moe.router.weight"] - before).abs().max()
    engine.close()
    return type(engine).__name__, rates, moved


def test_own_optimizer_groups_and_a_schedule_are_honoured(deepspeed_ranks: GangPool) -> None:
    """lr 0.5 halves each step, 0 stays: the router does not move."""
    for kind, rates, moved in deepspeed_ranks.run(
        2, f"{HERE}:given_schedule", [None] * 2, DEADLINE_S
    ):
        assert (kind, rates, float(moved)) == ("ZeroEngine", [0.0, 0.125], 0.0)


def test_the_native_engine_stays_what_runs_without_being_asked() -> None:
    """No ZeRO, no 16-bit section: plain torch, and DeepSpeed is not imported for it."""
    config = written()
    del config["folding"]["engine"]
    model = models.build(SPEC, 0, idle_expert=True)
    engine = build_engine(model, FoldConfig.from_dict(config, 1), 0)
    assert isinstance(engine, NativeEngine)
