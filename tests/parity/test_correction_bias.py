"""The reference follows a router's correction bias: counted one by one, by hand, and judged."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity import batches, hugging_face, reference
from parity.case import Case, make
from parity.judge import Judge
from parity.store import FAILING, Row
from parity.trial import Planted
from tests.parity.test_checkpoint import InThreads

pytest.importorskip("transformers", reason="transformers is in the extra `models`")
HERE = "tests.parity.test_correction_bias"
RATE = 0.125


def case(rate: float = RATE, **fields: Any) -> Case:
    """Describe a small DeepSeek-V3 of 4 ranks in threads, three steps."""
    given = {
        "model.name": "deepseek_v3", "model.heads": 6, "shape.world": 4, "shape.tp": 2,
        "shape.ep": 2, "engine.gas": 2, "engine.backend": "threads", "steps": 3,
        "engine.options.folding.correction_bias_rate": rate,
    }  # fmt: skip
    return make({**given, **fields}, suite="test", file="test")


class Gates(nn.Module):
    """Two routers with a correction bias each, of 4 experts."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second"):
            gate = nn.Module()
            gate.register_buffer(hugging_face.CORRECTION_BIAS, torch.zeros(4, dtype=torch.float64))
            self.add_module(name, gate)


def evaluation(*layers: list[list[int]]) -> reference.Evaluation:
    """Make the truth of a step whose two dp ranks and one micro-batch chose alike."""
    chosen = [torch.tensor(tokens) for tokens in layers]
    return reference.Evaluation(0.0, {}, [[chosen], [chosen]], 1.0)


def test_a_bias_moves_by_the_sign_of_its_distance_to_the_mean_load() -> None:
    """Loads (4, 0, 2, 2) and (2, 2, 2, 2): mean 2; a step later (8, 0, 0, 0) and the same again."""
    model, even = Gates(), [[0, 1], [2, 3]]
    first = evaluation([[0, 2], [0, 3]], even)
    second = evaluation([[0], [0], [0], [0]], even)
    for steps, expected in (
        ([], [0.0, 0.0, 0.0, 0.0]),
        ([first], [-RATE, RATE, 0.0, 0.0]),
        ([first, second], [-2 * RATE, 2 * RATE, RATE, RATE]),
    ):
        found = reference.biases_after(case(), model, steps)
        assert found[f"first.{hugging_face.CORRECTION_BIAS}"].tolist() == expected
        assert found[f"second.{hugging_face.CORRECTION_BIAS}"].tolist() == [0.0] * 4
    assert reference.biases_after(case(rate=0.0), model, [first]) == {}


def test_biases_steer_an_evaluation_and_do_not_stay_in_the_model() -> None:
    """A bias of 5 on expert 7 makes every token choose it, once."""
    asked = case()
    model = hugging_face.build(asked.model, 0, idle_expert=True)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    drawn = batches.make(asked, 1, 1, 0)
    name = next(n for n, _ in model.named_buffers() if n.endswith(hugging_face.CORRECTION_BIAS))
    bias = torch.zeros(12, dtype=torch.float64)
    bias[7] = 5.0
    steered = reference.evaluate(asked, model, weights, drawn, biases={name: bias})
    free = reference.evaluate(asked, model, weights, drawn)
    chosen = [layers[0] for rank in steered.routing for layers in rank]
    assert all(bool((tokens == 7).any(-1).all()) for tokens in chosen)
    assert not all(bool((layers[0] == 7).any(-1).all()) for rank in free.routing for layers in rank)
    assert not model.get_buffer(name).any()


# ---------------------------------------------------------------- whole cases


@functools.cache
def judge() -> Judge:
    """Share truths and baselines between the tests."""
    return Judge(implementation="fold_impl", pool=InThreads())


def failing(*planted: Planted) -> list[Row]:
    """Judge the case in this process; what does not pass."""
    rows = judge().with_planted(*planted).rows(case())
    assert {row.step for row in rows if row.quantity == "routing"} >= {1, 2, 3}
    return [row for row in rows if row.verdict in FAILING]


def shifted(load: Tensor) -> Tensor:
    """Plant: each expert gets its neighbour's load."""
    return load.roll(1)


def test_a_balanced_case_passes() -> None:
    """Routing of steps 2 and 3 rests on the biases, and is the reference's."""
    assert failing() == []


def test_a_bias_that_follows_another_load_is_caught_by_the_next_step_s_routing() -> None:
    """Step 1 is right, step 2 goes elsewhere."""
    rows = failing(Planted("bias.load", f"{HERE}:shifted"))
    assert {row.step for row in rows if row.quantity == "routing"} == {2, 3}
    assert 1 not in {row.step for row in rows}
