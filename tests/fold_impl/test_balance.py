"""The correction bias of a folded model against one process that counts tokens one by one."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fold_impl import checkpoint
from fold_impl.balance import towards_mean
from fold_impl.config import ConfigError, FoldConfig
from fold_impl.engine import build_engine
from parity import case, hugging_face, models
from parity.gang import GangPool
from parity.rank import RankRuntime

# `deepspeed` warns on its own account when it is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:deepspeed.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]

HERE = "tests.fold_impl.test_balance"
SPEC = case.Model(name="deepseek_v3", heads=6, layers=3, experts=12)
MICRO_BATCHES, STEPS = 4, 4
RATE, LR = 0.125, 0.01
"""A rate that is exact in binary and large enough to change the choice of experts at once."""
BIAS = "e_score_correction_bias"
DEADLINE_S = 120.0


def full_model(seed: int = 0) -> nn.Module:
    """Make the tiny DeepSeek-V3, float32."""
    return hugging_face.build(SPEC, seed, idle_expert=True).float()


def batch(step: int, number: int) -> dict[str, Any]:
    """Draw a micro-batch of 4 to 7 tokens."""
    generator = torch.Generator().manual_seed(100 * step + number)
    ids, labels = torch.randint(SPEC.vocab, (2, 1, 4 + number), generator=generator)
    return {"input_ids": ids, "labels": labels, "loss_scale": 0.2}


@dataclass(frozen=True)
class Trace:
    """Counts and biases after each step: [step][layer] -> one number per expert."""

    loads: list[list[list[int]]]
    biases: list[list[list[float]]]


@functools.cache
def naive(rate: float = RATE) -> Trace:
    """Train the model itself with torch alone, counting choices one by one."""
    model: Any = full_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loads, biases = [], []
    for step in range(1, STEPS + 1):
        counters: list[Counter[int]] = [Counter() for _ in model.gates]
        optimizer.zero_grad()
        for number in range(MICRO_BATCHES):
            (model(**batch(step, number)) / MICRO_BATCHES).backward()
            for counter, gate in zip(counters, model.gates, strict=True):
                for token in gate.indices_TK.tolist():
                    counter.update(token)
        optimizer.step()
        for counter, gate in zip(counters, model.gates, strict=True):
            mean = sum(counter.values()) / SPEC.experts
            bias = gate.module.get_buffer(BIAS)
            for expert in range(SPEC.experts):
                count = counter[expert]
                bias[expert] += rate * ((mean > count) - (mean < count))
        loads.append([[counter[e] for e in range(SPEC.experts)] for counter in counters])
        biases.append([gate.module.get_buffer(BIAS).tolist() for gate in model.gates])
    return Trace(loads, biases)


# --- in the ranks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One engine, what it loads and the steps it runs."""

    fold: tuple[int, int, int] = (4, 2, 2)
    """World, tp, ep."""
    sections: Mapping[str, Any] | None = None
    """Of DeepSpeed's engine; None: the native one."""
    rate: float = RATE
    fault: bool = False
    """Let every lane's counts enter."""
    source: Path | None = None
    target: Path | None = None
    steps: tuple[int, int] = (1, STEPS)
    overflows: bool = False
    """In each step, on the last rank."""
    apart: bool = False
    """Each rank begins with biases of its own."""


def build(job: Job, runtime: RankRuntime) -> Any:
    """Make the engine of a job."""
    world, tp, ep = job.fold
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES // (world // tp),
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "tensor_parallel": {"autotp_size": tp},
        "expert_parallel": {"enabled": True, "autoep_size": ep, "preset_model": SPEC.name},
        "folding": {
            "engine": "native" if job.sections is None else "deepspeed",
            "correction_bias_rate": job.rate,
        },
        **(job.sections or {}),
    }
    model = full_model(0 if job.source is None else 9)
    if job.apart:
        for name, bias in model.named_buffers():
            if name.endswith(BIAS):
                bias += runtime.rank + torch.arange(SPEC.experts)
    parsed = FoldConfig.from_dict(config, world)
    return build_engine(model, parsed, runtime.rank, new_group=runtime.new_group)


