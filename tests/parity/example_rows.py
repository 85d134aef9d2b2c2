"""Rows made up by hand, and a judge that gives them without any rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parity.case import Case
from parity.layout import Layout
from parity.store import Row, engine_of, shape_of

THRESHOLD = 3.8e-6


def row(case: Case, quantity: str = "gradient", family: str | None = "router", **other: Any) -> Row:
    """Make a passing row of a case; `other` changes it."""
    passing = Row(
        case=case.id, implementation="fold_impl", shape=shape_of(case), engine=engine_of(case),
        against="reference", quantity=quantity, family=family, tensor=f"layers.0.{family}",
        step=1, ratio=1.0, scale=1.0, residual=1e-7, error=1e-7, threshold=THRESHOLD,
        verdict="pass", causes=(), worst=None, seconds=0.05,
    )  # fmt: skip
    return replace(passing, **other)


def passing(case: Case) -> list[Row]:
    """Make the rows of a case that holds, the baseline's own run included."""
    alone = Layout(world=case.layout.dp)
    keys = ("world", "pp", "tp", "dp", "ep", "etp", "edp")
    plain = {key: getattr(alone, key) for key in keys}
    return [
        row(case, "routing", None, ratio=None, scale=None, residual=None, error=0.0, threshold=0.0),
        row(case, "loss", None),
        row(case),
        row(case, family="expert"),
        row(case, family="expert", against="baseline"),
        row(case, family="expert", shape=plain),
        row(case, "replica", error=0.0, threshold=0.0, scale=None, ratio=None, residual=None),
        row(case, "grad_norm", None),
        row(case, "update", family="expert", detail={"end_to_end_scale": 1.0}),
    ]


def scaled(case: Case) -> list[Row]:
    """Make the rows of a case whose expert gradients are tp = 2 times too large."""
    wrong: dict[str, Any] = {
        "ratio": 2.0, "scale": 2.0, "error": 1.0, "verdict": "fail", "causes": ("tp",),
        "worst": {"rank": 3, "expert": 1, "row": 17},
    }  # fmt: skip
    return [
        replace(r, **wrong) if r.family == "expert" and r.shape == shape_of(case) else r
        for r in passing(case)
    ]


@dataclass
class FakeJudge:
    """Give made-up rows; `answers` holds what to give, or raise, where an id contains the key."""

    answers: dict[str, Callable[[Case], Sequence[Row]]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    opened: list[tuple[str, str, str, int]] = field(default_factory=list)
    is_open: bool = False
    absent: tuple[str, ...] = ()

    def rows(self, case: Case) -> Sequence[Row]:
        """Answer for one case."""
        assert self.is_open
        self.seen.append(case.id)
        for key, answer in self.answers.items():
            if key in case.id:
                return answer(case)
        return passing(case)

    @contextlib.contextmanager
    def open(
        self,
        implementation: str,
        device: str,
        first: Case,
        *,
        max_live_ranks: int,
        uses: Collection[str] = (),  # noqa: ARG002 - asked for by the protocol
    ) -> Iterator[FakeJudge]:
        """Stand in the place of `parity.session.open_judge`."""
        self.opened.append((implementation, device, first.id, max_live_ranks))
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False
