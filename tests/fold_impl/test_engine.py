"""The native engine: the order of a step, what it adopts, what it refuses and when."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fold_impl
from fold_impl.config import ConfigError, FoldConfig
from fold_impl.engine import NativeEngine, build_engine
from fold_impl.families import rule_of
from fold_impl.layout import FoldLayout
from fold_impl.moe import FoldedMoE
from fold_impl.points import Points
from parity import case, models
from tests.worlds import run_ranks

SPEC = case.Model(layers=1, hidden=48, heads=4, mlp_width=8, vocab=8, experts=4, expert_width=4)
LR = 0.1


def tiny(**changes: Any) -> models.Tiny:
    """Make the small model of the harness."""
    return models.build(SPEC.model_copy(update=changes), 0, idle_expert=True)


def written(**changes: Any) -> dict[str, Any]:
    """Write a config: SGD, the model's own description as preset."""
    return {
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "folding": {"preset": models.preset(SPEC)},
        **changes,
    }


def batch(seed: int = 0, tokens: int = 5) -> dict[str, Any]:
    """Draw tokens and labels; the loss is their mean."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(8, (2, 1, tokens), generator=generator)
    return {"input_ids": ids, "labels": labels, "loss_scale": 1 / tokens}


def train(engine: Any, seeds: Sequence[int]) -> list[float]:
    """Run one micro-batch per seed; the losses."""
    losses = []
    for seed in seeds:
        loss = engine(**batch(seed))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy all weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def naive_gradients(seeds: Sequence[int]) -> dict[str, Tensor]:
    """Give the mean gradient over micro-batches of the unfolded model."""
    model = tiny()
    loss = sum(model(**batch(seed)) for seed in seeds) / len(seeds)
    leaves = dict(model.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def whole_norm(gradients: dict[str, Tensor]) -> float:
    """Give the Frobenius norm over all tensors."""
    return float(torch.cat([g.flatten() for g in gradients.values()]).norm())


# ---------------------------------------------------------------- initialize


def test_initialize_gives_what_deepspeed_gives() -> None:
    """(engine, optimizer, None, lr_scheduler), in a world of one without a process group."""
    model = tiny()
    engine, optimizer, loader, scheduler = fold_impl.initialize(model=model, config=written())
    assert isinstance(engine, NativeEngine)
    assert engine.module is model
    assert isinstance(optimizer, torch.optim.SGD)
    assert engine.optimizer is optimizer
    assert loader is None
    assert scheduler is None
    assert not torch.distributed.is_initialized()


def test_one_step_moves_every_weight_by_lr_times_its_gradient() -> None:
    """World 1, SGD: delta = -lr g against the naive model."""
    model = tiny()
    engine, *_ = fold_impl.initialize(model, written())
    before = weights(model)
    assert engine.get_global_grad_norm() is None
    train(engine, [0])
    expected = naive_gradients([0])
    for name, after in weights(model).items():
        torch.testing.assert_close(
            after - before[name], -LR * expected[name], atol=1e-13, rtol=1e-9
        )
    assert engine.get_global_grad_norm() == pytest.approx(whole_norm(expected), rel=1e-12)
    assert (engine.global_steps, engine.micro_steps) == (1, 1)


def test_gradients_accumulate_to_their_mean_and_weights_move_at_the_boundary() -> None:
    """gas 3: no change for two micro-batches, then -lr times the mean gradient, once."""
    model = tiny()
    engine, *_ = fold_impl.initialize(model, written(gradient_accumulation_steps=3))
    before = weights(model)
    train(engine, [0, 1])
    assert engine.global_steps == 0
    assert engine.get_global_grad_norm() is None
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert engine.is_gradient_accumulation_boundary()
    train(engine, [2])
    assert engine.global_steps == 1
    assert not engine.is_gradient_accumulation_boundary()
    expected = naive_gradients([0, 1, 2])
    for name, after in weights(model).items():
        torch.testing.assert_close(
            after - before[name], -LR * expected[name], atol=1e-13, rtol=1e-9
        )


def test_gradients_start_from_nothing_at_every_step() -> None:
    """With lr 0 two steps on the same batch have the same norm, not its double."""
    engine, *_ = fold_impl.initialize(
        tiny(), written(optimizer={"type": "SGD", "params": {"lr": 0.0}})
    )
    norms = []
    for _ in range(2):
        train(engine, [0])
        norms.append(engine.get_global_grad_norm())
    assert norms[0] == norms[1]


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clipping_scales_all_deltas_by_one_factor(share: float) -> None:
    """Limit half the norm: deltas times 1/2 (and 1e-6 less); limit twice the norm: untouched."""
    expected = naive_gradients([0])
    norm = whole_norm(expected)
    model = tiny()
    engine, *_ = fold_impl.initialize(model, written(gradient_clipping=share * norm))
    before = weights(model)
    train(engine, [0])
    factor = min(1.0, share * norm / (norm + 1e-6))
    for name, after in weights(model).items():
        delta = -LR * factor * expected[name]
        torch.testing.assert_close(after - before[name], delta, atol=1e-13, rtol=1e-9)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-12)


def test_reducing_by_hand_before_the_step_reduces_once() -> None:
    """`allreduce_gradients` is idempotent within a step: the faulty factor 2 appears once."""
    points = Points()
    points.plant("reduce.reduced", lambda g, **_: 2 * g)
    norms = []
    for calls in (0, 1, 2):
        engine = build_engine(tiny(), FoldConfig.from_dict(written(), 1), 0, points=points)
        engine.backward(engine(**batch()))
        for _ in range(calls):
            engine.allreduce_gradients()
        engine.step()
        norms.append(engine.get_global_grad_norm())
    expected = 2 * whole_norm(naive_gradients([0]))
    assert norms == [pytest.approx(expected, rel=1e-12)] * 3


def test_modes_and_layers_are_passed_through() -> None:
    """train(False) reaches the module; moe_layers lists the folded blocks in order."""
    engine, *_ = fold_impl.initialize(tiny(layers=2), written())
    assert engine.train(False) is engine
    assert not engine.module.training
    assert [layer.layer for layer in engine.moe_layers()] == [0, 1]
    assert all(isinstance(layer, FoldedMoE) for layer in engine.moe_layers())


def test_auxiliary_losses_of_all_layers_can_be_asked_for() -> None:
    """Zero without coefficients, else the sum of what the layers hold."""
    plain, *_ = fold_impl.initialize(tiny(layers=2), written())
    plain(**batch())
    assert plain.auxiliary_loss() == 0.0
    folding = {"preset": models.preset(SPEC), "load_balance_coef": 0.1}
    engine, *_ = fold_impl.initialize(tiny(layers=2), written(folding=folding))
    engine(**batch())
    parts = [float(layer.auxiliary.detach()) for layer in engine.moe_layers()]
    assert len(parts) == 2
    assert min(parts) > 0
    assert float(engine.auxiliary_loss().detach()) == pytest.approx(sum(parts), rel=1e-15)


# ---------------------------------------------------------------- optimizer, parameters, schedule


def test_an_optimizer_of_the_full_model_is_adopted_with_its_groups() -> None:
    """It steps the folded parts, group by group: lr 0 for the router only."""

    def work(runtime: Any) -> tuple[bool, set[str]]:
        model = tiny()
        named = dict(model.named_parameters())
        router = [p for n, p in named.items() if "router" in n]
        rest = [p for n, p in named.items() if "router" not in n]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": router, "lr": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=LR)
        config = FoldConfig.from_dict(folded_config(), 4)
        engine = build_engine(model, config, runtime.rank, optimizer, new_group=runtime.new_group)
        own = {id(p) for p in model.parameters()}
        adopted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before = weights(model)
        train(engine, [0])
        still = {n for n, w in weights(model).items() if torch.equal(w, before[n])}
        return own == adopted and engine.optimizer is optimizer, still

    for adopted, still in run_ranks(4, work):
        assert adopted
        assert "layers.0.moe.router.weight" in still
        assert not {"layers.0.attention.q.weight", "embedding.weight"} & still


def folded_config(**changes: Any) -> dict[str, Any]:
    """Write a config for world 4: tp 2, ep 4."""
    return written(
        tensor_parallel={"autotp_size": 2},
        expert_parallel={"enabled": True, "autoep_size": 4},
        **changes,
    )


def test_an_optimizer_with_state_of_the_full_model_is_refused() -> None:
    """Its moments have shapes no part has."""
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters())
    model(**batch()).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="has state of the full model"):
        fold_impl.initialize(model, written(), optimizer=optimizer)


def test_model_parameters_may_be_groups_and_reach_the_folded_parts() -> None:
    """A group with its own lr, given as parameters of the full model, also from a generator."""

    def work(runtime: Any) -> tuple[bool, list[float]]:
        model = tiny()
        named = dict(model.named_parameters())
        experts = [p for n, p in named.items() if "experts" in n]
        rest = (p for n, p in named.items() if "experts" not in n)
        groups = ({"params": list(part), "lr": lr} for part, lr in ((experts, 0.5), (rest, 0.25)))
        config = FoldConfig.from_dict(folded_config(), 4)
        engine = build_engine(
            model, config, runtime.rank, model_parameters=groups, new_group=runtime.new_group
        )
        inside = {id(p) for g in engine.optimizer.param_groups for p in g["params"]}
        rates = [g["lr"] for g in engine.optimizer.param_groups]
        return inside == {id(p) for p in model.parameters()}, rates

    assert run_ranks(4, work) == [(True, [0.5, 0.25])] * 4


def test_only_the_given_model_parameters_are_trained() -> None:
    """With the router's alone nothing else moves."""
    model = tiny()
    router = [p for n, p in model.named_parameters() if "router" in n]
    engine, *_ = fold_impl.initialize(model, written(), model_parameters=router)
    before = weights(model)
    train(engine, [0, 1])
    moved = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert moved == {"layers.0.moe.router.weight"}


