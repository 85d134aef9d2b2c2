"""What each rank is fed: other tokens everywhere, uneven, weighted right, equal on lanes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from parity import batches, case


def made(
    dp: int = 3, step: int = 1, seed: int = 0, **fields: Any
) -> list[list[batches.MicroBatch]]:
    """Draw the batches of a small case."""
    flat = {"shape.world": dp, "model.vocab": 11, "engine.gas": 2, **fields}
    return batches.make(case.make(flat, suite="s", file="f"), dp, step, seed)


def flat(drawn: list[list[batches.MicroBatch]]) -> list[batches.MicroBatch]:
    """List the micro-batches of all ranks."""
    return list(itertools.chain.from_iterable(drawn))


def test_every_rank_and_micro_batch_has_another_number_of_tokens() -> None:
    """Three dp ranks, gas 2, length 5: a permutation of 5 to 10; two sequences each."""
    drawn = made(**{"data.sequences": 2})
    assert [len(rank) for rank in drawn] == [2, 2, 2]
    shapes = sorted(tuple(batch.input_ids.shape) for batch in flat(drawn))
    assert shapes == [(2, length) for length in range(5, 11)]
    assert all(batch.labels.shape == batch.input_ids.shape for batch in flat(drawn))


def test_even_means_even() -> None:
    """The near miss: without `uneven` all have the shortest length."""
    assert {b.input_ids.shape[1] for b in flat(made(**{"data.uneven": False}))} == {5}


def test_the_mean_of_scaled_losses_is_the_mean_token_loss() -> None:
    """With token losses 1: the mean over ranks and micro-batches of scale * tokens is 1."""
    drawn = flat(made(**{"data.sequences": 3}))
    losses = [batch.loss_scale * batch.input_ids.numel() for batch in drawn]
    assert sum(losses) / len(losses) == pytest.approx(1.0, rel=1e-15)
    assert len(set(losses)) == 6  # a mean of local means would have been all ones


def test_the_scale_changes_from_step_to_step_where_asked() -> None:
    """step_scale 1/2: the third step's scale is a quarter of the first one's, tokens aside."""
    kept: dict[str, Any] = {"data.step_scale": 0.5}
    first, third = (flat(made(step=step, **kept))[0].loss_scale for step in (1, 3))
    assert third == pytest.approx(first / 4, rel=1e-15)


def test_tokens_differ_by_rank_micro_batch_step_and_seed_and_are_reproducible() -> None:
    """No two micro-batches share tokens; the same arguments give the same ones."""
    drawn = [*flat(made()), *flat(made(step=2)), *flat(made(seed=1))]
    texts = [str(batch.input_ids[:, :5].tolist()) + str(batch.labels[:, :5]) for batch in drawn]
    assert len(set(texts)) == 18
    again = flat(made())
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, drawn, strict=False))
    assert all(int(b.input_ids.min()) >= 0 and int(b.input_ids.max()) < 11 for b in drawn)


def test_lanes_see_the_same_tokens_and_without_a_probe_the_same_batch() -> None:
    """Lane-varying is off by default."""
    batch = flat(made())[0]
    assert batch.probes is None
    assert batch.for_lane(0) == batch.for_lane(1) == batch.for_mean(torch.float64)
    assert set(batch.for_lane(0)) == {"input_ids", "labels", "loss_scale", "probe"}


def varying(**fields: Any) -> batches.MicroBatch:
    """Draw the first micro-batch of a lane-varying case of tp 2."""
    shape = {"shape.world": 4, "shape.tp": 2, "data.lane_varying": True}
    return flat(made(2, **{**shape, **fields}))[0]


def test_each_lane_has_its_own_probe_and_the_objective_their_mean() -> None:
    """(tp, layers + 1, B, S, H); the mean is taken in the dtype asked for."""
    batch = varying()
    assert batch.probes is not None
    assert batch.probes.shape == (2, 3, *batch.input_ids.shape, 48)
    assert batch.probes.dtype == torch.float32
    first, second = batch.for_lane(0)["probe"], batch.for_lane(1)["probe"]
    assert not torch.equal(first, second)
    mean = batch.for_mean(torch.float64)["probe"]
    assert torch.equal(mean, (first.double() + second.double()) / 2)


def test_probes_are_exact_in_the_cases_dtype() -> None:
    """Reference and ranks read the same numbers, whatever the dtype."""
    low = varying(**{"engine.dtype": "bfloat16"}).probes
    assert low is not None
    assert low.dtype == torch.bfloat16


def test_folded_and_baseline_of_the_same_dp_are_fed_the_same() -> None:
    """Batches depend on dp, not on how a dp rank is cut into lanes."""
    shape = {"shape.world": 4, "shape.tp": 2}
    folded, plain = flat(made(2, **shape)), flat(made(2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(folded, plain, strict=True))
