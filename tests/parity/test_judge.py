"""Three runs of one case: which rows fail for which fault, what is cached, what is drawn again.

Ranks are threads and everything is float64, so a healthy row is within 64 * 2^-53.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fold_impl import dispatch
from fold_impl.adapter import FoldImplementation
from fold_impl.families import Rule
from parity import case, judge, reference, threads, trial
from parity.errors import InfrastructureError
from parity.failure import Refused
from parity.judge import Judge
from parity.store import Row
from parity.trial import Order, Planted

HERE = "tests.parity.test_judge"
TINY = {
    "engine.dtype": "float64",
    "engine.backend": "threads",
    "model.layers": 1,
    "model.heads": 4,
    "model.mlp_width": 8,
    "model.vocab": 7,
    "model.experts": 4,
    "model.expert_width": 4,
    "data.length": 3,
}
FOLDED = {"shape.world": 4, "shape.tp": 2, "shape.ep": 4}


def small(**fields: Any) -> case.Case:
    """Make a small folded case of world 4, tp 2, ep 4."""
    return case.make({**TINY, **FOLDED, **fields}, suite="s", file="f")


class Threads:
    """A pool that runs every order as threads of this process, and remembers the orders."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def start(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,  # noqa: ARG002 - part of the protocol
        backend: str | None = None,  # noqa: ARG002
    ) -> judge.Running:
        """Do what a gang of one rank would do with `parity.threads:run`."""
        assert (world, task) == (1, "parity.threads:run")
        self.orders.append(payloads[0])
        return judge.Later(lambda: [threads.run(None, payloads[0])])


def fresh(**kwargs: Any) -> tuple[Judge, Threads]:
    """Make a judge with empty caches."""
    pool = Threads()
    return Judge(implementation="fold_impl", pool=pool, **kwargs), pool


@functools.cache
def shared() -> Judge:
    """Give one judge for all faults: truths and baselines are made once."""
    return fresh()[0]


def faulty(made: case.Case, *faults: Planted) -> list[Row]:
    """Judge a case with faults planted in its folded run."""
    return shared().with_planted(*faults).rows(made)


def failing(rows: Sequence[Row], quantity: str, against: str = "reference") -> dict[str, Row]:
    """Give the failing rows of the folded run by tensor."""
    return {
        row.tensor or "": row
        for row in rows
        if row.quantity == quantity
        and row.against == against
        and row.shape["tp"] > 1
        and row.verdict != "pass"
    }


def quantities(rows: Sequence[Row]) -> set[str]:
    """Name the quantities with a failing row."""
    return {row.quantity or "" for row in rows if row.verdict != "pass"}


ROUTER = "layers.0.moe.router.weight"
EXPERTS = {f"layers.0.moe.experts.{name}" for name in ("w1", "w2", "w3")}


# ---------------------------------------------------------------- healthy


def test_a_healthy_case_passes_in_every_quantity_against_both() -> None:
    """Folded and baseline against the reference, folded against the baseline; six quantities."""
    made = small(steps=2)
    rows = shared().rows(made)
    assert {row.verdict for row in rows} == {"pass"}
    sides = {(row.shape["world"], row.shape["tp"], row.against) for row in rows}
    assert sides == {(4, 2, "reference"), (4, 2, "baseline"), (2, 1, "reference")}
    assert {row.quantity for row in rows} == {
        "routing", "loss", "gradient", "replica", "grad_norm", "update",
    }  # fmt: skip
    assert {row.step for row in rows if row.against == "reference"} == {1, 2}
    assert {row.step for row in rows if row.against == "baseline"} == {1}
    assert {row.family for row in rows if row.quantity == "gradient"} == {
        "router", "layernorm", "dense", "attention", "embedding", "expert",
    }  # fmt: skip
    assert all(row.seconds is not None and row.case == made.id for row in rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape.tp": 4, "shape.ep": 2, "data.lane_varying": True, "engine.clip": 0.5},
        {"shape.ep": 2, "shape.etp": 2, "engine.gas": 2, "optimizer.name": "adam"},
        {"auxiliary.load_balance": 0.02, "auxiliary.scope": "global", "model.top_k": 1},
        {"model.biases": True, "model.shared_width": 4, "optimizer.name": "momentum", "steps": 2},
        {"model.tied": True, "model.score": "sigmoid", "optimizer.name": "lion"},
        {"data.ties": True, "model.experts": 8, "model.normalize": False},
    ],
)
def test_options_of_a_case_pass_too(fields: dict[str, Any]) -> None:
    """Each of them with one expert idle and uneven tokens."""
    rows = shared().rows(small(**fields))
    bad = [(r.quantity, r.tensor, r.error, r.reason) for r in rows if r.verdict != "pass"]
    assert bad == []


