"""Quantity `checkpoint`: what comes back, and the steps that follow, at any layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fold_impl.adapter import FoldImplementation
from parity import checkpoint, threads
from parity.case import Case, make
from parity.compare import RowContext
from parity.errors import CaseError
from parity.implementation import Placement, Shard
from parity.judge import Judge, Later, Running
from parity.layout import Layout
from parity.pieces import Pieces
from parity.store import FAILING, Row
from parity.trial import KeptResult, Planted, RankResult

HERE = "tests.parity.test_checkpoint"
RESHARD = "reshard:w2-tp2-ep2"
W1 = "layers.0.moe.experts.w1"


class InThreads:
    """Ranks as threads of this process."""

    def start(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,
        backend: str | None = None,
    ) -> Running:
        """Start a world, as `parity.judge.Pool` says."""
        assert (world, task, backend) == (1, "parity.threads:run", None)
        assert deadline_s > 0
        return Later(lambda: [threads.run(None, order) for order in payloads])


def case(point: str | None, **fields: Any) -> Case:
    """Describe a small float64 case of 4 ranks in threads, two steps, AdamW."""
    given = {
        "shape.world": 4, "shape.tp": 2, "shape.ep": 4, "steps": 2, "checkpoint": point,
        "engine.dtype": "float64", "engine.backend": "threads", "optimizer.name": "adamw",
        "optimizer.weight_decay": 0.01, "model.layers": 1, "data.length": 3,
    }  # fmt: skip
    return make({**given, **fields}, suite="test", file="test")


def judged(
    point: str, *planted: Planted, implementation: str = "fold_impl", **fields: Any
) -> list[Row]:
    """Judge a case in this process."""
    return judge_of(implementation).with_planted(*planted).rows(case(point, **fields))


@functools.cache
def judge_of(implementation: str) -> Judge:
    """Share truths and baselines between the tests."""
    return Judge(implementation=implementation, pool=InThreads())


def of_checkpoint(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows of the quantity."""
    return [row for row in rows if row.quantity == "checkpoint"]


def kinds(rows: Sequence[Row]) -> set[str]:
    """Give what was compared."""
    return {str((row.detail or {})["kind"]) for row in rows}


def failing(rows: Sequence[Row]) -> list[Row]:
    """Keep what does not pass."""
    return [row for row in rows if row.verdict in FAILING]


# ---------------------------------------------------------------- whole cases


def test_a_resume_is_compared_in_weights_optimizer_state_and_what_follows() -> None:
    """Every row passes at threshold 0: 3 kinds, each moment of each weight its own row."""
    rows = judged("resume")
    assert failing(rows) == []
    found = of_checkpoint(rows)
    assert kinds(found) == {"parameter", "optimizer", "continued"}
    assert {row.threshold for row in found} == {0.0}
    assert {row.step for row in found} == {1}
    states = {(row.detail or {}).get("state") for row in found if row.tensor == W1}
    assert states == {None, "step", "exp_avg", "exp_avg_sq"}


def test_a_reshard_is_compared_bit_for_bit_and_its_steps_are_judged_at_the_new_layout() -> None:
    """Weights and state match on 2 ranks what 4 saved; step 2 there is judged like any other."""
    rows = judged(RESHARD)
    assert failing(rows) == []
    found = of_checkpoint(rows)
    assert kinds(found) == {"parameter", "optimizer"}
    assert {row.shape["world"] for row in found} == {2}
    notes = {note for row in found for note in (row.detail or {})["notes"]}
    assert len(notes) == 1
    assert "random state not restored" in notes.pop()
    there = [row for row in rows if row.shape["tp"] == row.shape["world"] == 2]
    there = [row for row in there if row.quantity != "checkpoint"]
    assert {row.step for row in there} == {2}
    assert {"update", "gradient", "replica", "loss"} <= {row.quantity for row in there}


