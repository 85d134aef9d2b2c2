"""Run a case three ways - reference, baseline, folded - and compare: the harness in one object.

Owns the order of the runs, their caches, the routing guard and the choice of learning rate and
clipping limit. Must not know how ranks are kept or rows are stored. Easy to get wrong: for a step
after the first the truth is evaluated at the engine's *own* weights before that step.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parity import batches, checkpoint, compare, contributions, explain, models, reference, update
from parity.case import Case
from parity.collect import Assembled, agree, assemble
from parity.compare import RowContext
from parity.errors import InfrastructureError
from parity.failure import Refused
from parity.implementation import Placement
from parity.layout import Layout
from parity.optimizers import ReferenceOptimizer
from parity.store import FAILING, Row, engine_of, shape_of
from parity.structure import structure_rows, weight_rows
from parity.trial import Checkpoint, Order, Planted, RankResult

MOST_CACHED = 32
"""Truths, and baselines, kept at once: a baseline takes up to 10 MiB, a suite has hundreds."""
MAX_DRAWS = 12
"""Seeds tried before a case whose routing is never safe is given up."""
GUARD = 100.0
"""Smallest selection margin, in logit errors: a flipped token looks like a 1-34 % bug."""
LOGIT_ERROR_U = 32.0
"""Error of the gap between two logits in unit round-offs; `parity calibrate` measures the largest,
in float32 over models of 2 and 3 layers (reports/calibration.md)."""
STEP_SIZE = 0.125
"""Largest |lr g| / |w| over tensors: large enough to see, small enough to stay a training step."""
SMALL_STEP_SIZE = STEP_SIZE / 8
"""The same beside master weights, where less can be seen: after steps of 0.125 a 16-bit model of
transformers was off by 18 u of its own rounding, folded or not, after these by as much as before.
"""


Replay = Sequence[Sequence[Sequence[Sequence[Any]]]]
"""[step][dp rank][micro-batch][layer] -> (T, K) int64 NumPy array."""


class Running(Protocol):
    """A task that the ranks of a world are running."""

    def results(self) -> list[Any]:
        """Wait, and give one result per rank, or raise why there is none."""

    def cancel(self) -> None:
        """See to it that no rank runs it any more; once there are results, do nothing."""


@dataclass(frozen=True)
class Later:
    """A task that runs when its results are asked for: where nothing can run beside the judge."""

    work: Callable[[], list[Any]]

    def results(self) -> list[Any]:
        """Run it."""
        return self.work()

    def cancel(self) -> None:
        """Nothing is running."""


class Pool(Protocol):
    """What runs a task in every rank of a world: `parity.gang.GangPool`."""

    def start(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,
        backend: str | None = None,
    ) -> Running:
        """Start `module:function` in every rank."""


@dataclass(frozen=True)
class Step:
    """One step of a run, rebuilt to full logical tensors."""

    loss: float
    before: Assembled
    """Weights the optimizer starts from: master copies where they exist."""
    ran_on: Assembled
    """Weights the forward ran on: `before` rounded to the case's dtype."""
    gradients: Assembled
    after: Assembled
    norms: list[float | None]
    """Every rank's own; None: the engine reports none."""
    routing: list[list[list[Tensor]]]
    """[rank][micro-batch][layer] -> (T, K)."""


@dataclass(frozen=True)
class Run:
    """One run of the implementation on one layout."""

    layout: Layout
    placements: dict[str, Placement]
    steps: list[Step]
    absent: tuple[str, ...]
    taps: list[dict[str, list[Any]]]
    weight_dtype: torch.dtype
    """Of `before` and `after`."""
    kept: checkpoint.Kept | None = None
    """What it held at its checkpoint."""


@dataclass(frozen=True)
class Setting:
    """What a draw fixes beside the case: seed, learning rate, clipping limit."""

    seed: int
    lr: float
    clip: float
    replay: Replay | None = field(default=None, repr=False)
    """Experts to force: in low precision a token near a tie would flip."""