def test_an_idle_expert_and_structural_zeros_have_no_ratio_and_pass() -> None:
    """Top-1 normalised without auxiliary loss: the router's row has an error only."""
    rows = shared().rows(small(**{"model.top_k": 1}))
    (row,) = [r for r in rows if r.tensor == ROUTER and r.quantity == "gradient"
              and r.shape["tp"] == 2 and r.against == "reference"]  # fmt: skip
    assert (row.verdict, row.ratio, row.scale, row.residual) == ("pass", None, None, None)
    assert {r.verdict for r in rows} == {"pass"}


# ---------------------------------------------------------------- faults


def wrong_rule(right: Rule, family: str, hit: str, rule: str, **_: Any) -> Rule:
    """Use another reduction rule for one family."""
    return Rule(rule) if family == hit else right


def rule_fault(family: str, rule: Rule) -> Planted:
    """Plant it."""
    return Planted("reduce.rule", f"{HERE}:wrong_rule", {"hit": family, "rule": rule.value})


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("family", "rule", "hit"),
    [("router", Rule.SUM, {ROUTER}), ("expert", Rule.EXPERT, EXPERTS)],
)
def test_a_wrong_rule_gives_its_family_the_scale_tp_and_no_other_row(
    family: str, rule: Rule, hit: set[str], tp: int
) -> None:
    """Faults router-sum and expert-uncancelled: gradient, norm and update; residual round-off."""
    rows = faulty(small(**{"shape.tp": tp}), rule_fault(family, rule))
    for against in ("reference", "baseline"):
        found = failing(rows, "gradient", against)
        assert set(found) == hit
        for row in found.values():
            assert row.scale == pytest.approx(tp, rel=1e-12)
            assert row.residual is not None
            assert row.residual < 1e-13
            assert row.verdict == "fail"
    assert set(failing(rows, "update")) == hit
    assert quantities(rows) == {"gradient", "grad_norm", "update"}


def test_a_rule_planted_for_a_family_that_is_not_there_changes_nothing() -> None:
    """The near miss: no shared expert in this model."""
    rows = faulty(small(), rule_fault("shared_expert", Rule.SUM))
    assert quantities(rows) == set()


def test_adam_hides_a_constant_factor_from_its_update_and_sgd_does_not() -> None:
    """The gradient row shows 2 under both; the update 2 under SGD, 1 but for eps under Adam."""
    fault = rule_fault("router", Rule.SUM)
    scales = {}
    for name in ("sgd", "adam"):
        rows = faulty(small(**{"optimizer.name": name}), fault)
        assert failing(rows, "gradient")[ROUTER].scale == pytest.approx(2.0, rel=1e-12)
        (scales[name],) = [
            row.scale for row in rows
            if row.tensor == ROUTER and row.quantity == "update" and row.shape["tp"] == 2
        ]  # fmt: skip
    assert scales == {"sgd": pytest.approx(2.0, rel=1e-9), "adam": pytest.approx(1.0, abs=1e-3)}