def test_the_schedule_advances_once_per_optimizer_step() -> None:
    """gas 2, four micro-batches: two steps, lr 0.1 -> 0.025 at a factor 1/2 each."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    config = written(gradient_accumulation_steps=2)
    engine, given, _, returned = fold_impl.initialize(
        model, config, optimizer=optimizer, lr_scheduler=scheduler
    )
    assert returned is scheduler
    assert given is optimizer
    train(engine, [0, 1, 2, 3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 4)


# ---------------------------------------------------------------- folded


def test_a_folded_world_takes_the_steps_of_one_rank() -> None:
    """World 4, tp 2, ep 4, two steps of gas 2: replicated weights and norms equal one rank's.

    Both dp ranks see the same tokens, so that the mean over dp is either's.
    """
    seeds, config = [0, 1, 2, 3], {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    model = tiny()
    single, *_ = fold_impl.initialize(model, written(**config))
    losses = train(single, seeds)
    norm, expected = single.get_global_grad_norm(), weights(model)

    def work(runtime: Any) -> tuple[list[float], float | None, dict[str, Tensor]]:
        mine = tiny()
        parsed = FoldConfig.from_dict(folded_config(**config), 4)
        engine = build_engine(mine, parsed, runtime.rank, new_group=runtime.new_group)
        return train(engine, seeds), engine.get_global_grad_norm(), weights(mine)

    for rank, (found, own_norm, after) in enumerate(run_ranks(4, work)):
        assert found == [pytest.approx(loss, rel=1e-12) for loss in losses]
        assert own_norm == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(
            after["layers.0.moe.router.weight"], expected["layers.0.moe.router.weight"]
        )
        torch.testing.assert_close(
            after["layers.0.moe.experts.w1"], expected["layers.0.moe.experts.w1"][rank : rank + 1]
        )


# ---------------------------------------------------------------- refusals


class Spy:
    """Stands for `new_group` and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, ranks: Sequence[int]) -> Any:
        """Count."""
        self.asked += 1
        return tuple(ranks)