@dataclass(frozen=True)
class Comparison:
    """What the rows of one case were made of."""

    case: Case
    folded: Run
    baseline: Run
    truths: list[reference.Evaluation]


@dataclass(frozen=True)
class _Baseline:
    """A non-folded run, its own rows against the reference, and how many steps those judge."""

    run: Run
    rows: list[Row]
    judged_steps: int


class _UnsafeRoutingError(Exception):
    """Some token is so close to a tie that round-off may flip it."""


class Judge:
    """Judges one implementation case after case; caches truths and baselines in between.

    Attributes:
        planted: faults of the folded run; the baseline is never planted, so it may be cached.
        num_gpus: GPUs a world may take; None: those visible here, which a job of many nodes is not.
        last: what the rows of the last case were made of.
    """

    def __init__(
        self,
        *,
        implementation: str,
        pool: Pool,
        device: str = "cpu",
        planted: tuple[Planted, ...] = (),
        num_gpus: int | None = None,
    ) -> None:
        self.implementation, self.pool, self.device = implementation, pool, device
        self.num_gpus = num_gpus
        self.planted = planted
        self.last: Comparison | None = None
        self._truths: dict[str, reference.Evaluation] = {}
        self._baselines: dict[str, _Baseline] = {}

    @property
    def absent(self) -> tuple[str, ...]:
        """Optional members the implementation did not offer in the last case that was compared."""
        return self.last.folded.absent if self.last else ()

    def with_planted(self, *planted: Planted) -> Judge:
        """Give a judge of the same implementation with other faults, sharing every cache."""
        other = copy.copy(self)
        other.planted = planted
        return other

    def rows(self, case: Case) -> list[Row]:
        """Run and compare one case.

        Raises:
            RankFailure: a rank raised, died or hung.
        """
        start = time.perf_counter()
        try:
            case = self._placed(case)
            rows, draws = self._drawn(case)
        except Refused as refusal:
            return [Row.of_case(case, self.implementation, verdict="skipped", reason=str(refusal))]
        seconds = time.perf_counter() - start
        redrawn = {"draws": draws} if draws > 1 else {}
        for row in rows:
            object.__setattr__(row, "seconds", seconds)
            if redrawn:
                object.__setattr__(row, "detail", {**(row.detail or {}), **redrawn})
        return rows

    def _placed(self, case: Case) -> Case:
        """Put the case on the judge's device: on GPUs what would use Gloo uses NCCL.

        Raises:
            Refused: the device is not there.
        """
        backend = case.engine.backend
        if self.device == "cpu":
            if backend == "nccl":
                raise Refused("NCCL needs --device cuda")
            return case
        if backend == "gloo":
            engine = case.engine.model_copy(update={"backend": "nccl"})
            case = case.model_copy(update={"engine": engine})
        present = torch.cuda.device_count() if self.num_gpus is None else self.num_gpus
        if case.engine.backend == "nccl" and case.shape.world > present:
            raise Refused(f"needs {case.shape.world} GPUs, {present} are visible")
        return case

    def _drawn(self, case: Case) -> tuple[list[Row], int]:
        """Draw seeds until no token is near a tie."""
        for draw in range(MAX_DRAWS):
            try:
                return self._compared(case, case.seed + 1000 * draw), draw + 1
            except _UnsafeRoutingError:
                continue
        raise InfrastructureError(
            f"case {case.id}: no safe routing in {MAX_DRAWS} seeds from {case.seed}; "
            "fewer tokens or experts, or another seed, would do"
        )

    def _compared(self, case: Case, seed: int) -> list[Row]:
        model = models.build_for(case, seed)
        weights = self._initial(case, model)
        first = self._truth(case, model, weights, 1, seed)
        setting = replace(
            _setting(case, seed, weights, first),
            replay=self._replay(case, model, weights, first, seed),
        )
        plain, folded, resumed = self._runs(case, model, weights, setting)
        truths = self._truths_of(case, model, weights, folded, setting)
        self.last = Comparison(case, folded, plain.run, truths)
        rows = self._rows_of(case, folded, truths, setting, model, weights)
        rows += self._against_baseline(case, folded, plain.run, setting.clip)
        if case.checkpoint is not None:
            rows += self._resumed_rows(case, folded, resumed, truths, setting, model, weights)
        rows += [replace(row, case=case.id) for row in plain.rows]
        unjudged = min(len(truths), plain.judged_steps) < case.steps
        if unjudged and not any(row.verdict in FAILING for row in rows):
            raise _UnsafeRoutingError
        return explain.labelled(rows, case)

    def _replay(
        self,
        case: Case,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        first: reference.Evaluation,
        seed: int,
    ) -> Replay | None:
        """Fix the routing of every step in low precision: what float64 chooses at the start."""
        if not _is_low(case) or _is_followed(case):
            return None
        routings = [first.routing]
        for step in range(2, case.steps + 1):
            drawn = batches.make(case, case.layout.dp, step, seed)
            routings.append(reference.routing(case, model, weights, drawn))
        return [[[[t.numpy() for t in m] for m in rank] for rank in each] for each in routings]

    def _initial(self, case: Case, model: nn.Module) -> dict[str, Tensor]:
        """Round the weights to the case's dtype, as the implementation gets them."""
        dtype = getattr(torch, case.engine.dtype)
        return {n: p.detach().to(dtype).double() for n, p in model.named_parameters()}

    def _truth(
        self,
        case: Case,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        step: int,
        seed: int,
        replay: Replay | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> reference.Evaluation:
        """Evaluate the reference; the first step's is shared by cases that differ elsewhere.

        Raises:
            _UnsafeRoutingError: the selection margin is below GUARD logit errors, and the routing
                is not replayed.
        """
        key = f"{_data_key(case)}|{seed}|{step}"
        truth = self._truths.get(key) if step == 1 else None
        if truth is None:
            drawn = batches.make(case, case.layout.dp, step, seed)
            forced = _of_step(replay, step)
            truth = reference.evaluate(case, model, weights, drawn, forced, biases)
            if step == 1:
                _remember(self._truths, key, truth)
        unit = compare.UNIT_ROUNDOFF[getattr(torch, case.engine.dtype)]
        if not _is_low(case) and truth.margin < GUARD * LOGIT_ERROR_U * unit:
            raise _UnsafeRoutingError
        return truth

    def _truths_of(
        self,
        case: Case,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        run: Run,
        setting: Setting,
        earlier: Sequence[reference.Evaluation] = (),
    ) -> list[reference.Evaluation]:
        """Evaluate the reference at the given weights, then at the run's own before each step.

        A run that goes on where another stopped is evaluated behind the truths of `earlier` steps.

        A run that shuffled the weights it was given would be right about its own.

        Stops before a step whose routing is not safe: the weights there are the run's own, and a
        faulty run must not be drawn again for ever.
        """
        seed, replay = setting.seed, setting.replay
        if _is_followed(case):
            return self._followed(case, model, weights, run, seed, earlier)
        truths = [*earlier] or [self._truth(case, model, weights, 1, seed)]
        left = run.steps if earlier else run.steps[1:]
        for number, step in enumerate(left, start=len(truths) + 1):
            own = {**weights, **{n: t.double() for n, t in step.ran_on.filled.items()}}
            biases = reference.biases_after(case, model, truths)
            try:
                truths.append(self._truth(case, model, own, number, seed, replay, biases))
            except _UnsafeRoutingError:
                break
        return truths

    def _followed(
        self,
        case: Case,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        run: Run,
        seed: int,
        earlier: Sequence[reference.Evaluation],
    ) -> list[reference.Evaluation]:
        """Evaluate the reference along the choices of the run's first lanes, behind earlier steps.

        A foreign gate cannot be forced, ours can: a token near a tie goes where the engine sent it.
        """
        truths = [*earlier]
        first_lanes = {run.layout.coordinate(r).dp: r for r in reversed(range(run.layout.world))}
        for number, step in enumerate(run.steps, start=len(earlier) + 1):
            chosen = [step.routing[first_lanes[dp]] for dp in range(run.layout.dp)]
            if number == 1:
                truth = self._truth(case, model, weights, 1, seed)
                if _is_same_routing(chosen, truth.routing):  # its own choices were the run's
                    truths.append(truth)
                    continue
            own = {n: t.double() for n, t in step.ran_on.filled.items()}
            drawn = batches.make(case, run.layout.dp, number, seed)
            at = weights if number == 1 else own
            biases = reference.biases_after(case, model, truths)
            truths.append(reference.evaluate(case, model, at, drawn, chosen, biases))
        return truths

    def _runs(
        self, case: Case, model: nn.Module, weights: Mapping[str, Tensor], setting: Setting
    ) -> tuple[_Baseline, Run, Run | None]:
        """Run the baseline and beside it folded, then judge the baseline.

        Not before folded ranks have answered: nobody else would see a hang in time. Cases of equal
        data, dp and engine share a baseline. A folded run with a checkpoint on the way has its
        second half run again from there.
        """
        parts = case.engine, case.optimizer, case.steps, setting
        key = f"{_data_key(case)}|{parts}"
        known = self._baselines.get(key)
        at = case.layout.baseline()
        with contextlib.ExitStack() as started:
            point = None
            if case.checkpoint is not None:  # its folder goes after the runs that write there
                folder = started.enter_context(tempfile.TemporaryDirectory(prefix="parity-"))
                point = Checkpoint(folder, case.saved_after, loads=False)
            plain = None if known else self._start(started, case, at, setting)
            running = self._start(started, case, case.layout, setting, self.planted, point)
            run = None if plain is None else _finished(case, at, plain)
            folded, resumed = _finished(case, case.layout, running), None
            if run is not None:
                known = self._judged_baseline(case, run, model, weights, setting)
                _remember(self._baselines, key, known)
            if point is not None and folded.kept is not None:
                there = Layout(**case.resumed_shape.model_dump())
                loads = replace(point, loads=True)
                again = self._start(started, case, there, setting, self.planted, loads)
                resumed = _finished(case, there, again)
        assert known is not None
        return known, folded, resumed

    def _judged_baseline(
        self,
        case: Case,
        run: Run,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        setting: Setting,
    ) -> _Baseline:
        truths = self._truths_of(case, model, weights, run, setting)
        rows = self._rows_of(case, run, truths, setting, model, weights)
        return _Baseline(run, rows, len(truths))

    def _resumed_rows(
        self,
        case: Case,
        folded: Run,
        resumed: Run | None,
        truths: Sequence[reference.Evaluation],
        setting: Setting,
        model: nn.Module,
        weights: Mapping[str, Tensor],
    ) -> list[Row]:
        """Compare what was loaded with what was saved, and judge the steps at another layout.

        Raises:
            _UnsafeRoutingError: a step there is near a tie, and nothing has failed.
        """
        after = case.saved_after
        if resumed is None or resumed.kept is None or folded.kept is None:
            about = self._context(case, folded.layout, "reference", after)
            return [checkpoint.skipped_row(about, "the implementation offers no save and load")]
        about = self._context(case, resumed.layout, "reference", after)
        same = resumed.layout == folded.layout
        ends = None
        if same and case.engine.backend != "nccl":
            ends = resumed.steps[-1].after, folded.steps[-1].after
        rows = checkpoint.checkpoint_rows(about, folded.kept, resumed.kept, ends)
        if same and ends is None:
            said = "the steps behind a resume are not compared: NCCL adds in no fixed order"
            rows.append(checkpoint.skipped_row(about, said))
        if same or not resumed.steps or len(truths) < after:
            return rows
        there = case.model_copy(update={"shape": _shape(case, resumed.layout)})
        known = self._truths_of(there, model, weights, resumed, setting, truths[:after])
        unjudged = len(known) < after + len(resumed.steps)
        if unjudged and not any(row.verdict in FAILING for row in rows):
            raise _UnsafeRoutingError
        # the optimizers of the reference need the steps before, whatever layout they ran at
        joined = replace(resumed, steps=[*folded.steps[:after], *resumed.steps])
        judged = self._rows_of(there, joined, known, setting, model, weights)
        return rows + [row for row in judged if row.step is not None and row.step > after]

    def _start(
        self,
        started: contextlib.ExitStack,
        case: Case,
        layout: Layout,
        setting: Setting,
        planted: tuple[Planted, ...] = (),
        point: Checkpoint | None = None,
    ) -> Running:
        """Start a run, to be cancelled at the end of the stack where nobody waited for it."""
        order = Order(
            case, self.implementation, layout, setting.seed, setting.lr, setting.clip,
            replay=setting.replay, planted=planted, checkpoint=point,
        )  # fmt: skip
        backend = case.engine.backend
        if backend == "threads":
            running = self.pool.start(1, "parity.threads:run", [order], case.deadline_s)
        else:
            payloads, world = [order] * layout.world, layout.world
            running = self.pool.start(world, "parity.trial:run", payloads, case.deadline_s, backend)
        started.callback(running.cancel)
        return running

    def _rows_of(
        self,
        case: Case,
        run: Run,
        truths: Sequence[reference.Evaluation],
        setting: Setting,
        model: nn.Module,
        weights: Mapping[str, Tensor],
    ) -> list[Row]:
        zeros = models.structural_zeros(case.model, case.auxiliary)
        names = models.moe_names(case.model)
        layout, placements = run.layout, run.placements
        true_optimizer = ReferenceOptimizer(case.optimizer, setting.lr)
        own_optimizer = ReferenceOptimizer(case.optimizer, setting.lr)
        about = self._context(case, layout, "reference", 1)
        rows = structure_rows(about, case, weights, placements, layout)
        rows += weight_rows(about, [(s.before, s.after) for s in run.steps], weights, placements)
        truths = [_handed_over(truth, placements) for truth in truths]
        judged = list(zip(run.steps, truths, strict=False))  # truths may end before the run
        steps = [
            update.OptimizerStep(s.before, s.after, s.gradients, truth.gradients, setting.clip)
            for s, truth in judged
        ]
        for number, (step, truth) in enumerate(judged, start=1):
            about = self._context(case, layout, "reference", number)
            routing = compare.routing_rows(about, step.routing, truth.routing, layout, names)
            rows += _far_choices(routing, truth.margin) if _is_followed(case) else routing
            rows += compare.loss_rows(about, step.loss, truth.loss)
            rows += compare.gradient_rows(
                about, step.gradients, truth.gradients, placements, layout, zeros
            )
            for kind, tensors in (("gradient", step.gradients), ("parameter", step.after)):
                rows += compare.replica_rows(about, tensors, placements, layout, kind)  # type: ignore[arg-type]
            rows += compare.grad_norm_rows(about, step.norms, truth.norm, setting.clip)
            rows += update.update_rows(
                about,
                steps[number - 1],
                true_optimizer,
                own_optimizer,
                placements,
                layout,
                weight_dtype=run.weight_dtype,
                structural_zero=zeros,
            )
        plain_optimizer = ReferenceOptimizer(case.optimizer, setting.lr)
        rows = update.beside_unclipped(rows, steps, plain_optimizer)
        tensors_of = [
            contributions.StepTensors(s.ran_on, s.gradients, truth) for s, truth in judged
        ]
        return contributions.annotate(
            rows, case, model, tensors_of, placements, setting.seed, weights
        )

    def _against_baseline(self, case: Case, folded: Run, baseline: Run, limit: float) -> list[Row]:
        """Compare the first step only: afterwards the two runs stand at different weights."""
        mine, other = folded.steps[0], baseline.steps[0]
        about = self._context(case, folded.layout, "baseline", 1)
        names = models.moe_names(case.model)
        rows = compare.routing_rows(about, mine.routing, other.routing, folded.layout, names)
        rows += compare.loss_rows(about, mine.loss, other.loss)
        rows += compare.gradient_rows(
            about,
            mine.gradients,
            {n: t.double() for n, t in other.gradients.filled.items()},
            folded.placements,
            folded.layout,
            models.structural_zeros(case.model, case.auxiliary),
        )
        rows += compare.grad_norm_rows(about, mine.norms, other.norms[0], limit)
        if _is_followed(case) and any(r.quantity == "routing" and r.error != 0.0 for r in rows):
            said = f"routing differs in {case.engine.dtype}"
            rows = [replace(row, verdict="skipped", reason=said) for row in rows]
        return rows

    def _context(self, case: Case, layout: Layout, against: str, step: int) -> RowContext:
        shape = shape_of(case.model_copy(update={"shape": _shape(case, layout)}))
        dtype = getattr(torch, case.engine.dtype)
        return RowContext(
            case.id, self.implementation, shape, engine_of(case), against, step, dtype
        )


def _handed_over(
    truth: reference.Evaluation, placements: Mapping[str, Placement]
) -> reference.Evaluation:
    """Leave out the parameters that failed already because nobody handed them over."""
    kept = {name: g for name, g in truth.gradients.items() if name in placements}
    return truth if len(kept) == len(truth.gradients) else replace(truth, gradients=kept)


def _shape(case: Case, layout: Layout) -> Any:
    sizes = {key: getattr(layout, key) for key in ("world", "tp", "ep", "etp", "pp")}
    return case.shape.model_copy(update=sizes)


def _remember(cache: dict[str, Any], key: str, value: Any) -> None:
    """Keep a result for the cases to come, in the place of the oldest where there are many."""
    if len(cache) >= MOST_CACHED:
        del cache[next(iter(cache))]
    cache[key] = value


def _is_low(case: Case) -> bool:
    """Tell whether the dtype is too coarse for a routing of its own: replayed, or followed."""
    return getattr(torch, case.engine.dtype) in compare.SCALE_LIMIT


def _is_followed(case: Case) -> bool:
    """Tell whether the reference follows the run's routing: low precision, a foreign gate."""
    return _is_low(case) and case.model.name != "tiny"


def _is_same_routing(
    one: Sequence[Sequence[Sequence[Tensor]]], other: Sequence[Sequence[Sequence[Tensor]]]
) -> bool:
    """Compare [dp rank][micro-batch][layer] -> (T, K) experts, in whatever order along K."""
    first, second = _flat(one), _flat(other)
    return len(first) == len(second) and all(
        torch.equal(a.sort(-1).values, b.sort(-1).values)
        for a, b in zip(first, second, strict=True)
    )


def _flat(routing: Sequence[Sequence[Sequence[Tensor]]]) -> list[Tensor]:
    return [chosen for rank in routing for layers in rank for chosen in layers]


def _far_choices(rows: list[Row], margin: float) -> list[Row]:
    """Fail the routing where an expert was chosen that float64 finds well below one left out.

    A choice the reference followed is right up to near ties: 64 u, the error a logit may have.
    """
    dtype = getattr(torch, rows[0].engine["dtype"])
    limit = compare.FACTOR * compare.UNIT_ROUNDOFF[dtype]
    made = []
    for row in rows:
        row = replace(row, detail={**(row.detail or {}), "followed": True, "margin": margin})
        if margin < -limit:
            said = f"an expert, or a group, was left out that leads by {-margin:.3g} > {limit:.3g}"
            row = replace(row, verdict="fail", reason="; ".join(filter(None, (row.reason, said))))
        made.append(row)
    return made


def _of_step(replay: Replay | None, step: int) -> list[list[list[Tensor]]] | None:
    if replay is None:
        return None
    return [[[torch.as_tensor(t) for t in m] for m in rank] for rank in replay[step - 1]]


def _data_key(case: Case) -> str:
    """Say everything the reference's first step depends on, but the seed."""
    lanes = case.shape.tp if case.data.lane_varying else None
    parts = case.model, case.data, case.auxiliary, case.engine.gas, case.engine.dtype
    return f"{parts}|{case.layout.dp}|{lanes}"


def _setting(
    case: Case, seed: int, weights: Mapping[str, Tensor], truth: reference.Evaluation
) -> Setting:
    """Choose clipping limit and learning rate from the reference.

    Linear optimizers: lr so that the largest |lr g| / |w| over tensors is STEP_SIZE after
    clipping. Sign-like ones move every entry by about lr, Adam by |g| / (|g| + eps) of it:
    STEP_SIZE of the smallest rms of a tensor. A delta far below |w| is lost in the rounding of w,
    one far above is no training step.
    """
    step_size = SMALL_STEP_SIZE if _is_followed(case) else STEP_SIZE
    clip = float(f"{case.engine.clip * truth.norm:.3g}")
    lr = case.optimizer.lr
    kept = min(1.0, clip / truth.norm) if clip else 1.0
    if lr is None and case.optimizer.name in ("sgd", "momentum"):
        sizes = [
            float(weights[n].norm() / g.norm())
            for n, g in truth.gradients.items()
            if float(g.norm()) > 0
        ]
        lr = step_size * min(sizes) / kept
    elif lr is None:
        rms = [r for w in weights.values() if (r := _rms(w)) > 0]
        largest = max(map(_rms, truth.gradients.values())) * kept
        eps = case.optimizer.eps if case.optimizer.name in ("adam", "adamw") else 0.0
        lr = step_size * min(rms) * (1.0 + eps / largest)
    assert lr is not None
    return Setting(seed, float(f"{lr:.3g}"), clip)


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm()) / math.sqrt(tensor.numel())


