"""The suite `default`: what it covers, and exact worlds judged in this process."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parity import batches, judge, models, reference, threads
from parity.case import Case, Flat, flatten, make
from parity.case_files import Matrix, load_file, load_matrix, parse_file
from parity.errors import CaseError
from parity.store import FAILING, Row
from parity.trial import Planted

FILE = Path(__file__).resolve().parents[2] / "cases" / "default.toml"
SIXTY_FOUR_U = 64 * 2.0**-53


class ThreadPool:
    """Stands in for the gangs: every world is threads of this process."""

    def start(self, _world: int, task: str, payloads: Sequence[Any], *_: Any) -> judge.Running:
        """Run the order in threads, as the task asks for its results."""

        def finish() -> list[Any]:
            results = threads.run(None, payloads[0])
            return [results] if task == "parity.threads:run" else results

        return judge.Later(finish)


def rows_of(case: Case, **judging: Any) -> list[Row]:
    """Judge a case without processes."""
    return judge.Judge(implementation="fold_impl", pool=ThreadPool(), **judging).rows(case)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Give all cases of the file."""
    return load_file(FILE)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """Give the matrix of the file."""
    return load_matrix(FILE)


# --- coverage -----------------------------------------------------------------------------------


def test_the_suite_has_300_distinct_cells(cases: list[Case]) -> None:
    """A cell is a case id; no two cells differ in the id alone."""
    assert len({case.id for case in cases}) >= 300
    plain = [case.model_dump_json(exclude={"id"}) for case in cases]
    assert len({*plain}) == len(plain)


def test_every_pair_of_axis_values_occurs_unless_excluded(matrix: Matrix) -> None:
    """A pair that is missing cannot be completed: every filling in of the others is excluded."""
    excluded = [flatten(rule.when) for rule in parse_file(FILE).exclude]
    axes = list(matrix.axes.values())
    base = flatten(parse_file(FILE).base)
    draw = random.Random(0)
    present = {
        (i, cell[i], j, cell[j])
        for cell in matrix.choices
        for i, j in itertools.combinations(range(len(axes)), 2)
    }
    for i, j in itertools.combinations(range(len(axes)), 2):
        for a, b in itertools.product(range(len(axes[i])), range(len(axes[j]))):
            if (i, a, j, b) in present:
                continue
            for _ in range(300):
                cell = [draw.randrange(len(entries)) for entries in axes]
                cell[i], cell[j] = a, b
                fields: Flat = dict(base)
                for entries, at in zip(axes, cell, strict=True):
                    fields |= entries[at]
                assert any(hits(fields, when) for when in excluded), (axes[i][a], axes[j][b])


def hits(fields: Flat, when: Flat) -> bool:
    """Say whether an exclusion applies, by the test's own reading of it."""
    full = {"shape.tp": 1, "steps": 1, **fields}
    return all(
        full.get(key) in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in when.items()
    )


def test_the_pairs_that_must_not_be_lost(cases: list[Case]) -> None:
    """What hides faults stands in the suite: odd sizes, gas, top-k, ties, losses, optimizers."""
    sizes = {s for c in cases for s in (c.layout.tp, c.layout.dp, c.layout.ep, c.layout.edp)}
    assert {2, 3, 5, 6} <= sizes
    assert {c.engine.gas for c in cases} >= {1, 3, 5}
    assert {c.model.top_k for c in cases} == {1, 2, 4}
    assert {c.optimizer.name for c in cases} == {"sgd", "momentum", "adam", "adamw", "lion"}
    assert {c.optimizer.eps for c in cases if c.optimizer.name == "adam"} == {1e-15, 1e-8, 1.0}
    assert {c.engine.dtype for c in cases} == {"float64", "float32", "bfloat16"}
    assert {c.auxiliary.scope for c in cases if c.auxiliary.load_balance} == {"rank", "global"}
    assert any(c.auxiliary.z_loss for c in cases)
    assert any(c.steps > 1 and c.data.step_scale != 1.0 for c in cases)
    for wanted in ("ties", "lane_varying", "idle_expert", "uneven"):
        assert {getattr(c.data, wanted) for c in cases} == {False, True}


def test_exact_worlds_have_24_to_60_ranks(cases: list[Case]) -> None:
    """Large worlds run in float64 on threads, dp and edp of 3, 5, 6 or 15 among them."""
    large = [case for case in cases if case.shape.world >= 24]
    assert {case.shape.world for case in large} == {24, 30, 36, 48, 60}
    assert {(c.engine.dtype, c.engine.backend) for c in large} == {("float64", "threads")}
    assert {3, 5, 6, 15} <= {size for c in large for size in (c.layout.dp, c.layout.edp)}


# --- exact ties ---------------------------------------------------------------------------------


