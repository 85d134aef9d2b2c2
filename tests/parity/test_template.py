"""Copies of a module: equal to it, tied where it is, and with memory of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from parity import models
from parity.case import make
from parity.template import Template


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_what_deepcopy_gives(tied: bool) -> None:
    """Names, values, structure, and one parameter where two names share one."""
    case = make({"shape.world": 1, "model.tied": tied, "model.biases": True}, suite="s", file="f")
    first = models.build(case.model, 0, idle_expert=False)
    other, expected = Template(first).copy(), copy.deepcopy(first)
    assert repr(other) == repr(expected)
    assert (other.head.weight is other.embedding.weight) == tied
    found, wanted = other.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_no_copy_shares_memory_with_another() -> None:
    """Ranks that are threads train theirs at once."""
    template = Template(nn.Linear(2, 2))
    one, two = template.copy(), template.copy()
    with torch.no_grad():
        one.weight.zero_()
    assert two.weight.any()
    assert template.copy().weight.any()


def test_a_frozen_parameter_stays_frozen() -> None:
    """And a buffer, and None in the place of a parameter, come along."""
    module: Any = nn.Linear(2, 2, bias=False)
    module.weight.requires_grad_(False)
    module.register_buffer("seen", torch.ones(3))
    other: Any = Template(module).copy()
    assert not other.weight.requires_grad
    assert other.bias is None
    assert other.seen.tolist() == [1.0, 1.0, 1.0]