class Forgetful(FoldImplementation):
    """fold_impl without the members a checkpoint needs."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("save", "load"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_an_implementation_without_save_and_load_is_said_to_be() -> None:
    """One skipped row, everything else judged as ever."""
    rows = judged("resume", implementation=f"{HERE}:Forgetful")
    (row,) = of_checkpoint(rows)
    assert (row.verdict, row.reason) == ("skipped", "the implementation offers no save and load")
    assert failing(rows) == []


# ---------------------------------------------------------------- planted faults


def by_dense_placement(value: Any, *, family: str, **_: Any) -> Any:
    """Place experts as a dense weight: dimension 0 over tp."""
    shards = (replace(value.shards[0], axis="tp"),) if family == "expert" else value.shards
    return replace(value, shards=shards)


def stale(value: Tensor, *, state: str | None, **_: Any) -> Tensor:
    """Keep the state a fresh optimizer has."""
    return value if state in (None, "step") else torch.zeros_like(value)


def of_the_neighbour(value: Tensor, *, state: str | None, family: str, **_: Any) -> Tensor:
    """Take the state another rank had at the other layout: each expert its neighbour's."""
    return value.roll(1, 0) if family == "expert" and state == "exp_avg" else value


def perturbed(value: Tensor, *, state: str | None, name: str, **_: Any) -> Tensor:
    """Change one weight by one unit in the last place."""
    if name != "norm.weight" or state is not None:
        return value
    value = value.clone()
    value[5] = torch.nextafter(value[5], value.new_tensor(torch.inf))
    return value


def test_an_expert_saved_and_loaded_by_the_dense_placement_is_caught() -> None:
    """checkpoint-family-swap: experts differ bit for bit, no other family does, cause named."""
    rows = judged("resume", Planted("checkpoint.placement", f"{HERE}:by_dense_placement"))
    found = failing(of_checkpoint(rows))
    assert {row.family for row in found} == {"expert"}
    assert "parameter" in kinds(found)
    assert {cause for row in found for cause in row.causes} >= {"checkpoint-family-swap"}


@pytest.mark.parametrize("point", ["resume", RESHARD])
@pytest.mark.parametrize("fault", ["stale", "of_the_neighbour"])
def test_optimizer_state_of_another_layout_is_caught(point: str, fault: str) -> None:
    """checkpoint-optimizer-stale: state differs, weights do not, and at another layout the update.

    What follows the load is not reported again as a finding of its own.
    """
    rows = judged(point, Planted("checkpoint.part", f"{HERE}:{fault}"))
    found = failing(of_checkpoint(rows))
    assert kinds(found) == {"optimizer"}
    assert {cause for row in found for cause in row.causes} >= {"checkpoint-optimizer-stale"}
    updates = [row for row in failing(rows) if row.quantity == "update"]
    assert bool(updates) == (point == RESHARD)
    assert {row.step for row in updates} <= {2}


class Hiding(FoldImplementation):
    """fold_impl that does not show its optimizer state."""

    def __getattribute__(self, name: str) -> Any:
        if name == "optimizer_state":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("fault", ["stale", "of_the_neighbour"])
def test_lost_state_is_caught_where_an_implementation_does_not_show_it(fault: str) -> None:
    """The weights after the next step differ from the uninterrupted run's."""
    planted = Planted("checkpoint.part", f"{HERE}:{fault}")
    rows = judged("resume", planted, implementation=f"{HERE}:Hiding")
    assert kinds(failing(of_checkpoint(rows))) == {"continued"}


def test_one_unit_in_the_last_place_of_one_weight_is_caught() -> None:
    """One entry of one tensor differs, and the row says which."""
    rows = judged("resume", Planted("checkpoint.part", f"{HERE}:perturbed"))
    (row,) = failing(of_checkpoint(rows))
    assert (row.tensor, row.error, row.reason) == ("norm.weight", 1.0, "1 of 48 entries differ")
    assert row.worst == {"rank": 0, "expert": None, "row": 5}


# ---------------------------------------------------------------- rows by hand


ABOUT = RowContext(
    "c", "i", {"world": 2}, {"dtype": "float64", "backend": "gloo"}, "reference", 1, torch.float64
)
LAYOUT = Layout(world=2, tp=2)
PLACEMENTS = {"w": Placement("attention", (Shard("tp", 0),))}