def refused(
    config: dict[str, Any], world: int, **kwargs: Any
) -> tuple[ConfigError, int, nn.Module]:
    """Build where it must be refused: the error, groups made, and the model."""
    spy, model = Spy(), tiny()
    with pytest.raises(ConfigError) as refusal:
        build_engine(model, FoldConfig.from_dict(config, world), 0, new_group=spy, **kwargs)
    return refusal.value, spy.asked, model


def test_without_a_preset_nothing_is_built() -> None:
    """Refused by name before a group exists, with the ways to name one."""
    config = written(folding={}, tensor_parallel={"autotp_size": 2})
    error, groups, _ = refused(config, 2)
    assert error.key == "expert_parallel.preset_model"
    assert groups == 0
    assert "folding.preset" in str(error)


def early() -> list[tuple[dict[str, Any], int, str]]:
    """List configs that only the model can refuse: world, key in the error."""
    wide = folded_config()
    wide["expert_parallel"] = {"enabled": True, "autoep_size": 8}
    three = folded_config()
    three["tensor_parallel"] = {"autotp_size": 3}
    without = folded_config()
    del without["optimizer"]
    return [(wide, 8, "autoep_size"), (three, 12, "autotp_size"), (without, 4, "optimizer")]


@pytest.mark.parametrize("index", range(3))
def test_what_the_model_cannot_do_is_refused_by_key(index: int) -> None:
    """More EP ranks than experts, a width that tp does not divide, no optimizer."""
    config, world, key = early()[index]
    assert key in refused(config, world)[0].key


