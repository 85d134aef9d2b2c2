"""A gradient as a sum of tokens: which token's loss is lost, doubled or scaled in it.

Owns the regression over single tokens, which costs one backward per token and so is done on request
(`parity explain --tokens`). Must not know causes. Easy to get wrong: columns of tokens are as many
as the batch is long, and a tensor with fewer numbers than twice that fits anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from parity import batches, contributions, models, reference
from parity.case import Case
from parity.compare import UNIT_ROUNDOFF
from parity.errors import UsageError
from parity.evidence import observe
from parity.reference import DTYPE
from parity.store import Row

MAX_TOKENS = 2048
"""Most tokens of a step: each costs a forward and a backward of one sequence."""
_IGNORED = -100
"""Label that torch's cross entropy leaves out."""
_EXACT = 1e-6
"""Distance from 1 from which on a coefficient is said."""


class Token(NamedTuple):
    """Place of one token in a step: dp rank, micro-batch, sequence, position."""

    rank: int
    micro_batch: int
    sequence: int
    position: int


@dataclasses.dataclass(frozen=True)
class TokenFit:
    """One tensor's gradient as sum of coefficient times the gradients of the tokens' losses.

    odd: token -> coefficient, where that is not 1; None: no such sum gives the tensor, or it has
    too few numbers to tell. auxiliary: coefficient of the auxiliary losses, None without any.
    """

    tensor: str
    step: int
    of: int
    odd: Mapping[Token, float] | None
    auxiliary: float | None = None


class Judging(Protocol):
    """The part of `parity.judge.Judge` that is used here."""

    last: Any


def fits(judge: Judging, case: Case, rows: Sequence[Row]) -> list[TokenFit]:
    """Regress one failing tensor of each family, at the first step that fails, on single tokens.

    Args:
        judge: what has just judged the case.
        case: the case.
        rows: its rows.

    Raises:
        UsageError: the case has another model than the small one, or too many tokens.
    """
    if case.model.name != "tiny":
        raise UsageError(f"--tokens needs the tiny model, {case.id} runs {case.model.name}")
    folded = [r for o in observe(rows, case) if o.folded for r in o.failing]
    bad = [r for r in folded if r.quantity == "gradient" and r.against == "reference"]
    if not bad:
        return []
    number = min(row.step or 1 for row in bad)
    draws = max(int((row.detail or {}).get("draws", 1)) for row in rows)
    about = _Step(case, judge.last, number, case.seed + 1000 * (draws - 1))
    actual = judge.last.folded.steps[number - 1].gradients.filled
    bad = [row for row in bad if row.step == number and str(row.tensor) in actual]
    chosen = contributions.representatives(bad, judge.last.truths[number - 1].gradients)
    names = [str(row.tensor) for row in chosen]
    columns, auxiliary = about.columns(names), about.auxiliary(names)
    return [_fit(name, number, actual[name], columns, auxiliary.get(name)) for name in names]


def _fit(
    name: str, step: int, actual: Tensor, columns: Mapping[Token, Mapping[str, Tensor]],
    auxiliary: Tensor | None,
) -> TokenFit:  # fmt: skip
    parts = [of_token[name] for of_token in columns.values()]
    further = [] if auxiliary is None else [auxiliary]
    found = contributions.solve(actual.double(), parts + further, UNIT_ROUNDOFF[actual.dtype])
    if found is None:
        return TokenFit(name, step, len(parts), None)
    odd = {t: c for t, c in zip(columns, found, strict=False) if abs(c - 1.0) > _EXACT}
    return TokenFit(name, step, len(parts), odd, found[-1] if further else None)


def lines(found: Sequence[TokenFit]) -> list[str]:
    """Say it: one line a tensor and one for each token that does not count once."""
    said = []
    for fit in found:
        if fit.odd is None:
            said.append(f"{fit.tensor}: no weighted sum of the {fit.of} tokens fits it alone")
            continue
        beside = "" if fit.auxiliary is None else f", auxiliary losses x{fit.auxiliary:.6f}"
        said.append(f"{fit.tensor}: {len(fit.odd)} of {fit.of} tokens do not count once{beside}")
        said += [
            f"  dp rank {t.rank}, micro-batch {t.micro_batch}, sequence {t.sequence}, "
            f"position {t.position}: x{coefficient:.6f}"
            for t, coefficient in fit.odd.items()
        ]
    return said or ["no failing gradient of the small model to split over tokens"]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a run, evaluated token by token at the run's own weights and routing."""

    case: Case
    last: Any
    number: int
    seed: int

    def columns(self, names: Sequence[str]) -> dict[Token, dict[str, Tensor]]:
        """Differentiate every token's part of the objective: one forward and backward each."""
        model, drawn, leaves = models.build_for(self.case, self.seed), self._drawn(), self._leaves()
        count = sum(batch.labels.numel() for rank in drawn for batch in rank)
        if count > MAX_TOKENS:
            raise UsageError(f"--tokens takes at most {MAX_TOKENS} tokens, the step has {count}")
        routing = self.last.truths[self.number - 1].routing
        wanted = [leaves[name] for name in names]
        found: dict[Token, dict[str, Tensor]] = {}
        for r, rank in enumerate(drawn):
            for m, batch in enumerate(rank):
                models.force_routing(models.gates(model), routing[r][m])
                for (b, s), alone in _tokens(batch):
                    loss = functional_call(model, leaves, (), dict(alone.for_mean(DTYPE)))
                    parts = torch.autograd.grad(
                        loss / (len(drawn) * len(rank)), wanted, materialize_grads=True
                    )
                    found[Token(r, m, b, s)] = dict(zip(names, parts, strict=True))
        return found

    def auxiliary(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Give the auxiliary losses' part of the gradients; empty without such losses."""
        routing = self.last.truths[self.number - 1].routing
        model = models.build_for(self.case, self.seed)
        split = reference.shares(self.case, model, self._leaves(), self._drawn(), names, routing)
        found = {name: split.of_losses(name, self.case.auxiliary.scope) for name in names}
        return {name: torch.stack([*t.values()]).sum(0) for name, t in found.items() if t}

    def _drawn(self) -> batches.StepBatches:
        return batches.make(self.case, self.case.layout.dp, self.number, self.seed)

    def _leaves(self) -> dict[str, Tensor]:
        held = self.last.folded.steps[self.number - 1].before.filled
        return {n: t.detach().to(DTYPE).requires_grad_() for n, t in held.items()}


def _tokens(batch: batches.MicroBatch) -> Iterator[tuple[tuple[int, int], batches.MicroBatch]]:
    """Give the micro-batch once per token, with the loss and the probe of that token alone."""
    for b, s in torch.cartesian_prod(*map(torch.arange, batch.labels.shape)).tolist():
        labels = torch.full_like(batch.labels, _IGNORED)
        labels[b, s] = batch.labels[b, s]
        probes = batch.probes
        if probes is not None:
            probes = torch.zeros_like(probes)
            probes[:, :, b, s] = batch.probes[:, :, b, s]  # type: ignore[index]
        yield (b, s), dataclasses.replace(batch, labels=labels, probes=probes)
