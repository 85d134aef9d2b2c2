"""Calibration: right runs do not alarm, planted losses are seen, and the report says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parity import calibrate, judge
from parity.calibrate import Draw, Figures
from parity.case import Case, make
from parity.store import FAILING, Row

REPORT = Path(__file__).resolve().parents[2] / "reports" / "calibration.md"


def small(dtype: str = "float32", **fields: Any) -> Case:
    """Make a case of two shares of a few tokens."""
    flat = {"shape.world": 2, "engine.dtype": dtype, "engine.backend": "threads",
            "data.length": 2, "data.sequences": 3, **fields}  # fmt: skip
    return make(flat, suite="s", file="f.toml")


def drawn(case: Case) -> Draw:
    """Give the first safe draw."""
    draws = (calibrate.make_draw(case, seed) for seed in range(12))
    return next(draw for draw in draws if draw is not None)


def failing(rows: Sequence[Row]) -> list[str | None]:
    """Name the tensors of the rows that do not pass."""
    return [row.tensor for row in rows if row.verdict in FAILING]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_other_orders_of_shares_and_sequences_pass(dtype: str) -> None:
    """Four orders of the same sums differ in bits and by less than the thresholds."""
    draw = drawn(small(dtype, **{"auxiliary.load_balance": 0.5, "engine.gas": 2}))
    outcomes = [calibrate.evaluate(draw, torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert [failing(calibrate.judged(draw, outcome)) for outcome in outcomes] == [[]] * 4
    first, *others = (o.gradients["layers.0.attention.q.weight"] for o in outcomes)
    assert any(not torch.equal(first, other) for other in others)


def test_the_smallest_scale_error_is_near_64_round_offs() -> None:
    """With an exact gradient 1 + 64 u is the limit; 1e-12 and 5e-6 are seen in their dtypes."""
    for dtype, promised in (("float64", 1e-12), ("float32", 5e-6)):
        draw = drawn(small(dtype))
        unit = 2.0**-53 if dtype == "float64" else 2.0**-24
        exact = {"embedding.weight": draw.truth.gradients["embedding.weight"].double()}
        found = calibrate.smallest_scale(draw, exact, 1.0)
        assert found == pytest.approx(64 * unit, rel=0.1)
        assert found < promised


def test_a_lost_token_of_96_is_seen_and_the_whole_batch_is_not() -> None:
    """Each dropped token fails a gradient; the same run with none dropped passes."""
    draw = drawn(calibrate.case_of_96_tokens("float32"))
    assert sum(batch.input_ids.numel() for (batch,) in draw.step) == 96
    for token in (0, 47, 48, 95):
        assert failing(calibrate.gradient_rows(draw, calibrate.without_token(draw, token, 0)))
    whole = calibrate.evaluate(draw, torch.Generator().manual_seed(0))
    assert not failing(calibrate.gradient_rows(draw, whole.gradients))


def test_a_row_of_round_off_alone_is_not_lost() -> None:
    """What is below one round-off of its matrix is no row to lose; ten round-offs are."""
    sizes = torch.tensor([1.0, 0.0, 1e-20, 0.9 * 2**-53, 10 * 2**-53], dtype=torch.float64)
    assert calibrate.living_rows(sizes[:, None] * torch.eye(5)[:1].double()).tolist() == [0, 4]


def figures(**changed: Any) -> Figures:
    """Give figures of a calibration that holds, but for what is changed."""
    made = Figures("float32", scale={"router": 4e-6}, rows={"router": (12, 5, 5)})
    made.runs["ranks as threads"] = 1000
    made.tokens = calibrate.Tokens(96, 96, 1e4)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {"alarms": ["one"]},
        {"tokens": calibrate.Tokens(96, 95, 0.5)},
        {"rows": {"router": (12, 5, 4)}},
        {"scale": {"router": float("inf")}},
    ],
)
def test_an_alarm_or_a_missed_loss_does_not_hold(changed: dict[str, Any]) -> None:
    """One false alarm, one token, one row or one scale error is enough."""
    assert calibrate.holds([figures()])
    assert not calibrate.holds([figures(), figures(**changed)])


def test_a_failing_row_of_a_benign_run_is_an_alarm() -> None:
    """Rows of a gradient doubled on purpose are counted as alarms, with the case named."""
    draw = drawn(small())
    outcome = calibrate.evaluate(draw, torch.Generator().manual_seed(0))
    doubled = {name: 2 * gradient for name, gradient in outcome.gradients.items()}
    found = Figures("float32")
    found.add("order", calibrate.gradient_rows(draw, doubled))
    assert found.runs.total() == 1
    assert f"order: {draw.case.id} gradient embedding.weight" in found.alarms


def test_the_report_names_command_and_counts() -> None:
    """The text holds the command, the number of runs, the alarms and the machine, no date."""
    text = calibrate.render([figures()], "parity calibrate --runs 1000", {"machine": "kind"})
    assert "`parity calibrate --runs 1000`" in text
    assert "**0 false alarms in 1000 benign runs**" in text
    assert "- machine: kind" in text
    assert not re.search(r"20\d\d-\d\d", text)


@pytest.mark.skipif(not REPORT.exists(), reason="no committed report")
def test_the_committed_report_keeps_what_is_promised() -> None:
    """No false alarm in 1,000 runs of each dtype, every loss seen, the guard is wide enough."""
    text = REPORT.read_text(encoding="utf-8")
    counts = re.findall(r"\*\*(\d+) false alarms in (\d+) benign runs", text)
    assert len(counts) == 2
    assert all(int(alarms) == 0 and int(runs) >= 1000 for alarms, runs in counts)
    rows = re.findall(r"^\| \w+ \| \d+ \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    tokens = re.findall(r"(\d+) of (\d+) seen", text)
    assert len(rows) >= 10
    assert len(tokens) == 2
    assert all(int(seen) == int(tried) > 0 for tried, seen in rows + tokens)
    worst = re.findall(r"router logit: ([\d.]+) u", text)
    assert 0.0 < max(map(float, worst)) <= judge.LOGIT_ERROR_U