def own_rows(_: Any, group: Any, layer: int) -> Any:
    """Let the restore's backward keep the own lane's gradient, times tp."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, own: Tensor, tokens: int) -> Tensor:
            ctx.bounds = dispatch.share_bounds(tokens, group)
            return dispatch.restore_combined(own.detach(), tokens, group)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient[slice(*ctx.bounds)] * group.size, None

    return lambda own, tokens, _: Own.apply(own, tokens)


def test_keeping_own_rows_is_seen_with_lane_varying_consumers_only() -> None:
    """Fault restore-own-rows: invisible with equal lanes, structure (not scale) with others."""
    fault = Planted("moe.restore", f"{HERE}:own_rows")
    assert quantities(faulty(small(), fault)) == set()
    found = failing(faulty(small(**{"data.lane_varying": True}), fault), "gradient")
    assert EXPERTS | {ROUTER} <= set(found)
    assert all(row.residual is not None and row.residual > 1e-3 for row in found.values())


def no_boundary(_: Any, group: Any, layer: int) -> Any:
    """Hand the layer's input on without its boundary."""
    return lambda x, _: x


def test_without_the_input_boundary_all_below_the_layer_is_wrong_and_the_layer_right() -> None:
    """Fault input-grad-partial: attention, dense MLP, embedding; not router, experts or head.

    The norm directly under the layer is repaired by AVERAGE, as the catalogue says.
    """
    rows = faulty(small(), Planted("moe.input", f"{HERE}:no_boundary"))
    found = set(failing(rows, "gradient"))
    assert {"embedding.weight", "layers.0.attention.q.weight", "layers.0.mlp.w1.weight"} <= found
    assert not found & {ROUTER, *EXPERTS, "head.weight", "norm.weight", "layers.0.moe_norm.weight"}


def count_copies(square: Tensor, copies: int, **_: Any) -> Tensor:
    """Count every replica of a part."""
    return square * copies


def test_a_wrong_norm_fails_its_own_row_and_under_clipping_all_updates_by_one_factor() -> None:
    """Fault norm-replicas-counted: gradients are right; without clipping so are the updates."""
    fault = Planted("norm.square", f"{HERE}:count_copies")
    assert quantities(faulty(small(), fault)) == {"grad_norm"}
    rows = faulty(small(**{"engine.clip": 0.5}), fault)
    assert quantities(rows) == {"grad_norm", "update"}
    scales = [row.scale or 0.0 for row in failing(rows, "update").values()]
    assert len(scales) > 10
    assert max(scales) == pytest.approx(min(scales), rel=1e-9)


def ignore_clip(coefficient: float, norm: float, limit: float) -> float:
    """Leave gradients as they are."""
    return 1.0


def test_clipping_that_is_not_applied_fails_updates_alone() -> None:
    """Fault clip-ignored: every update twice as large; without clipping nothing to see."""
    fault = Planted("clip.coefficient", f"{HERE}:ignore_clip")
    assert quantities(faulty(small(), fault)) == set()
    rows = faulty(small(**{"engine.clip": 0.5}), fault)
    assert quantities(rows) == {"update"}
    assert all(
        row.scale == pytest.approx(2.0, rel=1e-2) for row in failing(rows, "update").values()
    )


def none_for_experts(gradient: Tensor, family: str, **_: Any) -> Tensor | None:
    """Give None in the place of a gradient that is all zero."""
    return None if family == "expert" and not gradient.any() else gradient


def test_a_missing_gradient_of_an_idle_expert_fails_by_name_of_the_rank() -> None:
    """Fault zero-token-none: rank 3 owns the idle expert of ep 4."""
    rows = faulty(small(), Planted("reduce.reduced", f"{HERE}:none_for_experts"))
    found = failing(rows, "gradient")
    assert set(found) == EXPERTS
    assert all(row.reason and "None on ranks 3" in row.reason for row in found.values())