def kept(state: dict[str, list[Any]], weights: Sequence[Sequence[float]] = ((1, 2), (3, 4))) -> Any:
    """Make what two ranks kept: `state` gives each key's value by rank."""
    results = [
        RankResult(
            PLACEMENTS, [], (), {}, "float64",
            kept=KeptResult(
                Pieces.copied({"w": torch.tensor(weights[rank], dtype=torch.float64)}),
                Pieces.copied({key: torch.as_tensor(v[rank]) for key, v in state.items()}),
                (),
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    return checkpoint.rebuild(LAYOUT, PLACEMENTS, results)


def test_ranks_pieces_become_full_tensors_and_counters_stay_whole() -> None:
    """State is cut as its parameter, a counter is one number."""
    made = kept({"w|m": [[0.5, 0.25], [0.0, 1.0]], "w|step": [3.0, 3.0]})
    assert made.parameters.filled["w"].tolist() == [1, 2, 3, 4]
    assert made.state.filled["w|m"].tolist() == [0.5, 0.25, 0.0, 1.0]
    assert made.state.filled["w|step"].item() == 3.0


def test_state_that_was_not_loaded_or_not_saved_fails() -> None:
    """Either way round, and a state of another shape or dtype too."""
    full, empty = kept({"w|m": [[0.5, 0.25], [0.0, 1.0]]}), kept({})
    for saved, loaded, said in (
        (full, empty, "not loaded"),
        (empty, full, "not saved, yet there after the load"),
        (full, kept({"w|m": [0.5, 0.5]}), "() torch.float32 loaded, (4,) torch.float32 saved"),
    ):
        found = checkpoint.checkpoint_rows(ABOUT, saved, loaded, None)
        assert [row.verdict for row in found] == ["pass", "fail"]
        assert found[1].reason == said


def test_negative_zero_is_not_zero() -> None:
    """Bits are compared, not values: 1/x would tell them apart."""
    zeros, minus = (kept({}, ((sign * 0.0, 2), (3, 4))) for sign in (1, -1))
    (row,) = checkpoint.checkpoint_rows(ABOUT, zeros, minus, None)
    assert (row.verdict, row.error) == ("fail", 1.0)
    assert checkpoint.checkpoint_rows(ABOUT, zeros, zeros, None)[0].verdict == "pass"


# ---------------------------------------------------------------- the case


def test_a_checkpoint_stands_in_the_id_and_gives_the_shape() -> None:
    """Saved after half of the steps, rounded down."""
    made = case("reshard:w4-tp4-ep2-etp2", steps=5)
    assert "-steps5-reshard_w4_tp4_ep2_etp2-" in made.id
    assert "-steps2-resume-" in case("resume").id
    assert made.saved_after == 2
    assert made.resumed_shape.model_dump() == {"world": 4, "tp": 4, "ep": 2, "etp": 2, "pp": 1}
    assert case("resume").resumed_shape == case("resume").shape


@pytest.mark.parametrize(
    ("point", "fields", "said"),
    [
        ("resume", {"steps": 1}, "steps: no step is left behind the checkpoint"),
        ("again", {}, "checkpoint: is no checkpoint"),
        ("reshard:w4-ep4-tp2", {}, "checkpoint: is no checkpoint"),
        ("reshard:w4-tp2-ep4", {}, "checkpoint: is the case's own shape"),
        ("reshard:w4-tp3", {}, "checkpoint: tp 3 does not divide world 4"),
        ("reshard:w8-ep8", {}, "checkpoint: ep 8 does not divide model.experts 12"),
        ("reshard:w2", {"data.lane_varying": True}, "other lanes would have other consumers"),
    ],
    ids=["one step", "word", "order", "same", "tp", "ep", "lanes"],
)
def test_a_checkpoint_that_cannot_be_taken_is_refused(
    point: str, fields: dict[str, Any], said: str
) -> None:
    """The key, what is wrong, what would do."""
    with pytest.raises(CaseError, match="checkpoint") as refusal:
        case(point, **fields)
    assert said in str(refusal.value)
