"""Hand-made faults, planted at the points of the native engine: is the true cause in the set?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from parity import case as cases
from parity import cli, explain, taps, threads
from parity.case import Case
from parity.causes import BY_ID, CAUSES, Setting
from parity.errors import UsageError
from parity.evidence import factor_table, observe, setting_of, symbols_of
from parity.judge import Judge, Later, Running
from parity.report.explanation import case_lines
from parity.store import FAILING, Row, RunDirectory
from parity.trial import Order, Planted
from tests.parity.example_rows import passing, row


class Here:
    """Runs every order as threads of this process."""

    def start(
        self,
        _world: int,
        _task: str,
        payloads: Sequence[Any],
        _deadline_s: float,
        _backend: str | None = None,
    ) -> Running:
        """Start one order."""
        (order,) = payloads
        assert isinstance(order, Order)
        return Later(lambda: [threads.run(None, order)])


def case(**changes: Any) -> Case:
    """Make a float64 case on threads; `shape__tp=2` sets shape.tp."""
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    common = {
        "engine.dtype": "float64", "engine.backend": "threads", "model.experts": 6,
        "data.length": 4,
    }  # fmt: skip
    return cases.make({**common, **flat}, suite="explain", file="explain.toml")


SHAPES = {
    # tp = dp = edp = 2: factors are ambiguous here, and dp / edp is none
    "square": case(shape__world=4, shape__tp=2, shape__ep=2, engine__gas=3),
    # dp 3, edp 2: dp / edp is no other factor
    "uneven": case(
        shape__world=6, shape__tp=2, shape__ep=3, engine__gas=2,
        auxiliary__load_balance=0.05, auxiliary__scope="global",
    ),
    # dp 2, edp 1, clipped, lanes with consumers of their own
    "lanes": case(
        shape__world=6, shape__tp=3, shape__ep=2, shape__etp=3, engine__clip=0.5,
        data__lane_varying=True,
    ),
}  # fmt: skip


@functools.cache
def judge() -> Judge:
    """Give one judge for all tests: its references and baselines are shared."""
    return Judge(implementation="fold_impl", pool=Here())


# --- the faults -----------------------------------------------------------------------------------


def times_tp(value: Tensor, *, family: str, only: str, layout: Any, **_: Any) -> Tensor:
    """Multiply a family's reduced gradient by tp."""
    return value * layout.tp_size if family == only else value


def mean_over_edp(value: Tensor, *, family: str, layout: Any, **_: Any) -> Tensor:
    """Divide an expert's sum by edp where dp is due."""
    edp = layout.stage_size // (layout.ep_size * layout.etp_size)
    return value * layout.dp_size / edp if family == "expert" else value


def own_lane_only(value: Any, *, family: str, **_: Any) -> Any:
    """Leave the lanes out of the router's reduction."""
    return type(value).SKIP if family == "router" else value


def lanes_averaged(value: Any, **_: Any) -> Any:
    """Average shards of different lanes."""
    return type(value).AVERAGE if value.name == "SKIP" else value


def times_gas(value: Tensor, *, gas: int, **_: Any) -> Tensor:
    """Undo the division by gas."""
    return value * gas


def last_only(value: Tensor | None, *, micro_batch: int, gas: int, **_: Any) -> Tensor | None:
    """Keep nothing before the last micro-batch."""
    return value if micro_batch == gas - 1 else None


def without_first(value: Tensor | None, *, micro_batch: int, gas: int, **_: Any) -> Tensor | None:
    """Zero gradients after the first backward of several."""
    return None if micro_batch == 0 and gas > 1 else value


def as_it_is(_: Any, **__: Any) -> Callable[..., Tensor]:
    """Put the identity in the place of a boundary function."""
    return lambda x, _group: x


class OwnRows(torch.autograd.Function):
    """Forward as given; backward keeps this lane's rows of its own gradient, times tp."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, function: Any, tokens: int, group: Any) -> Tensor:
        """Restore."""
        ctx.start, ctx.rows = group.index * -(-tokens // group.size), own.shape[0]
        ctx.times = group.size
        out: Tensor = function(own, tokens, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Cut."""
        own = gradient[ctx.start : ctx.start + ctx.rows] * ctx.times
        return own, None, None, None


