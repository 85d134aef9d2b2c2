"""Which single tokens a wrong gradient lacks or has twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parity import tokens
from parity.case import Case
from parity.errors import UsageError
from parity.judge import Judge
from parity.tokens import Token
from parity.trial import Planted
from tests.parity.test_explain import Here, case

CASES = {
    "gas": case(shape__world=4, shape__tp=2, shape__ep=2, engine__gas=3, data__length=2),
    "auxiliary": case(
        shape__world=6, shape__tp=3, shape__ep=2, data__lane_varying=True,
        auxiliary__load_balance=0.05, auxiliary__z_loss=0.01,
    ),
}  # fmt: skip


def without_token(batch: dict[str, Any], *, micro_batch: int, **_: Any) -> dict[str, Any]:
    """Leave the loss of token 1 out of the first micro-batch, on every rank that has one there."""
    if micro_batch:
        return batch
    labels = batch["labels"].clone()
    labels[0, 1] = -100
    return {**batch, "labels": labels}


def doubled(value: Tensor, *, micro_batch: int, **_: Any) -> Tensor:
    """Count the first micro-batch twice."""
    return value * 2 if micro_batch == 0 else value


def judged(name: str, point: str, function: Any) -> tuple[Judge, Case, list[Any]]:
    """Judge a case with a fault."""
    planted = Planted(point, f"{__name__}:{function.__name__}")
    judge = Judge(implementation="fold_impl", pool=Here(), planted=(planted,))
    return judge, CASES[name], judge.rows(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_lost_token_is_named(name: str) -> None:
    """Coefficient 0 on that token of each dp rank, 1 on all others, in every family split."""
    judge, of, rows = judged(name, "batch.inputs", without_token)
    if of.data.lane_varying:  # its probe is still there: nothing of a token but its loss is lost
        of = of.model_copy(update={"data": of.data.model_copy(update={"lane_varying": False})})
        rows = judge.rows(of)
    found = tokens.fits(judge, of, rows)
    assert found
    lost = {Token(rank, 0, 0, 1) for rank in range(of.layout.dp)}
    exact = [fit for fit in found if fit.odd is not None]
    assert exact
    for fit in exact:
        assert set(fit.odd or ()) == lost
        assert all(abs(c) < 1e-6 for c in (fit.odd or {}).values())
        assert fit.auxiliary is None or fit.auxiliary == pytest.approx(1.0)
    said = tokens.lines(found)
    assert any("dp rank 1, micro-batch 0, sequence 0, position 1: x" in line for line in said)


def test_a_doubled_micro_batch_is_all_its_tokens() -> None:
    """What the shares of (rank, micro-batch) say, token by token."""
    judge, of, rows = judged("gas", "batch.loss", doubled)
    found = [fit for fit in tokens.fits(judge, of, rows) if fit.odd is not None]
    assert found
    for fit in found:
        assert {token.micro_batch for token in fit.odd or ()} == {0}
        assert all(c == pytest.approx(2.0) for c in (fit.odd or {}).values())


def test_what_passes_has_nothing_to_split() -> None:
    """And a foreign model is refused with what would do."""
    judge = Judge(implementation="fold_impl", pool=Here())
    of = CASES["gas"]
    found = tokens.fits(judge, of, judge.rows(of))
    assert found == []
    assert tokens.lines(found) == ["no failing gradient of the small model to split over tokens"]
    foreign = of.model_copy(update={"model": of.model.model_copy(update={"name": "mixtral"})})
    with pytest.raises(UsageError, match="--tokens needs the tiny model"):
        tokens.fits(judge, foreign, [])


def test_too_few_numbers_say_nothing() -> None:
    """More columns than half the numbers of a tensor: no fit is exact by merit."""
    actual = torch.ones(4, dtype=torch.float64)
    columns = {Token(0, 0, 0, s): {"w": torch.rand(4, dtype=torch.float64)} for s in range(3)}
    fit = tokens._fit("w", 1, actual, columns, None)
    assert fit.odd is None
    assert "no weighted sum of the 3 tokens" in tokens.lines([fit])[0]