def run(runtime: RankRuntime, job: Job) -> Trace:
    """Train and watch counts and biases."""
    engine = build(job, runtime)
    seen: list[Tensor] = []

    def watch(load: Tensor) -> Tensor:
        seen.append(load.clone())
        return load

    engine.points.plant("bias.load", watch)
    if job.fault:
        engine.points.plant("bias.counted", lambda _: True)
    if job.source is not None:
        checkpoint.load(engine, job.source, reshard=True)
    layout, gas = engine.groups.layout, engine.gradient_accumulation_steps()
    dp = layout.rank_in("dp", runtime.rank)
    biases = []
    for step in range(job.steps[0], job.steps[1] + 1):
        for number in range(dp * gas, (dp + 1) * gas):
            with torch.no_grad():
                engine(**batch(step, 0))  # what is not trained on is not counted
            engine.train(False)
            engine(**batch(step, 1))
            engine.train()
            loss = engine(**batch(step, number))
            if job.overflows and runtime.rank == layout.world_size - 1:
                loss = loss + float("inf") * loss
            engine.backward(loss)
            engine.step()
        found = {n: b for n, b in engine.module.named_buffers() if n.endswith(BIAS)}
        assert {b.dtype for b in found.values()} == {torch.float32}
        biases.append([found[name].tolist() for name in sorted(found)])
    if job.target is not None:
        engine.save_checkpoint(job.target)
    if job.sections is not None:
        engine.close()
    layers = [load.view(-1, SPEC.experts).tolist() for load in seen]
    return Trace(layers, biases)


def biases_drawn_apart(runtime: RankRuntime, job: Job) -> list[list[float]]:
    """Start from biases that each rank drew for itself; give those it begins with."""
    engine = build(replace(job, apart=True), runtime)
    if job.sections is None:
        engine.broadcast_weights()
    else:
        engine.close()
    return [b.tolist() for n, b in engine.module.named_buffers() if n.endswith(BIAS)]


# --- in the test ---------------------------------------------------------------------------------


def do(ranks: GangPool, job: Job) -> Trace:
    """Run a job; every rank must have seen and done the same."""
    world = job.fold[0]
    traces: list[Trace] = ranks.run(world, f"{HERE}:run", [job] * world, DEADLINE_S)
    assert all(trace == traces[0] for trace in traces)
    return traces[0]