def skip_micro_batch(loss: Tensor, micro_batch: int, gas: int) -> Tensor:
    """Lose the first micro-batch."""
    return loss * float(micro_batch > 0)


def test_a_lost_micro_batch_is_structure_and_leaves_the_loss_row_alone() -> None:
    """Fault first-microbatch-lost: a residual, not a scale; the loss is told before backward."""
    rows = faulty(small(**{"engine.gas": 2}), Planted("batch.loss", f"{HERE}:skip_micro_batch"))
    found = failing(rows, "gradient")
    assert {"head.weight", ROUTER} <= set(found)
    assert "loss" not in quantities(rows)
    assert all(row.residual is None or row.residual > 1e-2 for row in found.values())


def other_lane(indices: Tensor, layer: int) -> Tensor:
    """Send the first token elsewhere on one rank."""
    if torch.distributed.get_rank() == 1:
        indices = indices.clone()
        indices[0] = torch.tensor([2, 1]) if set(indices[0].tolist()) != {1, 2} else indices[0] // 2
    return indices


def test_a_lane_that_routes_differently_fails_routing_first() -> None:
    """One token on rank 1: the routing row counts it and says that lanes differ."""
    rows = faulty(small(), Planted("router.indices", f"{HERE}:other_lane"))
    (row,) = failing(rows, "routing").values()
    assert row.error in (1.0, 2.0)
    assert row.worst is not None
    assert row.worst["rank"] == 1
    assert row.detail is not None
    assert row.detail["lanes_differ"] == row.error


def test_a_later_step_is_judged_at_the_engines_own_weights() -> None:
    """After a wrong step weights are wrong, yet the second step's other gradients are right."""
    rows = faulty(small(steps=2), rule_fault("router", Rule.SUM))
    second = [r for r in rows if r.quantity == "gradient" and r.step == 2 and r.shape["tp"] == 2]
    assert {r.tensor for r in second if r.verdict != "pass"} == {ROUTER}
    assert len(second) > 10


# ---------------------------------------------------------------- caches


def test_cases_on_the_same_dp_shards_share_baseline_and_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another ep: one more run. Another optimizer: two, on the same truth. Other data: all."""
    evaluated: list[int] = []
    original = reference.evaluate

    def counted(*args: Any, **kwargs: Any) -> reference.Evaluation:
        evaluated.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(reference, "evaluate", counted)
    own, pool = fresh()
    seen = []
    for fields in (
        {},
        {"shape.ep": 2},
        {"shape.ep": 2, "optimizer.name": "adam"},
        {"shape.ep": 2, "data.length": 4},
    ):
        own.rows(small(**fields))
        seen.append((len(pool.orders), len(evaluated)))
    assert seen == [(2, 1), (3, 1), (5, 1), (7, 2)]
    assert [order.layout.world for order in pool.orders] == [2, 4, 4, 2, 4, 2, 4]


def test_with_lane_varying_consumers_another_tp_is_another_truth() -> None:
    """The mean of the probes depends on the number of lanes: dp 2 of tp 2 is not dp 2 of tp 4."""
    own, pool = fresh()
    own.rows(small(**{"data.lane_varying": True}))
    wider = {"shape.world": 8, "shape.tp": 4, "data.lane_varying": True}
    rows = own.rows(small(**wider))
    assert len(pool.orders) == 4
    assert {row.verdict for row in rows} == {"pass"}


def test_a_fault_shares_the_healthy_baseline() -> None:
    """`with_planted`: only the folded run is made again, and only it is planted."""
    own, pool = fresh()
    own.rows(small())
    own.with_planted(rule_fault("router", Rule.SUM)).rows(small())
    assert [bool(order.planted) for order in pool.orders] == [False, False, True]
    assert own.planted == ()


# ---------------------------------------------------------------- guard


def unsafe(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    """Let the first draws have a token too close to a tie."""
    original = reference.evaluate
    seen: list[int] = []

    def close(*args: Any, **kwargs: Any) -> reference.Evaluation:
        seen.append(1)
        truth = original(*args, **kwargs) if len(seen) > draws else TRUTH
        limit = judge.GUARD * judge.LOGIT_ERROR_U * 2.0**-53
        return replace(truth, margin=limit * (0.99 if len(seen) <= draws else 1.0))

    monkeypatch.setattr(reference, "evaluate", close)


def test_a_token_near_a_tie_draws_another_seed_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two unsafe draws of seed 5: the third is 2005; a margin at the limit is safe."""
    unsafe(monkeypatch, 2)
    own, pool = fresh()
    rows = own.rows(small(seed=5))
    assert {order.seed for order in pool.orders} == {2005}
    assert all(row.detail is not None and row.detail["draws"] == 3 for row in rows)
    assert {row.verdict for row in rows} == {"pass"}