def _finished(case: Case, layout: Layout, running: Running) -> Run:
    """Wait for a run and rebuild what its ranks handed back."""
    results = running.results()
    return rebuild(case, layout, results[0] if case.engine.backend == "threads" else results)


def rebuild(case: Case, layout: Layout, results: Sequence[RankResult]) -> Run:
    """Turn what the ranks handed back into full logical tensors.

    Raises:
        ParityError: ranks disagree on placements, or pieces do not fit together.
    """
    placements = agree([result.placements for result in results])
    dtype = getattr(torch, case.engine.dtype)

    def whole(kind: str, step: int) -> Assembled:
        shards = [getattr(result.steps[step], kind).tensors() for result in results]
        return assemble(layout, placements, shards)

    steps = []
    for index in range(len(results[0].steps)):
        parts = [result.steps[index] for result in results]
        before = whole("before", index)
        steps.append(
            Step(
                loss=sum(sum(p.losses) / len(p.losses) for p in parts) / len(parts),
                before=before,
                ran_on=_rounded(before, dtype),
                gradients=whole("gradients", index),
                after=whole("after", index),
                norms=[p.grad_norm for p in parts],
                routing=[
                    [[torch.from_numpy(t) for t in layers] for layers in p.routing] for p in parts
                ],
            )
        )
    taps = [result.taps for result in results]
    weights = getattr(torch, results[0].weight_dtype)
    kept = checkpoint.rebuild(layout, placements, results)
    return Run(layout, placements, steps, results[0].absent, taps, weights, kept)


def _rounded(weights: Assembled, dtype: torch.dtype) -> Assembled:
    """Round what is wider than the dtype, as an engine with master copies does for its forward."""
    if dtype not in compare.SCALE_LIMIT:
        return weights

    def rounded(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {n: None if t is None else t.to(dtype).float() for n, t in tensors.items()}

    return replace(weights, tensors=rounded(weights.tensors), filled=rounded(weights.filled))
