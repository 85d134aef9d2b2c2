"""The tensors at the borders inside a MoE layer, against the reference's same tensors.

Owns the borders (dispatch in, expert out, restored out, output gradient, input gradient), the
recording of them inside ranks, and the search for the first that differs. Must not know causes.
Easy to get wrong: rows travel in any order, so those of all ranks together are matched with the
tokens they must be; and a gradient inside a rank is dp times its part of the objective's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from parity import batches, hypotheses, models
from parity.case import Case
from parity.compare import UNIT_ROUNDOFF
from parity.errors import UsageError
from parity.layout import Layout
from parity.trial import Planted

_ROUNDOFFS = 4096
"""Unit round-offs, of the largest token, up to which a row is the reference's row."""


@dataclass(frozen=True)
class Border:
    """One place inside the layer.

    Attributes:
        name: as it is printed.
        point: named point of the implementation.
        kind: value, gradient (of the value there) or through (gradient behind a function there).
    """

    name: str
    point: str
    kind: str = "value"


FORWARD = (
    Border("dispatch in", "dispatch.rows"),
    Border("expert out", "expert.partial"),
    Border("restored out", "moe.restored"),
)
BACKWARD = (
    Border("output gradient", "moe.restored", "gradient"),
    Border("input gradient", "moe.input", "through"),
)


@dataclass(frozen=True)
class Finding:
    """How one border of one layer and micro-batch compares; rank None where all ranks are right."""

    border: str
    layer: int
    micro_batch: int
    error: float
    rank: int | None
    said: str

    @property
    def differs(self) -> bool:
        """Tell whether it differs by more than round-off."""
        return self.rank is not None


class Recorder:
    """Writes what passes a point into a folder, one file per rank, layer and passage."""

    def __init__(self, folder: str, kind: str, file: str) -> None:
        self._folder, self._kind, self._file = Path(folder), kind, file
        self._counts: dict[int, int] = {}

    def __call__(self, value: Any, **context: Any) -> Any:
        """Record a value, or the gradient it will get; pass it on as it is."""
        layer = int(context["layer"])
        rank = dist.get_rank() if dist.is_initialized() else 0

        def write(tensor: Tensor) -> None:
            count = self._counts[layer] = self._counts.get(layer, -1) + 1
            path = self._folder / f"{self._file}.{layer}.{count}.{rank}.pt"
            torch.save(tensor.detach().double().cpu().clone(), path)

        if self._kind == "value":
            write(value)
            return value
        if self._kind == "gradient":
            value.register_hook(write)
            return value

        def watched(x: Tensor, *others: Any) -> Tensor:
            seen = x.view_as(x)
            if seen.requires_grad:
                seen.register_hook(write)
            out: Tensor = value(seen, *others)
            return out

        return watched


class Judging(Protocol):
    """The part of `parity.judge.Judge` that is used here."""

    planted: tuple[Planted, ...]
    last: Any

    @property
    def absent(self) -> tuple[str, ...]:
        """Give the optional members the implementation did not offer."""

    def with_planted(self, *planted: Planted) -> Judging:
        """Give a judge with other faults."""

    def rows(self, case: Case) -> list[Any]:
        """Run and compare one case."""


def findings(judge: Judging, case: Case) -> list[Finding]:
    """Run a case once more with taps and compare every border of its first step.

    Returns:
        In the order of computation: forward by layer, then backward from the last layer.

    Raises:
        UsageError: the model or the implementation offers no such points.
    """
    if case.model.name != "tiny":
        raise UsageError(f"--taps needs the tiny model, {case.id} runs {case.model.name}")
    if "fault_points" in judge.absent:
        raise UsageError(
            "--taps needs an implementation with fault_points and plant; it offers none"
        )
    with tempfile.TemporaryDirectory(prefix="parity-taps-") as folder:
        borders = list(enumerate((*FORWARD, *BACKWARD)))
        planted = [
            Planted(b.point, "parity.taps:Recorder",
                    {"folder": folder, "kind": b.kind, "file": str(i)})
            for i, b in borders
        ]  # fmt: skip
        tapped = judge.with_planted(*judge.planted, *planted)
        rows = tapped.rows(case)
        draws = max((int((r.detail or {}).get("draws", 1)) for r in rows), default=1)
        records = _read(Path(folder), len(borders))
    if not any(records):
        raise UsageError("--taps needs an implementation with named points inside its MoE layer")
    return _compared(case, tapped.last, case.seed + 1000 * (draws - 1), records)