def test_a_case_that_is_never_safe_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """After twelve draws nothing is known about parity; no rank was started."""
    unsafe(monkeypatch, 10**6)
    own, pool = fresh()
    with pytest.raises(InfrastructureError, match="no safe routing in 12 seeds from 0"):
        own.rows(small())
    assert pool.orders == []


def test_a_safe_case_does_not_speak_of_draws() -> None:
    """The first draw is no redraw."""
    rows = shared().rows(small())
    assert not any(row.detail and "draws" in row.detail for row in rows)


class Collapse(FoldImplementation):
    """Forgets its router in every step: the next step's tokens are all at a tie."""

    def step(self, micro_batches: Any) -> list[float]:
        """Step, then zero the router."""
        losses = super().step(micro_batches)
        with torch.no_grad():
            self.parameters()[ROUTER].zero_()
        return losses


def test_an_implementation_cannot_make_its_own_draw_unsafe() -> None:
    """Weights it broke leave step 2 without a safe truth: step 1's rows fail, no error."""
    own = Judge(implementation=f"{HERE}:Collapse", pool=Threads())
    rows = own.rows(small(steps=2))
    assert ROUTER in failing(rows, "update")
    assert not any(row.detail and "draws" in row.detail for row in rows)


class Forgets(FoldImplementation):
    """Does not hand over one parameter."""

    def parameters(self) -> dict[str, Tensor]:
        """Leave out the head."""
        return {n: t for n, t in super().parameters().items() if n != "head.weight"}

    def placements(self) -> dict[str, Any]:
        """Leave out the head."""
        return {n: p for n, p in super().placements().items() if n != "head.weight"}

    def gradients(self) -> dict[str, Tensor | None]:
        """Leave out the head."""
        return {n: t for n, t in super().gradients().items() if n != "head.weight"}


def test_a_parameter_that_is_not_handed_over_fails_by_name() -> None:
    """Untied, renamed or dropped by the implementation: a mismatch, not a crash of the harness."""
    rows = Judge(implementation=f"{HERE}:Forgets", pool=Threads()).rows(small())
    assert any(row.tensor == "head.weight" and row.verdict == "fail" for row in rows)


class Unsharded(FoldImplementation):
    """Does all of attention on every lane, whatever tp says."""

    def build(self, model: Any, config: Any, context: Any) -> None:
        """Leave the patterns of the dense MLP only."""
        mlp = {"column": [r"mlp\.w[13]"], "row": [r"mlp\.w2"], "regions": [r"layers\.\d+\.mlp"]}
        preset = {**config["folding"]["preset"], **mlp}
        super().build(
            model, {**config, "folding": {**config["folding"], "preset": preset}}, context
        )


def test_dense_weights_that_are_not_sharded_under_tp_do_not_pass() -> None:
    """SPEC section 3: attention and dense MLP weights really sharded when tp > 1, asserted."""
    rows = Judge(implementation=f"{HERE}:Unsharded", pool=Threads()).rows(small())
    (failing_row,) = [row for row in rows if row.verdict != "pass"]
    assert failing_row.family == "attention"
    assert "sharded over tp = 2" in (failing_row.reason or "")


