"""Optimizer, schedule and generators as plain values."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fold_impl.archive import CheckpointError
from fold_impl.families import FoldedParameter, Placement
from fold_impl.states import (
    Grouping,
    PlainError,
    check_trainer_state,
    from_plain,
    load_optimizer_state,
    load_trainer_state,
    optimizer_state,
    to_plain,
    trainer_state,
)

ONE = Grouping([["a"]], [0])
"""One group that is as it was given."""


@pytest.mark.parametrize(
    "value",
    [
        {"lr": 0.1, "best": float("inf"), "betas": (0.9, [1, None])},
        {2: 1, 6: 2},
        Counter({2: 1, 6: 2}),
        {"$odd": (True, "é", -float("inf"))},
        [],
        {},
        ((), {"inner": {3: (4,)}}),
    ],
    ids=["mapping", "integer keys", "counter", "dollar", "empty list", "empty", "nested"],
)
def test_a_value_comes_back_equal_and_of_its_kind(value: Any) -> None:
    """Through strict JSON text."""
    text = json.dumps(to_plain(value), allow_nan=False)
    returned = from_plain(json.loads(text))
    assert returned == value
    assert repr(returned) == repr(value)


def test_a_tensor_of_one_value_keeps_its_dtype() -> None:
    """A capturable learning rate is a 0-d tensor."""
    returned = from_plain(json.loads(json.dumps(to_plain(torch.tensor(0.1)))))
    assert returned.dtype == torch.float32
    assert torch.equal(returned, torch.tensor(0.1))


def test_what_has_no_plain_form_is_refused_with_its_place() -> None:
    """A function inside a schedule names where it is."""
    with pytest.raises(PlainError, match=r"phases\[1\]\.call is a builtin_function"):
        to_plain({"phases": [1, {"call": len}]})
    with pytest.raises(PlainError, match="value is a set"):
        to_plain({1})


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3], gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            ],
            [2],
        ),
    ],
    ids=["multistep", "cosine", "lambda", "onecycle", "sequential"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_torch_s_schedules_go_on_where_they_were(make: Any) -> None:
    """Three steps, saved as JSON, then the same learning rates as the run that went on."""

    def trainer() -> tuple[torch.optim.SGD, Any]:
        weight = nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        return optimizer, make(optimizer)

    def run(optimizer: torch.optim.SGD, schedule: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    first, other = trainer(), trainer()
    run(*first, 3)
    saved = json.loads(json.dumps(trainer_state(*first, ONE), allow_nan=False))
    check_trainer_state(trainer_state(*other, ONE), saved)
    other[0].step()
    load_trainer_state(*other, ONE, saved)
    assert run(*other, 4) == run(*first, 4)


def named(*weights: nn.Parameter) -> list[FoldedParameter]:
    """Name weights a, b, ..."""
    return [
        FoldedParameter(name, weight, Placement("dense"))
        for name, weight in zip("abc", weights, strict=False)
    ]


def test_other_groups_are_refused() -> None:
    """The same two weights in one group or in two are two runs."""
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    together = torch.optim.SGD([one, other], lr=0.1)
    apart = torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=0.1)
    members = named(one, other)
    states = [trainer_state(o, None, Grouping.whole(o, members)) for o in (together, apart)]
    check_trainer_state(states[0], states[0])
    with pytest.raises(CheckpointError, match=r"groups of \[2\] parameters, found .*\[1, 1\]"):
        check_trainer_state(*states)


def test_loaded_state_replaces_all_that_was_there() -> None:
    """A weight without saved state loses its own; a counter stays a CPU tensor."""
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer, members = torch.optim.Adam([one, other]), named(one, other)
    for weight in (one, other):
        weight.grad = torch.ones(2)
    optimizer.step()
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.full((2,), 0.5)}
    load_optimizer_state(optimizer, members, {"a": moments})
    state = optimizer_state(optimizer, members)
    assert state["b"] == {}
    assert state["a"]["step"] == 7.0
    assert list(state["a"]) == ["step", "exp_avg"]


# ---------------------------------------------------------------- groups an engine has split

SPLIT = Grouping([["a"], ["c"], ["b"]], [0, 0, 2])
"""Two groups of which the first was split by family; the one between them held nothing trained."""


def split_optimizer(*rates: float) -> torch.optim.SGD:
    """Make an optimizer of three groups."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, momentum=0.9)


def test_a_checkpoint_knows_groups_as_they_were_given() -> None:
    """Parts of one group are one: names together, options and the schedule's rates once."""
    optimizer = split_optimizer(0.1, 0.1, 0.2)
    optimizer.param_groups[0] |= {"name": "dense", "moe": False}
    state = trainer_state(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), SPLIT)
    assert [group["names"] for group in state["groups"]] == [["a", "c"], ["b"]]
    assert [group["options"]["lr"] for group in state["groups"]] == [0.1, 0.2]
    assert state["scheduler"]["state"]["base_lrs"] == [0.1, 0.2]


def test_what_was_given_is_set_in_every_part() -> None:
    """Saved by an engine that had the two groups whole, with other rates."""
    whole, optimizer = split_optimizer(0.3, 0.4), split_optimizer(0.1, 0.1, 0.2)
    two = Grouping([["a", "c"], ["b"]], [0, 1])
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (whole, optimizer)]
    saved = json.loads(json.dumps(trainer_state(whole, schedules[0], two)))
    check_trainer_state(trainer_state(optimizer, schedules[1], SPLIT), saved)
    load_trainer_state(optimizer, schedules[1], SPLIT, saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3, 0.4]
    assert schedules[1].base_lrs == [0.3, 0.3, 0.4]


def test_options_that_differ_between_parts_of_a_group_are_refused() -> None:
    """They could not be given to a layout that splits the group elsewhere."""
    with pytest.raises(CheckpointError, match=r"parameter group 0: options differ .* found"):
        trainer_state(split_optimizer(0.1, 0.2, 0.2), None, SPLIT)