@pytest.mark.parametrize("index", range(3))
def test_a_refusal_comes_before_groups_and_leaves_the_model_alone(index: int) -> None:
    """SPEC section 1: refused before any process group exists; nothing is half folded."""
    config, world, _ = early()[index]
    _, groups, model = refused(config, world)
    assert groups == 0
    assert not any_folded(model)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"zero_optimization": {"stage": 2}}, "deepspeed"),
        ({"bf16": {"enabled": True}}, "deepspeed"),
        ({"folding": {"engine": "deepspeed", "preset": models.preset(SPEC)}}, "deepspeed"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}, "native"),
    ],
)
def test_the_native_engine_does_not_stand_in_for_deepspeeds(
    section: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO or mixed precision go to what drives DeepSpeed's engine, which checks first."""
    called: list[str] = []

    def check(model: nn.Module, *_: Any) -> None:
        called.append("check" if not any_folded(model) else "check too late")

    def build(model: nn.Module, *_: Any) -> str:
        called.append("build" if any_folded(model) else "build too early")
        return "deepspeed"

    class Driver:
        """Stands for `fold_impl.zero`, which takes seconds to import and a process group."""

        def __init__(self) -> None:
            self.check, self.build_zero_engine = check, build

    original = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n: Driver() if n == "fold_impl.zero" else original(n)
    )
    made = build_engine(tiny(), FoldConfig.from_dict(written(**section), 1), 0)
    assert (made if isinstance(made, str) else "native") == expected
    assert called == (["check", "build"] if expected == "deepspeed" else [])


def any_folded(model: nn.Module) -> bool:
    """Tell whether a block was replaced."""
    return any(isinstance(module, FoldedMoE) for module in model.modules())


def test_two_losses_of_one_micro_batch_are_reduced_once() -> None:
    """Half the loss twice is the loss; reduced again, experts are divided by tp dp twice."""

    def work(runtime: Any) -> list[float | None]:
        norms = []
        for parts in (1, 2):
            parsed = FoldConfig.from_dict(folded_config(), 4)
            engine = build_engine(tiny(), parsed, runtime.rank, new_group=runtime.new_group)
            for _ in range(parts):
                engine.backward(engine(**batch()) / parts)
            engine.step()
            norms.append(engine.get_global_grad_norm())
        return norms

    for once, twice in run_ranks(4, work):
        assert twice == pytest.approx(once, rel=1e-12)


def test_untrained_parameters_do_not_carry_gradients_into_the_next_norm() -> None:
    """Training the router alone with lr 0: the second step's norm is the first one's."""
    model = tiny()
    router = [p for n, p in model.named_parameters() if "router" in n]
    config = written(optimizer={"type": "SGD", "params": {"lr": 0.0}})
    engine, *_ = fold_impl.initialize(model, config, model_parameters=router)
    norms = []
    for _ in range(2):
        train(engine, [0])
        norms.append(engine.get_global_grad_norm())
    assert norms[1] == norms[0]