# ---------------------------------------------------------------- refusal, setting


class Noting(Threads):
    """A pool that notes when runs are started and when their results are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[str, int]] = []

    def start(self, *arguments: Any, **keywords: Any) -> judge.Running:
        """Note the world, and once more when its results are wanted."""
        running = super().start(*arguments, **keywords)
        world = self.orders[-1].layout.world
        self.notes.append(("started", world))

        def noted() -> list[Any]:
            self.notes.append(("asked", world))
            return running.results()

        return judge.Later(noted)


def test_the_folded_run_goes_on_beside_the_baseline() -> None:
    """Both are started before either is asked for; a known baseline is not run again."""
    pool = Noting()
    judging = Judge(implementation="fold_impl", pool=pool)
    judging.rows(small())
    both = [("started", 2), ("started", 4), ("asked", 2), ("asked", 4)]
    assert pool.notes == both
    judging.rows(small())
    assert pool.notes == [*both, ("started", 4), ("asked", 4)]


class Failing(Threads):
    """A pool where the runs of one world fail; it notes which runs are cancelled, and where."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.cancelled: list[tuple[int, bool]] = []

    def start(self, *arguments: Any, **keywords: Any) -> judge.Running:
        """Fail, or run, when asked for results."""
        running = super().start(*arguments, **keywords)
        order, pool = self.orders[-1], self

        class Watched:
            def results(self) -> list[Any]:
                if order.layout.world == pool.world:
                    raise Refused(f"not on {pool.world}")
                return running.results()

            def cancel(self) -> None:
                folder = order.checkpoint and Path(order.checkpoint.folder)
                pool.cancelled.append((order.layout.world, bool(folder and folder.is_dir())))

        return Watched()


def test_a_baseline_that_fails_cancels_the_folded_run_before_its_folder_goes() -> None:
    """Ranks that still save must not find their folder gone; the baseline's words are told."""
    pool = Failing(world=2)
    made = small(**{"steps": 2, "checkpoint": "resume"})
    (row,) = Judge(implementation="fold_impl", pool=pool).rows(made)
    assert (row.verdict, row.reason) == ("skipped", "not on 2")
    assert (4, True) in pool.cancelled