Records = dict[tuple[int, int], dict[int, Tensor]]
"""(layer, passage) -> rank -> tensor."""


def _read(folder: Path, count: int) -> list[Records]:
    records: list[Records] = [{} for _ in range(count)]
    for path in sorted(folder.glob("*.pt")):
        border, layer, passage, rank = map(int, path.stem.split("."))
        of = records[border].setdefault((layer, passage), {})
        of[rank] = torch.load(path, weights_only=True)
    return records


def _compared(case: Case, last: Any, seed: int, records: Sequence[Records]) -> list[Finding]:
    layout, gas = case.layout, case.engine.gas
    model = models.build_for(case, seed)
    weights = {n: t.double() for n, t in last.folded.steps[0].before.filled.items()}
    drawn = batches.make(case, layout.dp, 1, seed)
    truth = [[_watched(model, weights, batch, layout.dp * gas) for batch in rank] for rank in drawn]
    unit = UNIT_ROUNDOFF[getattr(torch, case.engine.dtype)]
    layers = range(case.model.layers)
    found = []
    for m in range(gas):
        of_rank = [truth[r][m] for r in range(layout.dp)]
        places = [(i, layer) for layer in layers for i in range(len(FORWARD))]
        back = range(len(FORWARD), len(FORWARD) + len(BACKWARD))
        places += [(i, layer) for layer in reversed(layers) for i in back]
        for index, layer in places:
            got = records[index].get((layer, m), {})
            if got:
                compare = _COMPARE[(*FORWARD, *BACKWARD)[index].name]
                rank, error, said = compare(got, of_rank, layer, layout, _ROUNDOFFS * unit)
                name = (*FORWARD, *BACKWARD)[index].name
                found.append(Finding(name, layer, m, error, rank, said))
    return found


def _watched(
    model: nn.Module, weights: Mapping[str, Tensor], batch: batches.MicroBatch, parts: int
) -> dict[tuple[int, str], Tensor]:
    """Run the reference on one micro-batch: (layer, what) -> tensor, gradients of its loss."""
    seen: dict[tuple[int, str], Tensor] = {}
    kept: list[tuple[int, str]] = []

    def watch(layer: int, what: str, tensor: Tensor) -> None:
        seen[layer, what] = tensor
        kept.append((layer, what))

    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    with hypotheses.altered(model, watch=watch):
        loss = functional_call(model, leaves, (), dict(batch.for_mean(torch.float64)))
    wanted = [key for key in kept if key[1] in ("tokens", "output")]
    gradients = torch.autograd.grad(loss / parts, [seen[key] for key in wanted])
    found = {key: tensor.detach() for key, tensor in seen.items()}
    return found | {
        (layer, f"{what}'"): g for (layer, what), g in zip(wanted, gradients, strict=True)
    }


Truths = Sequence[Mapping[tuple[int, str], Tensor]]
Verdict = tuple[int | None, float, str]
"""First rank that differs, largest relative error, what there is to say."""