def slices_back(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """Make the restore's backward a slice."""

    def restore(own: Tensor, tokens: int, group: Any) -> Tensor:
        if group.handle is None:
            return function(own, tokens, group)
        out: Tensor = OwnRows.apply(own, function, tokens, group)
        return out

    return restore


def detached(value: Tensor, **_: Any) -> Tensor:
    """Cut the gradient off."""
    return value.detach()


def twice(value: Tensor, **_: Any) -> Tensor:
    """Use a weight twice."""
    return value * value


def gradient_times(value: Tensor, *, factor: float, **_: Any) -> Tensor:
    """Keep the value, scale its gradient."""
    return value.detach() + factor * (value - value.detach())


def next_expert(value: Tensor, **_: Any) -> Tensor:
    """Send rows to expert e + 1."""
    return (value + 1) % 6


def through_float32(value: Tensor, **_: Any) -> Tensor:
    """Round."""
    return value.float().double()


def counted_on_every_lane(value: Tensor, *, family: str, layout: Any, **_: Any) -> Tensor:
    """Count what is replicated once for every lane."""
    return value if family in ("expert", "attention", "dense") else value * layout.tp_size


def no_clipping(_: float, **__: Any) -> float:
    """Leave gradients as they are."""
    return 1.0


def negated(value: Tensor, **_: Any) -> Tensor:
    """Step uphill."""
    return -value


def own_mean(value: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Average over this rank's tokens."""
    return {**value, "loss_scale": 1.0 / value["labels"].numel()}


def lost_last_row(value: Tensor, **_: Any) -> Tensor:
    """Zero the last row that comes back."""
    kept = torch.ones(len(value), 1, dtype=value.dtype)
    kept[-1:] = 0
    return value * kept


@dataclass(frozen=True, eq=False)
class Fault:
    """A fault: point, function of this module, the true cause, the shapes it must show on."""

    point: str
    function: Callable[..., Any]
    cause: str
    shows: tuple[str, ...] = tuple(SHAPES)
    options: Mapping[str, Any] = field(default_factory=dict)
    left: int = 1
    """Causes left after intersecting shapes."""

    def planted(self) -> Planted:
        """Give what every rank plants."""
        return Planted(self.point, f"{__name__}:{self.function.__name__}", self.options)

    @property
    def name(self) -> str:
        """Name the fault by what it does."""
        return self.function.__name__.replace("_", "-")


FAULTS = (
    Fault("reduce.reduced", times_tp, "restore-factor-not-cancelled", options={"only": "expert"}),
    Fault("reduce.reduced", times_tp, "router-summed-over-tp", options={"only": "router"}),
    Fault("reduce.reduced", times_tp, "replicated-summed-over-tp", options={"only": "layernorm"}),
    Fault("reduce.reduced", mean_over_edp, "expert-divided-by-edp", ("uneven", "lanes")),
    Fault("reduce.rule", own_lane_only, "tp-reduction-missing"),
    Fault("reduce.rule", lanes_averaged, "sharded-reduced-over-tp"),
    Fault("batch.loss", times_gas, "gas-not-applied", ("square", "uneven")),
    Fault("step.accumulate", last_only, "micro-batches-overwritten", ("square", "uneven")),
    Fault("step.accumulate", without_first, "first-micro-batch-lost", ("square", "uneven")),
    Fault("batch.inputs", own_mean, "local-mean-loss"),
    Fault("moe.input", as_it_is, "input-gradient-partial"),
    Fault("moe.restore", slices_back, "restore-own-rows-only", ("lanes",), left=2),
    Fault("router.weights", detached, "routing-weights-detached"),
    Fault("combine.weights", twice, "routing-weight-applied-twice"),
    Fault("auxiliary.loss", gradient_times, "auxiliary-scaled", ("uneven",), {"factor": 2.0}),
    Fault("dispatch.experts", next_expert, "expert-permutation"),
    Fault("reduce.bucket", through_float32, "precision-leak-float32"),
    Fault("norm.square", counted_on_every_lane, "norm-counts-replicas"),
    Fault("clip.coefficient", no_clipping, "clip-not-applied", ("lanes",)),
    Fault("expert.partial", lost_last_row, "rows-lost-or-shifted", left=2),
)


@functools.cache
def results(fault: Fault | None) -> dict[str, list[Row]]:
    """Judge every shape with a fault planted."""
    planted = () if fault is None else (fault.planted(),)
    return {name: judge().with_planted(*planted).rows(c) for name, c in SHAPES.items()}


def failing(rows: Sequence[Row]) -> list[Row]:
    """Keep the failing rows."""
    return [r for r in rows if r.verdict in FAILING]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.name}-{f.cause}")
def test_the_true_cause_is_in_the_printed_set(fault: Fault) -> None:
    """At most three causes on every shape, the true one among them; over shapes one is left."""
    found = results(fault)
    assert {name for name, rows in found.items() if failing(rows)} == set(fault.shows)
    for name in fault.shows:
        sets = {r.causes for r in failing(found[name])}
        assert len(sets) == 1, "all failing rows of a case carry the same set"
        (causes,) = sets
        assert fault.cause in causes, name
        assert len(causes) <= 3, causes
    left = [c.id for c in explain.intersect([*found.values()], {c.id: c for c in SHAPES.values()})]
    assert fault.cause in left
    assert len(left) <= fault.left, left


def with_both(scope: str) -> Case:
    """Make a case of two auxiliary losses."""
    return case(
        shape__world=6, shape__tp=2, shape__ep=3, engine__gas=2,
        auxiliary__load_balance=0.05, auxiliary__z_loss=0.03, auxiliary__scope=scope,
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["rank", "global"])
@pytest.mark.parametrize(
    ("point", "causes"),
    [
        ("auxiliary.load", {"auxiliary-scope", "auxiliary-scaled"}),
        ("auxiliary.tokens", {"auxiliary-scope"}),
    ],
)
def test_counts_of_lanes_are_a_matter_of_scope(point: str, causes: set[str], scope: str) -> None:
    """The load tp times is a factor tp on one loss: both names. Tokens are in both losses."""
    planted = Planted(point, f"{__name__}:times", {"by": 2})
    rows = judge().with_planted(planted).rows(with_both(scope))
    assert {frozenset(r.causes) for r in failing(rows)} == {frozenset(causes)}


@pytest.mark.parametrize("scope", ["rank", "global"])
@pytest.mark.parametrize("by", [0.0, 0.5])
@pytest.mark.parametrize("lost", ["load_balance", "z_loss"])
def test_one_auxiliary_loss_of_two_is_told_by_its_factor(lost: str, by: float, scope: str) -> None:
    """The other keeps the factor 1: no other tokens are counted."""
    both = with_both(scope)
    planted = Planted(f"auxiliary.{lost}", f"{__name__}:times", {"by": by})
    rows = judge().with_planted(planted).rows(both)
    assert {r.causes for r in failing(rows)} == {("auxiliary-scaled",)}
    said = "\n".join(case_lines(rows, both, []))
    factors = {"load_balance": 1, "z_loss": 1} | {lost: by}
    balance, z = factors["load_balance"], factors["z_loss"]
    text = f"main loss x 1, load balance x {balance:g}, z-loss x {z:g}"
    assert f"router.weight: {text}" in said


@pytest.mark.parametrize("eps", [1e-15, 1e-3])
@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_a_limit_that_is_not_applied_is_told_under_every_optimizer(name: str, eps: float) -> None:
    """Adam's update shows no factor: the whole step of unclipped gradients is what gives it away.

    Another rule, here a step uphill, is not taken for it.
    """
    case_ = SHAPES["lanes"].model_copy(
        update={
            "optimizer": SHAPES["lanes"].optimizer.model_copy(update={"name": name, "eps": eps}),
            "steps": 3,
        }
    )
    for point, transform, cause in (
        ("clip.coefficient", no_clipping, "clip-not-applied"),
        ("step.gradient", negated, "update-rule-differs"),
    ):
        planted = Planted(point, f"{__name__}:{transform.__name__}")
        rows = judge().with_planted(planted).rows(case_)
        assert failing(rows), (name, point)
        assert {r.causes for r in failing(rows)} == {(cause,)}, (name, point)


def times(value: Tensor, *, by: float, **_: Any) -> Tensor:
    """Scale what the optimizer is given."""
    return value * by


@pytest.mark.parametrize("by", [1.5, 1.9])
def test_a_wrong_factor_of_about_the_limit_in_16_bits_is_not_the_limit(by: float) -> None:
    """In bfloat16 the update's limit is 0.26: clipping to a half, left out, is a factor of 2."""
    lanes = SHAPES["lanes"]
    engine = lanes.engine.model_copy(update={"dtype": "bfloat16"})
    coarse = lanes.model_copy(update={"engine": engine})
    for factor, cause in ((by, "update-rule-differs"), (2.0, "clip-not-applied")):
        planted = Planted("step.gradient", f"{__name__}:times", {"by": factor})
        rows = judge().with_planted(planted).rows(coarse)
        assert {r.causes for r in failing(rows)} == {(cause,)}, factor


def test_a_limit_that_is_met_at_a_later_step_only_is_told() -> None:
    """A limit above the first norm is not met by it; ignored for ever, it is by none."""
    rising = case(
        shape__world=2, shape__tp=2, shape__ep=2, engine__clip=1.05, steps=2,
        optimizer__name="sgd", optimizer__lr=3.0,
    )  # fmt: skip
    planted = Planted("clip.coefficient", f"{__name__}:no_clipping")
    bad = failing(judge().with_planted(planted).rows(rising))
    assert bad
    assert min(row.step or 0 for row in bad) > 1
    assert {row.causes for row in bad} == {("clip-not-applied",)}


@pytest.mark.parametrize(
    "unclipped",
    [
        {"unclipped_scale": 1.0, "unclipped_error": 1.2e-6},  # no better: one expert alone is wrong
        {"unclipped_scale": None, "unclipped_error": None},  # not finite
        {},  # recorded before there was any
    ],
)
def test_a_row_that_says_nothing_of_the_limit(unclipped: dict[str, Any]) -> None:
    """Adam gives an idle expert's family the same update clipped or not."""
    lanes = SHAPES["lanes"].model_copy(
        update={"optimizer": SHAPES["lanes"].optimizer.model_copy(update={"name": "adamw"})}
    )
    detail = {"own_error": 1e-6, "own_threshold": 4e-6, "own_scale": 1.0, "end_to_end_scale": 1.0}
    left_out = {"own_error": 0.5, "unclipped_scale": 1.0, "unclipped_error": 1e-7}
    for changed, told in ((unclipped, False), (left_out, True)):
        bad = row(lanes, "update", "expert", verdict="fail", detail={**detail, **changed})
        found = {c.id for c in explain.causes([*passing(lanes)[:-1], bad], lanes)}
        assert ("clip-not-applied" in found) == told


def test_a_passing_run_of_another_engine_or_in_16_bits_speaks_against_few_causes() -> None:
    """Engines share no step; in bfloat16 a factor must show, structure need not."""
    by_id = {c.id: c for c in SHAPES.values()}

    def left(fault: Fault, right: Sequence[Row], **changed: str) -> set[str]:
        right = [replace(r, engine={**r.engine, **changed}) for r in right]
        return {c.id for c in explain.intersect([results(fault)["lanes"], right], by_id)}

    factor, structure = FAULTS[0], next(f for f in FAULTS if f.cause == "input-gradient-partial")
    good = results(None)["uneven"]
    for fault in (factor, structure):
        assert fault.cause not in left(fault, good)
        assert fault.cause in left(fault, good, name="deepspeed")
    assert factor.cause not in left(factor, good, dtype="bfloat16")
    assert structure.cause in left(structure, good, dtype="bfloat16")


def test_what_passes_has_no_cause() -> None:
    """Without a fault no row fails and none carries a cause."""
    for rows in results(None).values():
        assert not failing(rows)
        assert {r.causes for r in rows} == {()}
    assert explain.intersect([*results(None).values()]) == []


# --- sets, factors, sentences ---------------------------------------------------------------------


TWICE = [
    "restore-factor-not-cancelled", "expert-averaged-over-edp-only", "expert-not-divided-by-dp"
]  # fmt: skip
"""What an expert factor of 2 may be where tp = ep etp = dp = 2."""


def test_one_shape_leaves_three_causes_and_names_the_case_that_tells() -> None:
    """Where tp = dp = ep = 2 an expert factor 2 is any of them; the case named tells them apart."""
    fault, square = FAULTS[0], SHAPES["square"]
    found = explain.causes(results(fault)["square"], square)
    assert [c.id for c in found] == TWICE
    said = list(explain.ambiguity(found, SHAPES.values(), square))
    assert len(said) == 3
    assert said[0] == (
        f"ambiguous between {TWICE[0]} and {TWICE[1]} on this shape; "
        f"run {SHAPES['lanes'].id} to tell"
    )
    told = {c.id for c in explain.causes(results(fault)["lanes"], SHAPES["lanes"])}
    assert told.isdisjoint(TWICE[1:])
    same = list(explain.ambiguity(found, [square], square))
    assert same[0].endswith("; no loaded case tells them apart")


def test_a_passing_case_speaks_against_a_cause_that_must_show() -> None:
    """Expert factor 2 where tp = 2, and a case of tp 3 passes: not the restore's factor."""
    bad, good = results(FAULTS[0])["square"], results(None)["lanes"]
    assert [c.id for c in explain.intersect([bad])] == TWICE
    assert {c.id for c in explain.intersect([bad, good])}.isdisjoint(TWICE)


def test_two_faults_at_once_keep_both_in_sight() -> None:
    """No cause explains both cases: those that explain one each are left."""
    rows = [results(FAULTS[0])["lanes"], results(FAULTS[1])["uneven"]]
    left = {c.id for c in explain.intersect(rows, {c.id: c for c in SHAPES.values()})}
    assert {"restore-factor-not-cancelled", "router-summed-over-tp"} <= left


def test_a_failing_baseline_must_be_explained_too() -> None:
    """A factor dp on the baseline as well is no factor tp of the folded run."""
    square = SHAPES["square"]
    wrong = {"scale": 2.0, "ratio": 2.0, "residual": 0.0, "error": 1.0, "verdict": "fail"}
    bad = [replace(r, **wrong) if r.quantity == "gradient" else r for r in passing(square)]  # type: ignore[arg-type]
    alone = next(r for r in bad if r.shape["tp"] == 1)
    rows = [*bad, replace(alone, family="router")]
    only_folded = [r if r.shape["tp"] == 2 else replace(r, verdict="pass") for r in rows]
    assert [c.id for c in explain.causes(rows, square)] == ["dp-sum-not-averaged"]
    assert {c.id for c in explain.causes(only_folded, square)} >= {"dp-sum-not-averaged"}
    # what is wrong with the experts of the baseline alone is not what is wrong with all
    assert [c.id for c in explain.causes(bad, square)] == ["unknown"]


def test_an_unknown_factor_and_unknown_structure_are_said_so() -> None:
    """A factor 1.001, and a residual that nothing explains, have no cause of the table."""
    square = SHAPES["square"]
    by = {"scale": 1.001, "ratio": 1.001, "residual": 0.0, "error": 1e-3, "verdict": "fail"}
    rows = [row(square, family="expert", **by), row(square)]  # type: ignore[arg-type]
    assert [c.id for c in explain.causes(rows, square)] == ["unknown-factor"]
    rows = [row(square, family="embedding", **{**by, "residual": 0.5}), row(square)]  # type: ignore[arg-type]
    assert [c.id for c in explain.causes(rows, square)] == ["unknown"]


def test_factors_are_named_in_sizes_of_the_shape() -> None:
    """W8 tp2 ep2 etp2: dp 4, edp 2; 2 is many things, 1/8 is 1/world among others."""
    setting = Setting(tp=2, dp=4, ep=2, etp=2, edp=2, gas=3)
    assert symbols_of(2.0, setting)[:4] == ["tp", "ep", "edp", "etp"]
    assert "dp/edp" in symbols_of(2.0, setting)
    assert symbols_of(1 / 8, setting)[0] == "1/world"
    assert symbols_of(1.5, setting) == ["gas/tp", "gas/ep", "gas/edp", "gas/etp"]
    assert symbols_of(1.7, setting) == []
    assert factor_table(Setting()) == {}


def test_every_cause_is_declared_once_and_says_its_algebra_in_a_line() -> None:
    """Ids are unique, kebab-case; factors have a symbol."""
    assert len(BY_ID) == len(CAUSES)
    for cause in CAUSES:
        assert cause.id == cause.id.lower().replace("_", "-").replace(" ", "-")
        assert cause.algebra
        assert "\n" not in cause.algebra
        assert bool(cause.symbol) >= (cause.factor is not None)


def test_a_sentence_names_family_factor_and_algebra() -> None:
    """One line a cause."""
    (about,) = [o for o in observe(results(FAULTS[0])["lanes"], SHAPES["lanes"]) if o.failing]
    said = explain.sentence(BY_ID["restore-factor-not-cancelled"], about)
    assert said == (
        "expert 3.000 = tp: the restore's backward sums tp equal lane gradients, and nothing "
        "divides by tp [restore-factor-not-cancelled]"
    )


def test_settings_know_what_a_case_switches_on() -> None:
    """The flags a cause's visibility rests on."""
    setting = setting_of(SHAPES["uneven"])
    assert (setting.tp, setting.dp, setting.ep, setting.edp, setting.gas) == (2, 3, 3, 2, 2)
    assert setting.auxiliary
    assert not setting.lane_varying
    assert BY_ID["expert-divided-by-edp"].visible(setting)
    assert BY_ID["restore-own-rows-only"].visible(setting) is False
    assert BY_ID["auxiliary-scaled"].visible(setting) is None


# --- taps and the command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "border", "layer"),
    [
        (None, None, None),
        (as_it_is, "input gradient", 1),
        (slices_back, "input gradient", 1),
        (next_expert, "expert out", 0),
        (lost_last_row, "expert out", 0),
        (twice, "restored out", 0),
        (times_tp, None, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_taps_name_the_first_border_that_differs(
    function: Callable[..., Any] | None, border: str | None, layer: int | None
) -> None:
    """Forward from the first layer, backward from the last; a wrong reduction is behind all."""
    fault = next((f for f in FAULTS if f.function is function), None)
    planted = () if fault is None else (fault.planted(),)
    found = taps.findings(judge().with_planted(*planted), SHAPES["lanes"])
    wrong = taps.first(found)
    assert (wrong and wrong.border, wrong and wrong.layer) == (border, layer)
    assert len(found) == 10  # five borders of two layers, one micro-batch
    assert taps.lines(found, SHAPES["lanes"].layout)[-1].startswith(
        "no border differs" if border is None else f"first to differ: {border} of layer {layer}"
    )


def test_taps_need_points_to_tap() -> None:
    """An implementation that offers none is a usage error, not a rank that raises."""
    without = SimpleNamespace(planted=(), last=None, absent=("fault_points", "taps"))
    with pytest.raises(UsageError, match="an implementation with fault_points and plant"):
        taps.findings(without, SHAPES["lanes"])


def test_the_command_reads_a_run_directory(tmp_path: Any) -> None:
    """Sets per case with their algebra, and what is left over all cases; exit code 1."""
    directory = RunDirectory.create(tmp_path / "run", root=tmp_path, commit="0")
    for rows in results(FAULTS[0]).values():
        directory.append(rows)
    done = CliRunner().invoke(cli.main, ["explain", str(directory.path)])
    assert done.exit_code == 1, done.output
    assert "expert 2.000 = tp: the restore's backward" in done.output
    assert "factors of this shape: tp 3, dp 2" in done.output
    assert "ambiguous between restore-factor-not-cancelled" in done.output
    assert "over 3 failing and 0 passing cases: restore-factor-not-cancelled\n" in done.output
    only = CliRunner().invoke(cli.main, ["explain", str(directory.path), "--case", "absent"])
    assert only.exit_code == 2
    assert "not in" in only.output


def test_a_run_that_passed_has_nothing_to_explain(tmp_path: Any) -> None:
    """Exit code 0."""
    directory = RunDirectory.create(tmp_path / "run", root=tmp_path, commit="0")
    directory.append(results(None)["square"])
    done = CliRunner().invoke(cli.main, ["explain", str(directory.path), "--format", "json"])
    assert done.exit_code == 0, done.output
    assert '"cases": {}' in done.output
