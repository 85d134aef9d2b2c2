"""How far right runs lie from the reference, and how small a wrong one is still seen.

Owns the benign variations (order of shares, permutation of sequences, threads, seeds, and through
the judge: ranks as processes or threads, bucket sizes) and the planted losses. Must not know any
implementation's internals. Easy to get wrong: a seed whose routing is not safe is drawn again, as
in a case; counted as a run it would be a false alarm of our own making.

Verdicts come from `parity.compare` with the thresholds every case has; nothing here sets one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from parity import batches, compare, models, reference
from parity.batches import MicroBatch
from parity.case import Case, Data, Engine, Model, Shape
from parity.collect import Assembled, assemble
from parity.compare import RowContext
from parity.implementation import Family, Placement
from parity.judge import GUARD, LOGIT_ERROR_U
from parity.layout import Layout
from parity.store import FAILING, Row, engine_of, shape_of

DTYPES = ("float64", "float32")
ON_RANKS = 0.25
"""Part of the runs that goes through the implementation on ranks; the rest is the model alone."""
VARIANTS = 4
"""Orders tried of one draw: the float64 truth costs as much as two of them."""
TWO_THREADS_EVERY = 16
"""Draws between two runs on two threads, which cost ten times the rest on small tensors."""
MOST_SHARES = 6
"""Shares of a draw for the model alone; more of them cost time and round no worse."""
BUCKETS = (None, 1, 1000, 20_000)
"""Elements of one gradient collective, None: all in one."""
SCALE_SEEDS = 20
TOKEN_SEEDS = 5
LOST_PER_SEED = 24
"""Tokens lost one after the other per seed, all 96 in the first."""
WHOLE = "all families"


class Judging(Protocol):
    """What runs a case on ranks and compares it: `parity.judge.Judge`."""

    def rows(self, case: Case) -> Sequence[Row]:
        """Give the rows of the case."""


@dataclass
class Noise:
    """Largest error of a family in unit round-offs, and where it was."""

    error_u: float = 0.0
    tensor: str = ""


@dataclass
class Tokens:
    """Losses of one token of 96: how many were tried and seen, the faintest in thresholds."""

    tried: int = 0
    seen: int = 0
    faintest: float = math.inf


@dataclass
class Figures:
    """What was found for one dtype.

    runs: variation -> runs compared with the reference. alarms: failing rows of benign runs.
    worst: family (or quantity) -> noise. scale: family -> smallest |scale - 1| seen with every
    seed and both signs. rows: family -> largest number of rows of which a single lost one was
    seen, and how many were tried and seen.
    """

    dtype: str
    runs: Counter[str] = field(default_factory=Counter)
    alarms: list[str] = field(default_factory=list)
    worst: dict[str, Noise] = field(default_factory=dict)
    logit_error_u: float = 0.0
    redrawn: int = 0
    scale: dict[str, float] = field(default_factory=dict)
    rows: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tokens: Tokens = field(default_factory=Tokens)

    def add(self, variation: str, rows: Iterable[Row], *, runs: int = 1) -> None:
        """Count runs and take note of their rows."""
        self.runs[variation] += runs
        unit = compare.UNIT_ROUNDOFF[getattr(torch, self.dtype)]
        for row in rows:
            if row.verdict in FAILING:
                self.alarms.append(f"{variation}: {row.case} {row.quantity} {row.tensor}")
            if row.quantity in ("gradient", "loss", "grad_norm") and row.error is not None:
                name = row.family or str(row.quantity)
                if row.error / unit > self.worst.setdefault(name, Noise()).error_u:
                    self.worst[name] = Noise(row.error / unit, row.tensor or "")


@dataclass(frozen=True)
class Draw:
    """One case with one seed: weights as the dtype has them, data, and the float64 truth."""

    case: Case
    model: models.Tiny
    weights: dict[str, Tensor]
    step: list[list[MicroBatch]]
    truth: reference.Evaluation

    @property
    def dtype(self) -> torch.dtype:
        """Give the dtype of the case."""
        dtype: torch.dtype = getattr(torch, self.case.engine.dtype)
        return dtype


@dataclass(frozen=True)
class Outcome:
    """What one run of the model in its dtype gave."""

    loss: float
    gradients: dict[str, Tensor]
    logit_error: float


def calibrate(
    runs: int, cases: Sequence[Case], judge: Judging, say: Callable[[str], None] = print
) -> list[Figures]:
    """Measure noise and sensitivity per dtype.

    Args:
        runs: benign runs per dtype, at least.
        cases: whose models, shapes and data are varied.
        judge: runs cases on ranks.
        say: told about progress.
    """
    found = []
    for dtype in DTYPES:
        figures = Figures(dtype)
        _run_on_ranks(figures, cases, judge, round(runs * ON_RANKS))
        say(f"{dtype}: {figures.runs.total()} runs on ranks")
        _run_model(figures, cases, runs - figures.runs.total())
        say(f"{dtype}: {figures.runs.total()} runs, {len(figures.alarms)} false alarms")
        _measure_scales(figures, cases)
        _measure_rows(figures, cases)
        _measure_tokens(figures)
        say(f"{dtype}: sensitivity measured")
        found.append(figures)
    return found


# --- benign runs --------------------------------------------------------------------------------


def _run_on_ranks(figures: Figures, cases: Sequence[Case], judge: Judging, runs: int) -> None:
    """Judge cases with seeds and bucket sizes of their own, as threads and as Gloo processes."""
    small = [case for case in cases if case.shape.world <= 6]
    index = 0
    while sum(n for name, n in figures.runs.items()) < runs:
        case = small[(7 * index) % len(small)]
        for backend in ("threads", "gloo"):
            rows = judge.rows(_varied(case, figures.dtype, backend, index))
            figures.redrawn += (rows[0].detail or {}).get("draws", 1) - 1
            figures.add(f"ranks as {backend}", rows, runs=2)  # baseline and folded
        index += 1


def _varied(case: Case, dtype: str, backend: str, index: int) -> Case:
    bucket = BUCKETS[index % len(BUCKETS)]
    options = {} if bucket is None else {"folding": {"bucket_numel": bucket}}
    engine = case.engine.model_copy(update={"dtype": dtype, "backend": backend, "options": options})
    return case.model_copy(
        update={"id": f"{case.id}#{index}", "engine": engine, "seed": 10_000 + index}
    )


def _run_model(figures: Figures, cases: Sequence[Case], runs: int) -> None:
    """Run the model alone with shares, sequences and threads in other orders."""
    threads = torch.get_num_threads()
    done = 0
    try:
        for number, draw in enumerate(_draws(figures, cases, 20_000)):
            generator = torch.Generator().manual_seed(number)
            for variant in range(VARIANTS):
                if done == runs:
                    return
                several = variant == 0 and number % TWO_THREADS_EVERY == 0
                torch.set_num_threads(2 if several else 1)
                outcome = evaluate(draw, generator)
                name = "two threads" if several else "order of shares and tokens"
                figures.add(name, judged(draw, outcome))
                unit = compare.UNIT_ROUNDOFF[draw.dtype]
                figures.logit_error_u = max(figures.logit_error_u, outcome.logit_error / unit)
                done += 1
    finally:
        torch.set_num_threads(threads)


def _draws(figures: Figures, cases: Sequence[Case], seed: int) -> Iterator[Draw]:
    """Give draws of one case after the other for ever, each safe in its routing."""
    few = [case for case in cases if case.layout.dp * case.engine.gas <= MOST_SHARES]
    number = 0
    while True:
        # three sequences a micro-batch: only whole ones can change places under causal attention
        case = few[(11 * number) % len(few)]
        draw = make_draw(_alone(case, figures.dtype, sequences=3), seed + number)
        number += 1
        if draw is None:
            figures.redrawn += 1
            continue
        yield draw


def _alone(case: Case, dtype: str, sequences: int) -> Case:
    data = case.data.model_copy(update={"sequences": sequences, "length": 2})
    engine = case.engine.model_copy(update={"dtype": dtype})
    return case.model_copy(update={"data": data, "engine": engine, "steps": 1})


def make_draw(case: Case, seed: int) -> Draw | None:
    """Draw model and data and evaluate the truth; None where some token is too near a tie."""
    model = models.build(case.model, seed, idle_expert=case.data.idle_expert, ties=case.data.ties)
    dtype = getattr(torch, case.engine.dtype)
    weights = {n: p.detach().to(dtype).double() for n, p in model.named_parameters()}
    step = batches.make(case, case.layout.dp, 1, seed)
    truth = reference.evaluate(case, model, weights, step)
    if truth.margin < GUARD * LOGIT_ERROR_U * compare.UNIT_ROUNDOFF[dtype]:
        return None
    return Draw(case, model, weights, step, truth)


def evaluate(draw: Draw, generator: torch.Generator) -> Outcome:
    """Run the model in the case's dtype, shares and sequences in an order of the generator's.

    A share is one (dp rank, micro-batch); gradients add up in the dtype, share after share.
    """
    dp, gas = len(draw.step), len(draw.step[0])
    leaves = {n: w.to(draw.dtype).requires_grad_() for n, w in draw.weights.items()}
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    loss, logit_error = 0.0, 0.0
    for m in torch.randperm(gas, generator=generator).tolist():
        ranks = torch.randperm(dp, generator=generator).tolist()
        objective, logits, indices = torch.zeros((), dtype=draw.dtype), [], []
        for r in ranks:
            batch = draw.step[r][m]
            order = torch.randperm(len(batch.input_ids), generator=generator)
            fed = dict(_permuted(batch, order).for_mean(draw.dtype))
            with_routing = functional_call(draw.model, leaves, (), fed)
            objective = objective + with_routing / (dp * gas)
            layers = models.moe_layers(draw.model)
            logits.append([layer.logits_TE for layer in layers])
            indices.append([layer.indices_TK for layer in layers])
            logit_error = max(logit_error, _gap_error(draw, batch, order, logits[-1]))
        for layer in range(draw.case.model.layers):
            objective = objective + reference.auxiliary_loss(
                draw.case.auxiliary, draw.case.model.score,
                [each[layer] for each in logits], [each[layer] for each in indices],
            ).to(draw.dtype) / gas  # fmt: skip
        parts = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        for name, part in zip(total, parts, strict=True):
            total[name] += 0.0 if part is None else part
        loss += float(objective.detach())
    return Outcome(loss, total, logit_error)


def _permuted(batch: MicroBatch, order: Tensor) -> MicroBatch:
    probes = None if batch.probes is None else batch.probes[:, :, order]
    return replace(
        batch, input_ids=batch.input_ids[order], labels=batch.labels[order], probes=probes
    )


@torch.no_grad()
def _gap_error(draw: Draw, batch: MicroBatch, order: Tensor, logits: Sequence[Tensor]) -> float:
    """Give the largest error of a gap between the last chosen and the first refused logit.

    The logits of an idle expert are large, and so are their errors, but no choice rests on them.
    """
    if draw.dtype is torch.float64:
        return 0.0  # nothing here is more exact
    fed = dict(_permuted(batch, order).for_mean(torch.float64))
    functional_call(draw.model, draw.weights, (), fed)
    largest = 0.0
    for layer, actual in zip(models.moe_layers(draw.model), logits, strict=True):
        order_TE = layer.logits_TE.sort(dim=-1, descending=True, stable=True).indices
        edge = order_TE[:, draw.case.model.top_k - 1 : draw.case.model.top_k + 1]
        gaps = [t.gather(-1, edge).diff(dim=-1) for t in (actual.double(), layer.logits_TE)]
        largest = max(largest, float((gaps[0] - gaps[1]).abs().max()))
    return largest


_FAMILIES: Mapping[str, Family] = {
    "norm": "layernorm",
    "moe.router": "router",
    "moe.experts": "expert",
    "moe.shared": "shared_expert",
    "attention": "attention",
    "embedding": "embedding",
}
"""Part of a name of the tiny model -> family; the first that fits."""


def family_of(name: str) -> Family:
    """Name the family of a parameter of the tiny model."""
    return next((family for part, family in _FAMILIES.items() if part in name), "dense")


# --- verdicts -----------------------------------------------------------------------------------


def judged(draw: Draw, outcome: Outcome) -> list[Row]:
    """Compare a run with the truth by the rules every case is judged by."""
    about = _about(draw.case)
    norm = compare.norm(outcome.gradients.values())
    return [
        *compare.loss_rows(about, outcome.loss, draw.truth.loss),
        *compare.grad_norm_rows(about, [norm], draw.truth.norm),
        *gradient_rows(draw, outcome.gradients),
    ]


def gradient_rows(draw: Draw, gradients: Mapping[str, Tensor]) -> list[Row]:
    """Compare some or all gradients of a run with the truth."""
    placements = {name: Placement(family_of(name)) for name in gradients}
    held: Assembled = assemble(Layout(1), placements, [gradients])
    expected = {name: draw.truth.gradients[name] for name in gradients}
    zeros = models.structural_zeros(draw.case.model, draw.case.auxiliary)
    about = _about(draw.case)
    return compare.gradient_rows(about, held, expected, placements, Layout(1), zeros)


def _about(case: Case) -> RowContext:
    dtype = getattr(torch, case.engine.dtype)
    alone = case.model_copy(update={"shape": Shape(world=1)})
    return RowContext(case.id, "model", shape_of(alone), engine_of(case), "reference", 1, dtype)


def _caught(rows: Iterable[Row]) -> bool:
    return any(row.verdict in FAILING for row in rows)


# --- sensitivity --------------------------------------------------------------------------------


def _outcomes(
    figures: Figures, cases: Sequence[Case], seed: int, count: int
) -> Iterator[tuple[Draw, Outcome]]:
    for number, draw in zip(range(count), _draws(figures, cases, seed), strict=False):
        yield draw, evaluate(draw, torch.Generator().manual_seed(number))


def _measure_scales(figures: Figures, cases: Sequence[Case]) -> None:
    """Find per family the smallest scale error that every seed shows, by bisection."""
    for draw, outcome in _outcomes(figures, cases, 30_000, SCALE_SEEDS):
        zeros = models.structural_zeros(draw.case.model, draw.case.auxiliary)
        families: dict[str, dict[str, Tensor]] = {}
        for name, gradient in outcome.gradients.items():
            if name not in zeros:
                families.setdefault(family_of(name), {})[name] = gradient
                families.setdefault(WHOLE, {})[name] = gradient
        for family, gradients in families.items():
            worst = max(smallest_scale(draw, gradients, sign) for sign in (1.0, -1.0))
            figures.scale[family] = max(figures.scale.get(family, 0.0), worst)


def smallest_scale(draw: Draw, gradients: Mapping[str, Tensor], sign: float) -> float:
    """Bisect for the smallest e so that gradients times 1 + sign * e fail, to 2 %."""
    unit = compare.UNIT_ROUNDOFF[draw.dtype]
    low, high = unit, 4096 * unit

    def seen(size: float) -> bool:
        scaled = {n: (g.double() * (1.0 + sign * size)).to(g.dtype) for n, g in gradients.items()}
        return _caught(gradient_rows(draw, scaled))

    if not seen(high):
        return math.inf
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def living_rows(rows: Tensor) -> Tensor:
    """List the rows of a matrix above one round-off of its norm; others are zero but for rounding.

    So is a router's row of an expert that no token chose, where the weights of chosen ones alone
    count and are normalised.
    """
    sizes = rows.double().norm(dim=-1)
    is_alive = sizes > compare.UNIT_ROUNDOFF[rows.dtype] * sizes.norm()
    alive: Tensor = is_alive.nonzero().flatten()
    return alive


def _measure_rows(figures: Figures, cases: Sequence[Case]) -> None:
    """Lose one row of each matrix, and see whether its tensor fails."""
    for number, (draw, outcome) in enumerate(_outcomes(figures, cases, 40_000, SCALE_SEEDS)):
        generator = torch.Generator().manual_seed(number)
        zeros = models.structural_zeros(draw.case.model, draw.case.auxiliary)
        for name, gradient in outcome.gradients.items():
            rows = gradient.flatten(0, -2) if gradient.dim() > 1 else None
            if rows is None or name in zeros:
                continue
            alive = living_rows(rows)
            lost = rows.clone()
            lost[alive[torch.randint(len(alive), (), generator=generator)]] = 0.0
            seen = _caught(gradient_rows(draw, {name: lost.view_as(gradient)}))
            most, tried, caught = figures.rows.get(family_of(name), (0, 0, 0))
            figures.rows[family_of(name)] = (
                max(most, len(rows)), tried + 1, caught + seen
            )  # fmt: skip


def case_of_96_tokens(dtype: str) -> Case:
    """Make the case of which one token is lost: two dp ranks, 4 sequences of 12 tokens each."""
    return Case(
        id="96-tokens", suite="calibration", file="", shape=Shape(world=2), model=Model(),
        engine=Engine.model_validate({"dtype": dtype, "backend": "threads"}),
        data=Data(sequences=4, length=12, uneven=False),
    )  # fmt: skip


def _measure_tokens(figures: Figures) -> None:
    """Lose one token of 96 in the backward of one MoE layer, and see whether the run fails."""
    case = case_of_96_tokens(figures.dtype)
    draws = (make_draw(case, seed) for seed in itertools.count(50_000))
    for number, draw in enumerate(itertools.islice(filter(None, draws), TOKEN_SEEDS)):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(number)).tolist()
        for token in order[: 96 if number == 0 else LOST_PER_SEED]:
            rows = gradient_rows(draw, without_token(draw, token, layer=token % 2))
            figures.tokens.tried += 1
            figures.tokens.seen += _caught(rows)
            used = max((row.error or 0.0) / (row.threshold or 1.0) for row in rows)
            figures.tokens.faintest = min(figures.tokens.faintest, used)


def without_token(draw: Draw, token: int, layer: int) -> dict[str, Tensor]:
    """Give the gradients where one token's routed output carries no gradient; forward unchanged."""
    rank, inside = divmod(token, 48)
    seen = 0

    def hook(_: nn.Module, __: Any, y_BSH: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen != rank + 1:  # one forward per rank, in order: gas is 1
            return y_BSH
        kept = torch.ones(y_BSH.shape[:-1], dtype=y_BSH.dtype)
        kept.view(-1)[inside] = 0.0
        kept = kept.unsqueeze(-1)
        return y_BSH * kept + (y_BSH * (1.0 - kept)).detach()

    handle = models.moe_layers(draw.model)[layer].register_forward_hook(hook)
    leaves = {n: w.to(draw.dtype).requires_grad_() for n, w in draw.weights.items()}
    try:
        losses = [
            functional_call(draw.model, leaves, (), dict(batch.for_mean(draw.dtype)))
            for (batch,) in draw.step
        ]
    finally:
        handle.remove()
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


# --- report -------------------------------------------------------------------------------------


def render(found: Sequence[Figures], command: str, machine: Mapping[str, str]) -> str:
    """Write the report, without a date: the same figures give the same text."""
    parts = [
        "# Calibration",
        f"Made by `{command}`. A benign run differs from the reference only in what must not "
        "matter: seed, order of the shares and of the sequences, threads, ranks as threads or as "
        "Gloo processes, bucket sizes. u is the unit round-off of the dtype; gradients, losses and "
        f"norms may be off by {compare.FACTOR} u.",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
    ]
    for figures in found:
        parts += [f"## {figures.dtype}", *_sections(figures)]
    return "\n\n".join(parts) + "\n"


def _sections(figures: Figures) -> list[str]:
    runs = ", ".join(f"{count} {name}" for name, count in figures.runs.items())
    lines = [
        f"**{len(figures.alarms)} false alarms in {figures.runs.total()} benign runs** ({runs}; "
        f"{figures.redrawn} draws near a tie were drawn again)."
    ]
    lines += [f"- alarm: {alarm}" for alarm in figures.alarms[:20]]
    noise = sorted(figures.worst.items(), key=lambda item: -item[1].error_u)
    lines.append(_table(
        ("family", "largest benign error", "tensor"),
        [(name, f"{n.error_u:.1f} u", n.tensor) for name, n in noise],
    ))  # fmt: skip
    if figures.logit_error_u > 0.0:
        lines.append(
            "Largest error of the gap between the last chosen and the first refused router logit: "
            f"{figures.logit_error_u:.1f} u (the routing guard takes {LOGIT_ERROR_U:g} u and asks "
            f"for a gap of {GUARD:g} times that)."
        )
    lines.append(_table(
        ("scale error of", "smallest seen with every seed, both signs"),
        [(family, f"{size:.2e}") for family, size in sorted(figures.scale.items())],
    ))  # fmt: skip
    lines.append(_table(
        ("family", "one lost row of at most", "tried", "seen"),
        [(family, *counts) for family, counts in sorted(figures.rows.items())],
    ))  # fmt: skip
    tokens = figures.tokens
    lines.append(
        f"One token of 96 without a gradient in one MoE layer: {tokens.seen} of {tokens.tried} "
        f"seen, the faintest at {tokens.faintest:.2e} times the threshold."
    )
    return lines


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def holds(found: Iterable[Figures]) -> bool:
    """Tell whether no benign run alarmed and every planted loss was seen."""
    return all(
        not f.alarms
        and f.tokens.seen == f.tokens.tried
        and all(seen == tried for _, tried, seen in f.rows.values())
        and all(map(math.isfinite, f.scale.values()))
        for f in found
    )