ENGINES: dict[str, Mapping[str, Any] | None] = {
    "native": None,
    "zero-0": {},
    "zero-1": {"zero_optimization": {"stage": 1}},
    "zero-2": {"zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_bias_and_counts_are_those_of_one_process(deepspeed_ranks: GangPool, engine: str) -> None:
    """World 4, tp 2, ep 2, gas 2, uneven tokens, four steps: integers and biases are equal.

    The biases steer: from the second step on experts are chosen that would not be without them.
    """
    found = do(deepspeed_ranks, Job(sections=ENGINES[engine]))
    assert found.loads == naive().loads
    assert found.biases == naive().biases
    assert naive().loads[1] != naive(0.0).loads[1]


def test_one_micro_batch_a_step_and_no_lanes(deepspeed_ranks: GangPool) -> None:
    """World 4, dp 4, ep 4: the same counts from other places."""
    found = do(deepspeed_ranks, Job((4, 1, 4)))
    assert found == naive()


def test_counting_every_lane_is_caught(deepspeed_ranks: GangPool) -> None:
    """Planted: twice the tokens at tp 2. The bias hides the factor, the counts do not."""
    found = do(deepspeed_ranks, Job(fault=True))
    assert found.loads != naive().loads
    assert found.loads == [[[2 * n for n in row] for row in step] for step in naive().loads]
    assert found.biases == naive().biases


def test_rate_zero_leaves_the_bias(deepspeed_ranks: GangPool) -> None:
    """Off by default: nothing is counted, no collective, biases stay zero."""
    found = do(deepspeed_ranks, Job(rate=0.0, steps=(1, 1)))
    assert found.loads == []
    assert {value for row in found.biases[0] for value in row} == {0.0}


@pytest.mark.parametrize("engine", ["native", "zero-0", "zero-2"])
def test_ranks_that_drew_other_biases_begin_with_the_first(
    deepspeed_ranks: GangPool, engine: str
) -> None:
    """A router that adds another bias chooses other experts: lanes would route apart."""
    jobs = [Job(sections=ENGINES[engine])] * 4
    found = deepspeed_ranks.run(4, f"{HERE}:biases_drawn_apart", jobs, DEADLINE_S)
    first = [float(e) for e in range(SPEC.experts)]
    assert found[0]
    assert all(rank == [first] * len(found[0]) for rank in found)


def test_a_step_that_is_skipped_moves_no_bias(deepspeed_ranks: GangPool) -> None:
    """float16 with an infinite loss on one rank: no weight moves, and its counts are dropped."""
    fp16 = {"fp16": {"enabled": True, "loss_scale": 16.0}, "zero_optimization": {"stage": 1}}
    found = do(deepspeed_ranks, Job(sections=fp16, overflows=True, steps=(1, 2)))
    assert found.loads == []
    assert {value for row in found.biases[-1] for value in row} == {0.0}


def test_biases_are_saved_and_go_on_at_another_layout_and_engine(
    deepspeed_ranks: GangPool, tmp_path: Path
) -> None:
    """Two steps on ZeRO-1 at w4 tp 2, two more natively at w2 tp 2: one process's biases."""
    first = Job(sections=ENGINES["zero-1"], target=tmp_path, steps=(1, 2))
    do(deepspeed_ranks, first)
    found = do(deepspeed_ranks, Job((2, 2, 2), source=tmp_path, steps=(3, STEPS)))
    assert found.loads == naive().loads[2:]
    assert found.biases == naive().biases[2:]


# --- the rule, refusals --------------------------------------------------------------------------


def test_the_bias_moves_towards_the_mean_and_rests_there() -> None:
    """Mean 2: an expert with 4 goes down, one with 0 up, those with 2 stay; 7 / 3 has no rest."""
    assert towards_mean(torch.tensor([4, 0, 2, 2])).tolist() == [-1, 1, 0, 0]
    assert towards_mean(torch.tensor([2, 2, 3])).tolist() == [1, 1, -1]
    assert towards_mean(torch.tensor([0, 0])).tolist() == [0, 0]


def test_a_model_without_a_correction_bias_is_refused() -> None:
    """By key and value, before anything is folded."""
    spec = case.Model(layers=1, hidden=48, heads=4, vocab=8, experts=4, expert_width=4)
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "folding": {"preset": models.preset(spec), "correction_bias_rate": RATE},
    }
    model = models.build(spec, 0, idle_expert=False)
    parsed = FoldConfig.from_dict(config, 1)
    with pytest.raises(ConfigError, match=r"correction_bias_rate = 0\.125: no router .* buffer"):
        build_engine(model, parsed, 0)
    build_engine(model, replace(parsed, correction_bias_rate=0.0), 0)


def test_a_router_of_ones_own_keeps_its_correction_bias() -> None:
    """Declared in the config, sigmoid scores: experts are chosen by score + bias, and it moves."""
    spec = case.Model(
        layers=1, hidden=48, heads=4, vocab=8, experts=4, expert_width=4, score="sigmoid"
    )
    model = models.build(spec, 0, idle_expert=False)
    router = model.get_submodule("layers.0.moe.router")
    router.register_buffer(BIAS, torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.bfloat16))
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "folding": {"preset": models.preset(spec), "correction_bias_rate": 2.0**-10},
    }
    engine = build_engine(model, FoldConfig.from_dict(config, 1), 0)
    ids = torch.tensor([[1, 5, 2, 7, 0]])
    engine.backward(engine(ids, ids.roll(1), 0.2))
    (layer,) = engine.moe_layers()
    assert (layer.indices_TK == 3).any(-1).all()
    engine.step()
    bias = layer.get_router().get_buffer(BIAS)
    assert (bias.dtype, bias[3].item()) == (torch.float32, 5.0 - 2.0**-10)
