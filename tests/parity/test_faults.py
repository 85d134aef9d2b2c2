"""Planted faults: each is seen where it must be, invisible where algebra says so, and no more.

`FAULT_DRAWS` is how many random shapes and seeds each equivalence is tried on, and how many seeds
the clean suite; `make suites` sets it to 50 and 20.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from parity import case as cases
from parity import case_files, causes, models, threads
from parity.case import Case
from parity.cli import main
from parity.collect import bits
from parity.compare import FACTOR, UNIT_ROUNDOFF
from parity.errors import CaseError
from parity.faults import runs, transforms
from parity.faults.catalogue import BY_ID, FAULTS, OWN, Blind, Fault, facts, holds
from parity.faults.detectors import DETECTORS, LEGEND, Seen
from parity.judge import Judge
from parity.optimizers import LINEAR
from parity.store import case_verdict
from parity.trial import Order, Planted, RankResult

DRAWS = int(os.environ.get("FAULT_DRAWS", "1"))
FILE = Path(__file__).parents[2] / "cases" / "faults.toml"
EVERY = [variant for fault in FAULTS for variant in fault.all_variants()]


@functools.cache
def suite() -> tuple[Case, ...]:
    """Give the cases of cases/faults.toml."""
    return tuple(case_files.load_file(FILE))


@functools.cache
def judge() -> Judge:
    """Give one judge to all tests of this process: its clean runs are made once."""
    return Judge(implementation="fold_impl", pool=runs.Ranks())


# ---------------------------------------------------------------- the catalogue


def test_the_catalogue_is_large_enough_and_partly_our_own() -> None:
    """At least 45 faults, variants counted once, and at least seven findings of our own."""
    assert len(FAULTS) >= 45
    assert len(BY_ID) == len(FAULTS)
    assert len(OWN & set(BY_ID)) >= 7
    assert set(BY_ID) >= OWN


@pytest.mark.parametrize("fault", EVERY, ids=lambda fault: fault.id)
def test_a_fault_says_where_it_shows_and_what_causes_it(fault: Fault) -> None:
    """Some case of the suite must show it, none that algebra excludes; its cause has a name."""
    shown = [case for case in suite() if fault.can_show(case)]
    assert shown
    for blind in fault.cannot:
        assert not any(holds(blind.when, case) for case in shown), blind.when
    assert fault.true_cause in causes.BY_ID
    assert fault.signature
    assert fault.imitates
    assert hasattr(transforms, fault.transform)


def test_a_fault_is_planted_by_values_that_travel() -> None:
    """Amounts are numbers of the case's own shape: dp / edp = 2 / 1 on 4 ranks with tp 2, ep 4."""
    planted = BY_ID["expert-edp-mean"].planted(suite()[0])
    assert planted.options == {"factor": 2.0, "families": ("expert",)}
    assert (planted.point, planted.transform) == (
        "reduce.reduced", "parity.faults.transforms:scaled",
    )  # fmt: skip


def test_facts_of_a_case_know_groups_and_ragged_shares() -> None:
    """tp 2: 5 and 6 tokens, 5 is odd; dp groups 02 13, while every edp group is one rank."""
    found = facts(suite()[0])
    assert (found["tp"], found["dp"], found["edp"]) == (2, 2, 1)
    assert found["ragged"]
    assert not found["same_groups"]
    same = cases.make({"shape.world": 8, "shape.tp": 4, "shape.ep": 4}, suite="s", file="f")
    assert facts(same)["same_groups"]


# ---------------------------------------------------------------- each is seen