def tied(**fields: Any) -> Case:
    """Make a case whose experts tie in threes, float32 on threads."""
    flat = {
        "shape.world": 4, "shape.tp": 2, "shape.ep": 4, "engine.backend": "threads",
        "engine.dtype": "float32", "data.ties": True, **fields,
    }  # fmt: skip
    return make(flat, suite="s", file="f.toml")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tied_logits_are_bitwise_equal_in_every_dtype(top_k: int) -> None:
    """Experts 0-2, 3-5, 6-8 and 9-11 have one logit each; of a tied group the lowest are chosen."""
    spec = tied(**{"model.top_k": top_k}).model
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        moe = models.moe_layers(models.build(spec, 3, idle_expert=False, ties=True))[0].to(dtype)
        moe(torch.randn(1, 7, spec.hidden, generator=torch.Generator().manual_seed(1)).to(dtype))
        for group in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)):
            assert bool((moe.logits_TE[:, group] == moe.logits_TE[:, group[:1]]).all())
        for chosen in moe.indices_TK.tolist():
            for expert in chosen:
                lower = range(expert - expert % 3, expert)
                assert {*lower} <= {*chosen}


def test_the_margin_of_tied_logits_is_the_gap_between_groups() -> None:
    """Groups at 5, 3 and 2: one or two chosen rest on 5 - 3, four on 3 - 2 as well."""
    logits_TE = torch.tensor([[5.0, 5.0, 5.0, 3.0, 3.0, 3.0, 2.0]])
    assert reference.selection_margin(logits_TE, 2) == 0.0
    margins = [reference.selection_margin(logits_TE, k, ties=True) for k in (1, 2, 4)]
    assert margins == [2.0, 2.0, 1.0]


def test_an_implementation_that_breaks_ties_otherwise_fails() -> None:
    """Logits a hair higher for higher indices route elsewhere: the routing rows say so."""
    assert not [row for row in rows_of(tied()) if row.verdict in FAILING]
    planted = Planted("router.logits", "tests.parity.test_default_suite:favour_higher")
    failing = [row for row in rows_of(tied(), planted=(planted,)) if row.verdict in FAILING]
    assert "routing" in {row.quantity for row in failing}


def favour_higher(logits_TE: torch.Tensor, **_: Any) -> torch.Tensor:
    """Add a few round-offs that grow with the index."""
    return logits_TE + 1e-5 * torch.arange(logits_TE.shape[-1])


@pytest.mark.parametrize(
    ("fields", "key"), [({"model.top_k": 3}, "model.top_k"), ({"steps": 2}, "steps")]
)
def test_ties_that_would_not_be_exact_or_not_cut_are_refused(
    fields: dict[str, Any], key: str
) -> None:
    """Three of a group of three cut no tie, and after a step tied rows have moved apart."""
    with pytest.raises(CaseError, match=key):
        tied(**fields)


# --- routing guard ------------------------------------------------------------------------------


def test_a_seed_too_near_a_tie_is_drawn_again_and_the_rows_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the guard just above the margin of the first seed, the rows tell of a further draw."""
    case = tied(**{"data.ties": False})

    def margin(seed: int) -> float:
        model = models.build(case.model, seed, idle_expert=True)
        drawn = batches.make(case, case.layout.dp, 1, seed)
        weights = {n: p.detach().float() for n, p in model.named_parameters()}
        return reference.evaluate(case, model, weights, drawn).margin

    margins = {seed: margin(seed) for seed in range(4)}
    seed = min(margins, key=margins.__getitem__)
    assert margins[seed] < margin(seed + 1000)
    guard = 1.001 * margins[seed] / (judge.LOGIT_ERROR_U * 2.0**-24)
    monkeypatch.setattr(judge, "GUARD", guard)
    rows = rows_of(case.model_copy(update={"seed": seed}))
    assert {(row.detail or {}).get("draws") for row in rows} == {2}
    monkeypatch.setattr(judge, "GUARD", guard * 0.99)
    rows = rows_of(case.model_copy(update={"seed": seed}))
    assert not any("draws" in (row.detail or {}) for row in rows)


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [24, 30, 36])
def test_an_exact_world_is_within_64_round_offs(cases: list[Case], world: int) -> None:
    """The cheapest case of each world: nothing fails, every gradient within 7.1e-15."""
    case = [c for c in cases if c.shape.world == world][-1]
    rows = rows_of(case)
    assert not [(row.tensor, row.reason) for row in rows if row.verdict in FAILING]
    gradients = [row for row in rows if row.quantity == "gradient"]
    assert gradients
    assert max(row.error or 0.0 for row in gradients) <= SIXTY_FOUR_U


def test_low_precision_replays_the_routing_of_the_reference() -> None:
    """In bfloat16 two steps pass with the reference's routing forced, without a redraw."""
    case = make(
        {"shape.world": 4, "shape.tp": 2, "shape.ep": 4, "engine.backend": "threads",
         "engine.dtype": "bfloat16", "steps": 2, "data.length": 12}, suite="s", file="f.toml",
    )  # fmt: skip
    rows = rows_of(case)
    assert not [(row.tensor, row.reason) for row in rows if row.verdict in FAILING]
    routing = [row for row in rows if row.quantity == "routing"]
    assert {row.step for row in routing} == {1, 2}
    assert all(row.error == 0.0 for row in routing)
    assert not any("draws" in (row.detail or {}) for row in rows)