def _rows(what: str) -> Callable[..., Verdict]:
    """Match rows in any order with those that must be there, each `times` over."""

    def compare(
        got: Mapping[int, Tensor], truths: Truths, layer: int, layout: Layout, limit: float
    ) -> Verdict:
        expected = torch.cat([truth[layer, what].flatten(0, -2) for truth in truths])
        owners = torch.tensor([
            r for r, truth in enumerate(truths) for _ in range(truth[layer, what][..., 0].numel())
        ])  # fmt: skip
        times = truths[0][layer, "rows"].shape[1] if what == "tokens" else 1
        size = float(expected.norm(dim=1).max())
        counts = torch.zeros(len(expected), dtype=torch.int64)
        strange: dict[int, int] = {}
        for rank, rows in sorted(got.items()):
            if not len(rows):
                continue
            distance = torch.cdist(rows, expected)
            near, index = distance.min(dim=1)
            counts += torch.bincount(index[near <= limit * size], minlength=len(expected))
            if odd := int((near > limit * size).sum()):
                strange[rank] = odd
        missing = (counts < times).nonzero().flatten()
        extra = int((counts > times).sum())
        if not strange and not len(missing) and not extra:
            return None, 0.0, "every row is there"
        said = [f"{len(missing)} of {len(expected)} rows are missing"] if len(missing) else []
        said += [f"{extra} come too often"] if extra else []
        said += [f"rank {rank} has {odd} rows of no token" for rank, odd in strange.items()]
        rank = min(strange, default=int(owners[missing[0]]) * layout.tp if len(missing) else 0)
        return rank, len(missing) / len(expected), "; ".join(said)

    return compare


def _whole(what: str) -> Callable[..., Verdict]:
    """Compare (T, H) of every lane with the reference's; gradients are dp times its part."""

    def compare(
        got: Mapping[int, Tensor], truths: Truths, layer: int, layout: Layout, limit: float
    ) -> Verdict:
        worst: tuple[float, int, Tensor] | None = None
        for rank, tensor in _by_lane(got, what, layout):
            expected = truths[layout.coordinate(rank).dp][layer, what]
            expected = expected * (layout.dp if what.endswith("'") else 1)
            if tensor.shape != expected.shape:
                said = f"rank {rank} has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}"
                return rank, 1.0, said
            off = (tensor - expected).norm(dim=1) / expected.norm(dim=1).max()
            if worst is None or float(off.max()) > worst[0]:
                worst = float(off.max()), rank, off
        assert worst is not None
        error, rank, off = worst
        if error <= limit:
            return None, error, "equal on every lane"
        said = f"{int((off > limit).sum())} of {len(off)} tokens differ, most token "
        return rank, error, said + str(int(off.argmax()))

    return compare


def _by_lane(got: Mapping[int, Tensor], what: str, layout: Layout) -> list[tuple[int, Tensor]]:
    """Give every rank's tensor; of output gradients, which may differ by lane, the lanes' mean."""
    if what != "output'":
        return sorted(got.items())
    by_dp: dict[int, list[Tensor]] = {}
    for rank, tensor in sorted(got.items()):
        by_dp.setdefault(layout.coordinate(rank).dp, []).append(tensor)
    return [(dp * layout.tp, torch.stack(lanes).mean(0)) for dp, lanes in by_dp.items()]


_COMPARE: Mapping[str, Callable[..., Verdict]] = {
    "dispatch in": _rows("tokens"),
    "expert out": _rows("rows"),
    "restored out": _whole("output"),
    "output gradient": _whole("output'"),
    "input gradient": _whole("tokens'"),
}


def first(found: Sequence[Finding]) -> Finding | None:
    """Give the first border that differs."""
    return next((finding for finding in found if finding.differs), None)


def lines(found: Sequence[Finding], layout: Layout) -> list[str]:
    """Write the borders of the micro-batch in which one differs first, and name that one."""
    wrong = first(found)
    shown = [f for f in found if f.micro_batch == (wrong.micro_batch if wrong else 0)]
    said = [
        f"  {'DIFFERS' if f.differs else 'equal':8} layer {f.layer}  {f.border:16} "
        f"{f.error:.1e}  {f.said}"
        for f in shown
    ]
    if wrong is None or wrong.rank is None:
        return [*said, "no border differs: what is wrong, if anything, comes after the backward"]
    at = layout.coordinate(wrong.rank)
    where = f"rank {wrong.rank} (lane {at.tp}, dp rank {at.dp})"
    said.append(
        f"first to differ: {wrong.border} of layer {wrong.layer}, {where}, "
        f"micro-batch {wrong.micro_batch}: {wrong.said}"
    )
    return said