def test_the_smallest_set_is_two_shapes_and_adam_on_the_first() -> None:
    """A rule's fault needs no more than what the head of the suite offers, and ZeRO once."""
    chosen = runs.choose(replace(BY_ID["router-skip"], real=False), suite())
    assert [(c.engine.name, c.shape.world, c.shape.tp, c.optimizer.name) for c in chosen] == [
        ("native", 4, 2, "sgd"), ("native", 4, 4, "sgd"), ("native", 4, 2, "adam"),
        ("deepspeed", 4, 2, "sgd"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gas-missing", "expert-wrong-group"])
def test_what_deepspeeds_engine_does_itself_is_not_planted_there(name: str) -> None:
    """A point that it does not pass would plant nothing, and the fault would seem to survive."""
    assert {case.engine.name for case in runs.choose(BY_ID[name], suite())} == {"native"}


FAST = (
    "router-skip", "layernorm-skip", "sharded-averaged", "expert-edp-mean", "expert-wrong-group",
    "restore-own-rows", "input-grad-partial", "ep-group-order", "a2a-wrong-adjoint",
    "prob-gather-detached", "etp-all-gather-only", "lanes-enter-raw", "local-mean-loss",
    "last-microbatch-only", "reduce-each-microbatch", "aux-per-rank", "bucket-last-element",
    "zero-token-none", "norm-expert-mean", "clip-ignored", "optimizer-state-lost",
)  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_a_fault_is_killed_in_its_first_case(name: str) -> None:
    """A subset for every commit; `parity faults run` kills and diagnoses all of them."""
    case = runs.choose(replace(BY_ID[name], real=False), suite())[0]
    seen = runs.observe(BY_ID[name], case, judge())
    assert case_verdict(seen.rows) in ("fail", "leak")
    assert runs.diagnose([seen])


@pytest.mark.parametrize("name", ["router-sum:1+1e-6", "router-sum:1.001"])
def test_a_factor_no_practice_sees_is_seen(name: str) -> None:
    """1 + 1e-6 in float64 is far above 64 u and far below every tolerance of the field."""
    fault = next(f for f in EVERY if f.id == name)
    seen = runs.observe(fault, suite()[0], judge())
    assert [n for n, sees in DETECTORS.items() if sees(seen)] == ["ours"]


@pytest.mark.parametrize("seed", range(1, 1 + max(2, DRAWS * 2 // 5)))
def test_the_clean_suite_raises_no_alarm(seed: int) -> None:
    """Without a fault every exact case passes with every seed."""
    chosen = suite() if DRAWS > 10 else suite()[seed::9]
    for case in (c for c in chosen if c.engine.backend == "threads"):
        rows = judge().rows(case.model_copy(update={"seed": seed}))
        bad = [
            (r.quantity, r.tensor, r.error) for r in rows if r.verdict not in ("pass", "skipped")
        ]
        assert not bad, (case.id, bad)


def test_a_planted_run_leaves_no_trace_in_the_next_clean_one() -> None:
    """The same judge, faulty and clean by turns."""
    own = Judge(implementation="fold_impl", pool=runs.Ranks())
    case = suite()[0]
    faulty = [case_verdict(runs.observe(BY_ID["router-skip"], case, own).rows) for _ in range(2)]
    assert faulty == ["fail", "fail"]
    assert case_verdict(own.rows(case)) == "pass"


# ---------------------------------------------------------------- diagnosis reads rows alone


STRIPPED = ("expert-uncancelled", "input-grad-partial", "last-microbatch-only", "router-skip")


@pytest.mark.parametrize("name", STRIPPED)
def test_renamed_faults_get_the_same_causes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the fault's id, nor its transformation's name, nor the case's id is evidence."""
    fault = BY_ID[name]
    chosen = runs.choose(replace(fault, real=False), suite())[:2]
    told = runs.diagnose([runs.observe(fault, case, judge()) for case in chosen])

    stranger = types.ModuleType("stranger")
    stranger.f = getattr(transforms, fault.transform)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stranger", stranger)
    seen = []
    for number, case in enumerate(chosen):
        other = case.model_copy(update={"id": f"c{number}", "suite": "s", "file": "f"})
        planted = fault.planted(case)
        own = judge().with_planted(Planted(planted.point, "stranger:f", planted.options))
        rows = own.rows(other)
        assert own.last is not None
        seen.append(Seen(own.last, rows))
    assert runs.diagnose(seen) == told
    assert fault.true_cause in told


# ---------------------------------------------------------------- invisible by algebra


def draw(rng: random.Random) -> dict[str, Any]:
    """Draw the fields of a tiny case."""
    world = rng.choice((2, 3, 4, 4, 6))
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    tp, etp = rng.choice(divisors), rng.choice((1, 1, 2, 3))
    ep = rng.choice([d for d in divisors if world % (d * etp) == 0] or [1])
    optimizer = rng.choice(("sgd", "momentum", "adam"))
    return {
        "shape.world": world, "shape.tp": tp, "shape.ep": ep, "shape.etp": etp,
        "model.layers": rng.choice((1, 1, 2)), "model.mlp_width": 12, "model.expert_width": 6,
        "model.vocab": 11, "model.experts": ep * rng.choice([n for n in (1, 2, 4) if ep * n >= 4]),
        "model.top_k": rng.choice((1, 2)), "model.normalize": rng.random() < 0.7,
        "model.biases": rng.random() < 0.3, "model.tied": rng.random() < 0.3,
        "model.shared_width": rng.choice((0, 0, 12)),
        "engine.dtype": "float64", "engine.backend": "threads",
        "engine.gas": rng.choice((1, 1, 2, 3)), "engine.clip": rng.choice((0.0, 0.5)),
        "auxiliary.load_balance": rng.choice((0.0, 0.02)),
        "auxiliary.z_loss": rng.choice((0.0, 1e-3)),
        "auxiliary.scope": rng.choice(("rank", "global")),
        "data.length": rng.choice((2, 3, 4)), "data.uneven": rng.random() < 0.5,
        "data.lane_varying": rng.random() < 0.5, "data.idle_expert": rng.random() < 0.5,
        "optimizer.name": optimizer, "optimizer.weight_decay": rng.choice((0.0, 0.1)),
        "steps": rng.choice((1, 1, 2)), "seed": rng.randrange(10_000),
    }  # fmt: skip


def drawn(fault: Fault, blind: Blind, count: int) -> Iterator[Case]:
    """Draw cases in which a fault must be invisible, to the bit where that is claimed."""
    rng = random.Random(f"{fault.id} {blind.when}")
    when = f"({blind.when}) and (({blind.exact}) or {blind.exact == 'False'})"
    found = 0
    while found < count:
        try:
            case = cases.make(draw(rng), suite="equivalence", file="drawn")
        except CaseError:
            continue
        if holds(when, case):
            found += 1
            yield case


def trial(case: Case, *planted: Planted) -> list[RankResult]:
    """Run one world of threads."""
    lr, clip = 1e-2, 0.1 if case.engine.clip else 0.0
    order = Order(case, "fold_impl", case.layout, case.seed, lr, clip, planted=planted)
    return threads.run(None, order)


BLIND = [
    pytest.param(fault, blind, id=f"{fault.id}-{number}")
    for fault in FAULTS
    for number, blind in enumerate(fault.cannot)
]


@pytest.mark.parametrize(("fault", "blind"), BLIND)
def test_a_fault_that_algebra_hides_is_equivalent(fault: Fault, blind: Blind) -> None:
    """Loss, gradients, norm and weights agree bit for bit, or to 64 u where order may differ."""
    for case in drawn(fault, blind, DRAWS):
        clean, faulty = trial(case), trial(case, fault.planted(case))
        for one, other in zip(clean, faulty, strict=True):
            for before, after in zip(one.steps, other.steps, strict=True):
                assert_equivalent(before, after, exact=blind.exact != "False", case=case)


def assert_equivalent(one: Any, other: Any, *, exact: bool, case: Case) -> None:
    """Compare everything a rank read after one step.

    Where nothing but round-off reaches a tensor, a sign-like optimizer makes whole steps of it.
    """
    where, signs = case.id, case.optimizer.name not in LINEAR
    noise = models.structural_zeros(case.model, case.auxiliary) if signs else frozenset()
    if exact:
        assert one.losses == other.losses, where
        assert one.grad_norm == other.grad_norm, where
    for kind in ("gradients", "after"):
        mine, others = getattr(one, kind).tensors(), getattr(other, kind).tensors()
        size = max(float(t.norm()) for t in mine.values() if t is not None)
        for name, a in mine.items():
            b = others[name]
            if exact:
                assert (a is None) == (b is None), (where, kind, name)
                assert a is None or torch.equal(bits(a), bits(b)), (where, kind, name)
            elif kind == "gradients" or name not in noise:
                apart = float((a - b).norm())
                assert apart <= FACTOR * UNIT_ROUNDOFF[torch.float64] * size, (where, kind, name)


def test_the_page_lists_every_equivalence() -> None:
    """docs/faults.md holds the table as the catalogue gives it."""
    text = (FILE.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    assert "\n".join(runs.equivalences(FAULTS)) in text


# ---------------------------------------------------------------- what is written


def entry(**changes: Any) -> runs.Entry:
    """Make an entry of a fault that all went well with."""
    plain: dict[str, Any] = {
        "id": "f", "killed": True, "killed_by": runs.Killers(("gradient",), ("expert",), ("sgd",)),
        "causes": ("a",), "true_cause": "a", "diagnosed": True, "set_size": 1, "seconds": 0.5,
        "detectors": dict.fromkeys(DETECTORS, False) | {"ours": True}, "cases": ("c",),
    }  # fmt: skip
    return runs.Entry(**{**plain, **changes})


def test_an_entry_has_the_keys_that_others_read(tmp_path: Path) -> None:
    """SPEC 4: id, killed, killed_by, causes, true_cause, diagnosed, set_size, seconds."""
    runs.write([entry()], [BY_ID["router-sum"]], tmp_path)
    (found,) = json.loads((tmp_path / "faults.json").read_text())
    wanted = ("id", "killed", "killed_by", "causes", "true_cause", "diagnosed", "set_size",
              "seconds")  # fmt: skip
    assert [found[key] for key in wanted] == [
        "f", True,
        {"quantities": ["gradient"], "families": ["expert"], "optimizers": ["sgd"]},
        ["a"], "a", True, 1, 0.5,
    ]  # fmt: skip
    text = (tmp_path / "faults.md").read_text()
    assert "1 of 1 faults killed, 1 diagnosed" in text
    assert f"| f |{'  |' * (len(DETECTORS) - 1)} x | a | a |" in text
    assert set(LEGEND) == set(DETECTORS)


def test_a_case_that_breaks_kills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is not a verdict; the run goes on."""

    def broken(*_: Any) -> Seen:
        raise RuntimeError("no such buffer")

    monkeypatch.setattr(runs, "observe", broken)
    (found,) = runs.run_faults([BY_ID["router-skip"]], suite())
    assert (found.killed, found.diagnosed, found.causes) == (False, False, ())
    assert "no such buffer" in found.errored[0]
    assert found.survived == ()


def test_a_fault_without_a_case_is_not_killed() -> None:
    """A suite in which a fault cannot show proves nothing."""
    (found,) = runs.run_faults([BY_ID["etp-all-gather-only"]], suite()[:1])
    assert not found.killed


def test_the_command_lists_faults() -> None:
    """One line a fault; as JSON with what each cannot be seen by."""
    result = CliRunner().invoke(main, ["faults", "list"])
    assert result.exit_code == 0
    assert all(fault.id in result.output for fault in FAULTS)
    listed = json.loads(CliRunner().invoke(main, ["faults", "list", "--format", "json"]).output)
    assert [fault["id"] for fault in listed] == [fault.id for fault in FAULTS]
    assert listed[0]["cannot"][0]["when"] == "tp == 1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder that holds the suite alone."""
    shutil.copy(FILE, tmp_path)
    return tmp_path


def test_the_command_runs_one_fault_and_exits_0(tmp_path: Path, folder: Path) -> None:
    """Killed and diagnosed."""
    args = ["faults", "run", "--fault", "gas-twice", "--cases", str(folder)]
    result = CliRunner().invoke(main, [*args, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "1 of 1 faults killed, 1 diagnosed" in result.output
    assert (tmp_path / "out" / "faults.md").exists()


def test_the_command_exits_1_where_a_fault_survives(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The complaint names the fault and the case."""
    lost = entry(killed=False, diagnosed=False, survived=("w4",), causes=())
    monkeypatch.setattr(runs, "run_faults", lambda *_args, **_options: [lost])
    args = ["faults", "run", "--cases", str(folder), "--out", str(folder)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1
    assert "f survived: w4" in result.output


def test_the_command_exits_3_where_a_case_errored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that died says nothing about a fault: it neither survived nor was it killed."""
    lost = entry(killed=False, diagnosed=False, errored=("w4: rank 1 died",), causes=())
    monkeypatch.setattr(runs, "run_faults", lambda *_args, **_options: [lost])
    args = ["faults", "run", "--cases", str(folder), "--out", str(folder)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 3
    assert "f: nothing is known: w4: rank 1 died" in result.output


def test_the_command_refuses_an_unknown_fault(tmp_path: Path) -> None:
    """Exit code 2, with where to look."""
    args = ["faults", "run", "--fault", "nought", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert "unknown fault 'nought'; see `parity faults list`" in result.output