def test_a_folded_failure_is_told_before_the_baseline_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Judging takes its time, and a hang is to be told within seconds of its deadline."""
    monkeypatch.setattr(Judge, "_judged_baseline", lambda *_: pytest.fail("judged first"))
    (row,) = Judge(implementation="fold_impl", pool=Failing(world=4)).rows(small())
    assert row.reason == "not on 4"


class Refusing(Threads):
    """A pool whose ranks all refuse."""

    def start(self, *_: Any, **__: Any) -> judge.Running:
        """Let every rank refuse."""

        def refuse() -> list[Any]:
            raise Refused("not with sequence parallelism")

        return judge.Later(refuse)


def test_a_refusal_is_one_skipped_row_in_the_implementations_words() -> None:
    """No number, no verdict on parity."""
    (row,) = Judge(implementation="fold_impl", pool=Refusing()).rows(small())
    assert (row.verdict, row.quantity, row.reason) == (
        "skipped",
        None,
        "not with sequence parallelism",
    )


def evaluation(**gradients: list[float]) -> reference.Evaluation:
    """Make a truth of hand-made gradients."""
    tensors = {n: torch.tensor(g, dtype=torch.float64) for n, g in gradients.items()}
    return reference.Evaluation(1.0, tensors, [], 1.0)


WEIGHTS = {
    "a": torch.tensor([3.0, 4.0], dtype=torch.float64),
    "b": torch.tensor([0.3, 0.4], dtype=torch.float64),
    "idle": torch.ones(1, dtype=torch.float64),
}
TRUTH = evaluation(a=[0.0, 4.0], b=[3.0, 0.0], idle=[0.0])
"""|w| 5, 1/2, 1 and |g| 4, 3, 0: the norm of the gradient is 5."""


@pytest.mark.parametrize(
    ("fields", "lr", "clip"),
    [
        ({}, 0.125 * 0.5 / 3, 0.0),  # b moves most for its size
        ({"optimizer.name": "momentum"}, 0.125 * 0.5 / 3, 0.0),
        ({"engine.clip": 0.5}, 2 * 0.125 * 0.5 / 3, 2.5),  # half the gradient, twice the lr
        ({"engine.clip": 2.0}, 0.125 * 0.5 / 3, 10.0),  # a limit above the norm clips nothing
        ({"optimizer.name": "lion"}, 0.125 * 0.5 / 2**0.5, 0.0),  # rms of b
        ({"optimizer.name": "adam"}, 0.125 * 0.5 / 2**0.5, 0.0),
        ({"optimizer.lr": 0.7}, 0.7, 0.0),
    ],
)
def test_lr_is_such_that_a_step_is_an_eighth_of_the_smallest_weights(
    fields: dict[str, Any], lr: float, clip: float
) -> None:
    """Linear: largest |lr g| / |w| after clipping; sign-like: smallest rms; given: given."""
    found = judge._setting(small(**fields), 9, WEIGHTS, TRUTH)
    assert found.lr == pytest.approx(lr, rel=5e-3)  # three digits, to be read in a report
    assert found.lr == float(f"{found.lr:.3g}")
    assert found.clip == pytest.approx(clip)
    assert found.seed == 9


def test_a_routing_is_the_same_in_whatever_order_a_token_names_its_experts() -> None:
    """Another expert, or a layer, a micro-batch or a token more, makes it another one."""
    one = [[[torch.tensor([[0, 1], [2, 3]])]]]
    assert judge._is_same_routing(one, [[[torch.tensor([[1, 0], [2, 3]])]]])
    for other in ([[0, 1], [2, 1]], [[0, 1]], [[0, 1], [2, 3], [0, 1]]):
        assert not judge._is_same_routing(one, [[[torch.tensor(other)]]])
    assert not judge._is_same_routing(one, [[*one[0], *one[0]]])


def test_ranks_that_disagree_on_placements_are_named() -> None:
    """Full tensors cannot be rebuilt from them."""
    results = threads.run(None, trial.Order(small(), "fold_impl", small().layout, 0, 0.1, 0.0))
    results[2].placements[ROUTER] = replace(results[2].placements[ROUTER], family="dense")
    with pytest.raises(Exception, match="ranks 0 and 2 disagree on its placement"):
        judge.rebuild(small(), small().layout, results)


def test_the_loss_of_a_run_is_the_mean_over_ranks_and_micro_batches() -> None:
    """gas 2 on four ranks: the mean of eight numbers, lanes counted alike."""
    made = small(**{"engine.gas": 2})
    results = threads.run(None, trial.Order(made, "fold_impl", made.layout, 0, 0.1, 0.0))
    losses = [loss for result in results for loss in result.steps[0].losses]
    step = judge.rebuild(made, made.layout, results).steps[0]
    assert len(losses) == 8
    assert step.loss == pytest.approx(sum(losses) / 8, rel=1e-15)
    assert step.before.tensors[ROUTER].dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(("margin", "verdict"), [(0.1, "pass"), (-0.24, "pass"), (-0.26, "fail")])
def test_a_followed_choice_may_be_off_by_a_logits_error_only(margin: float, verdict: str) -> None:
    """64 u of bfloat16 are 0.25: an expert left out by more is no near tie."""
    made = small(**{"engine.dtype": "bfloat16"})
    row = Row.of_case(made, "x", verdict="pass", reason="")
    (judged,) = judge._far_choices([row], margin)
    assert judged.verdict == verdict
    assert judged.detail == {"followed": True, "margin": margin}
