"""Checkpoints: bit-exact resume, resharding, refusals that change nothing, death during a save."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from fold_impl import archive, checkpoint, states
from fold_impl.archive import CheckpointError
from fold_impl.config import FoldConfig
from fold_impl.engine import NativeEngine, build_engine
from parity import batches, models
from parity.case import Case, make
from parity.threads import ThreadRuntime
from tests.worlds import U, run_ranks

ROOT = Path(__file__).parents[2]
MICRO_BATCHES = 4
"""Micro-batches of one step over all dp ranks, whatever the layout: each has its own length."""
STEPS = 10
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.01}}
MOMENTUM = {"type": "SGD", "params": {"lr": 5e-2, "momentum": 0.9}}
LION = {"type": "Lion", "params": {"lr": 1e-3}}
SHAPES = {
    "one": (1, 1, 1, 1),
    "w4-tp2-ep4": (4, 2, 4, 1),
    "w8-tp4-ep4": (8, 4, 4, 1),
    "w4-tp2-ep2": (4, 2, 2, 1),
    "w4-tp4-etp2": (4, 4, 1, 2),
}
"""name -> world, tp, ep, etp."""
Fold = tuple[int, int, int, int]


def case(**fields: Any) -> Case:
    """Describe the tiny model; every dp rank and micro-batch has another number of tokens."""
    given = {"shape.world": 4, "model.shared_width": 24, "engine.dtype": "float64", **fields}
    return make(given, suite="test", file="test")


def full_model(seed: int = 0, **fields: Any) -> models.Tiny:
    """Make the model before it is folded, float64."""
    return models.build(case(**fields).model, seed, idle_expert=True)


def fold_config(fold: Fold, optimizer: Mapping[str, Any], gas: int) -> dict[str, Any]:
    """Write the config of a layout."""
    _, tp, ep, etp = fold
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "optimizer": dict(optimizer),
        "tensor_parallel": {"autotp_size": tp},
        "expert_parallel": {
            "enabled": True, "autoep_size": ep, "expert_tensor_parallel_size": etp,
        },
        "folding": {"preset": models.preset(case().model)},
    }  # fmt: skip


def build(
    runtime: ThreadRuntime,
    fold: Fold,
    optimizer: Mapping[str, Any] = ADAMW,
    seed: int = 0,
    schedule: bool = True,
    model: nn.Module | None = None,
) -> NativeEngine:
    """Fold the tiny model on this rank."""
    dp = fold[0] // fold[1]
    config = FoldConfig.from_dict(
        fold_config(fold, optimizer, MICRO_BATCHES // dp), world_size=fold[0]
    )
    engine = build_engine(
        model or full_model(seed), config, runtime.rank, new_group=runtime.new_group
    )
    if schedule:
        engine.lr_scheduler = scheduler_of(engine.optimizer)
    return engine


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Halve the learning rate after steps 2 and 6."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 6], gamma=0.5)


def step_batches(step: int) -> list[Mapping[str, Any]]:
    """Draw the micro-batches of a step, the same for every layout."""
    drawn = batches.make(case(), MICRO_BATCHES, step, 0)
    return [batch.for_mean(torch.float64) for (batch,) in drawn]


def train(engine: NativeEngine, first: int, last: int) -> list[float]:
    """Run steps first to last; give this rank's part of each step's loss."""
    layout, losses = engine.groups.layout, []
    gas = engine.gradient_accumulation_steps()
    dp = layout.rank_in("dp", engine.groups.rank)
    for step in range(first, last + 1):
        total = 0.0
        for batch in step_batches(step)[dp * gas : (dp + 1) * gas]:
            loss = engine(**batch)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / MICRO_BATCHES
        losses.append(total)
    return losses


def curve(fold: Fold, parts: Sequence[list[float]]) -> list[float]:
    """Add up the dp ranks' parts of the losses, each lane's being the same."""
    return [sum(values) for values in zip(*parts[:: fold[1]], strict=True)]


def snapshot(engine: NativeEngine) -> dict[str, Any]:
    """Copy everything a checkpoint restores on this rank."""
    optimizer = {
        name: {key: value.clone() if isinstance(value, Tensor) else value
               for key, value in entries.items()}
        for name, entries in engine.optimizer_state().items()
    }  # fmt: skip
    return {
        "weights": {name: t.clone() for name, t in engine.master_weights().items()},
        "optimizer": optimizer,
        "training": json.loads(json.dumps(engine.training_state())),
    }


def assert_same_bits(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare two snapshots bit for bit."""
    assert actual["training"] == expected["training"]
    assert list(actual["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        assert torch.equal(actual["weights"][name], weight), name
    for name, entries in expected["optimizer"].items():
        assert list(actual["optimizer"][name]) == list(entries), name
        for key, value in entries.items():
            assert_equal_value(actual["optimizer"][name][key], value, f"{name}.{key}")


def assert_equal_value(actual: object, expected: object, where: str) -> None:
    """Compare one entry of an optimizer's state, dtype and device included."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert (actual.dtype, actual.device) == (expected.dtype, expected.device), where
        assert torch.equal(actual, expected), where
    else:
        assert actual == expected and type(actual) is type(expected), where


def saved_run(
    runtime: ThreadRuntime, folder: Path, fold: Fold, optimizer: Mapping[str, Any] = ADAMW
) -> dict[str, Any]:
    """Train five steps, save, and give what was saved and the losses before and after."""
    engine = build(runtime, fold, optimizer)
    before = train(engine, 1, 5)
    engine.save_checkpoint(folder, client_state={"epoch": 3, "note": "é", "lr": [0.1, None]})
    kept = snapshot(engine)
    after = train(engine, 6, STEPS)
    return {"saved": kept, "losses": before + after, "end": snapshot(engine)}


def resumed_run(
    runtime: ThreadRuntime, folder: Path, fold: Fold, optimizer: Mapping[str, Any] = ADAMW
) -> dict[str, Any]:
    """Load into an engine over other weights and train the rest."""
    engine = build(runtime, fold, optimizer, seed=9)
    loaded = checkpoint.load(engine, folder, reshard=True)
    kept = snapshot(engine)
    losses = train(engine, 6, STEPS)
    return {"loaded": kept, "losses": losses, "end": snapshot(engine), "result": loaded}


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("optimizer", [ADAMW, MOMENTUM, LION], ids=["adamw", "momentum", "lion"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: Mapping[str, Any]) -> None:
    """Weights, optimizer state, schedule and counters come back; so do the five steps after."""
    fold = SHAPES["w4-tp2-ep4"]
    saved = run_ranks(4, partial(saved_run, folder=tmp_path, fold=fold, optimizer=optimizer))
    resumed = run_ranks(4, partial(resumed_run, folder=tmp_path, fold=fold, optimizer=optimizer))
    for one, other in zip(saved, resumed, strict=True):
        assert_same_bits(other["loaded"], one["saved"])
        assert other["losses"] == one["losses"][5:]
        assert_same_bits(other["end"], one["end"])
        assert other["result"].client_state == {"epoch": 3, "note": "é", "lr": [0.1, None]}
        assert other["result"].notes == ()
        assert one["saved"]["training"]["global_steps"] == 5
        assert one["saved"]["training"]["micro_steps"] == 10