def test_a_frozen_parameter_does_not_move() -> None:
    """requires_grad False and weight decay: torch leaves the weight alone, so must the engine."""
    model = tiny()
    model.embedding.weight.requires_grad_(False)
    decaying = {"type": "SGD", "params": {"lr": LR, "weight_decay": 0.5}}
    engine, *_ = fold_impl.initialize(model, written(optimizer=decaying))
    before = weights(model)["embedding.weight"]
    train(engine, [0])
    assert torch.equal(model.embedding.weight, before)


def test_a_partition_config_is_not_accepted_and_ignored() -> None:
    """What folding does not do yet is refused by name."""
    sections = {"tensor_parallel": {"autotp_size": 1, "partition_config": {"layer_specs": []}}}
    with pytest.raises(ConfigError, match="partition_config"):
        fold_impl.initialize(tiny(), written(**sections))


@pytest.mark.parametrize("config", ["ds_config.json", [1, 2]])
def test_a_config_that_is_no_table_is_refused_in_our_words(config: Any) -> None:
    """Not `dictionary update sequence element #0 has length 1`."""
    with pytest.raises(ConfigError, match="not a table"):
        fold_impl.initialize(tiny(), config)


@pytest.mark.parametrize(
    ("point", "transform", "factor"),
    [
        ("batch.loss", lambda loss, gas, **_: loss * gas, 2.0),
        ("batch.loss", lambda loss, **_: loss, 1.0),
        ("step.accumulate", lambda g, **_: g, 1.0),
    ],
)
def test_a_missing_division_by_gas_shows_as_its_factor(
    point: str, transform: Callable[..., Any], factor: float
) -> None:
    """Fault gas-missing: all gradients times 2; watchers at both points change nothing."""
    points = Points()
    points.plant(point, transform)
    parsed = FoldConfig.from_dict(written(gradient_accumulation_steps=2), 1)
    engine = build_engine(tiny(), parsed, 0, points=points)
    train(engine, [0, 1])
    expected = factor * whole_norm(naive_gradients([0, 1]))
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=1e-12)


def test_updating_before_clipping_leaves_the_deltas_unclipped() -> None:
    """Fault clip-after-step: planted order 'update, clip' gives the delta of no clipping."""
    points = Points()
    points.plant("step.order", lambda order: order[::-1])
    expected = naive_gradients([0])
    parsed = FoldConfig.from_dict(written(gradient_clipping=0.5 * whole_norm(expected)), 1)
    model = tiny()
    engine = build_engine(model, parsed, 0, points=points)
    before = weights(model)["head.weight"]
    train(engine, [0])
    delta = weights(model)["head.weight"] - before
    torch.testing.assert_close(delta, -LR * expected["head.weight"])


def test_ranks_that_drew_other_weights_begin_with_the_same() -> None:
    """As with DeepSpeed: replicas take the weights of the first rank that holds the same part."""
    sections = {
        "tensor_parallel": {"autotp_size": 2},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }

    def work(runtime: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model = models.build(SPEC, runtime.rank, idle_expert=False)
        engine, *_ = fold_impl.initialize(model, {**written(), **sections})
        places = {m.name: m.placement for m in engine.folded_parameters}
        return {m.name: m.parameter.detach() for m in engine.folded_parameters}, places

    found = run_ranks(4, work)
    _, places = found[0]
    layout = FoldLayout(4, tp_size=2, ep_size=2)
    first_of = {"stage": [0, 0, 0, 0], "dp": [0, 1, 0, 1], "edp": [0, 1, 0, 1]}
    drawn = [dict(models.build(SPEC, r, idle_expert=False).named_parameters()) for r in range(4)]
    for rank, (weights_of, _) in enumerate(found):
        for name, weight in weights_of.items():
            holder = first_of[rule_of(places[name]).axis()][rank]
            assert torch.equal(weight, found[holder][0][name]), (rank, name)
            if weight.shape == drawn[0][name].shape:  # held whole: the first rank's draw
                assert torch.equal(weight, drawn[0][name]), (rank, name)
    assert [g[0] for g in layout.groups("dp")] == [g[0] for g in layout.groups("edp")] == [0, 1]
