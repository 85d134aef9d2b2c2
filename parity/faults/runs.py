"""Plant every fault, judge the cases in which it must show, and write down who saw it.

Owns the choice of cases, the entries of faults.json and the kill matrix. Must not know points or
transformations. Easy to get wrong: `killed` means that *every* case a fault must show in failed
(an Adam case may hide a factor), and an errored case kills nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from parity import crew, explain, gang, threads, warm
from parity.case import Case
from parity.errors import ParityError
from parity.faults.catalogue import BY_ID, OWN, Fault
from parity.faults.detectors import DETECTORS, LEGEND, Seen
from parity.judge import Judge, Later, Running
from parity.report import tables
from parity.session import DEFAULT_IMPLEMENTATION, MAX_LIVE_RANKS
from parity.store import Row

SHAPES = 2
"""Shapes a fault is shown on: together they tell most factors apart."""
HIDES = ("adam", "adamw", "lion")
"""Optimizers under which a fault may hide."""


class Ranks:
    """Threads of this process for exact cases, gangs of processes for the others."""

    def __init__(self) -> None:
        self._gangs: gang.GangPool | None = None

    def start(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,
        backend: str | None = None,
    ) -> Running:
        """Start the task in every rank of a world, as `parity.judge.Pool` says."""
        if task == "parity.threads:run":  # no start-up, and no process to lose
            return Later(lambda: [threads.run(None, order) for order in payloads])
        if self._gangs is None:
            preload = warm.preload(DEFAULT_IMPLEMENTATION, {"deepspeed"})
            self._gangs = gang.GangPool(preload, max_live_ranks=MAX_LIVE_RANKS)
        return self._gangs.start(world, task, payloads, deadline_s, backend or "gloo")

    def close(self) -> None:
        """End every process."""
        if self._gangs is not None:
            self._gangs.close()


@contextlib.contextmanager
def open_judge(_: str = "") -> Iterator[Judge]:
    """Give a judge of the implementation that faults are planted in; end its ranks after."""
    import torch

    torch.set_num_threads(1)  # its tensors are small, and other judges want the other cores
    ranks = Ranks()
    try:
        yield Judge(implementation=DEFAULT_IMPLEMENTATION, pool=ranks)
    finally:
        ranks.close()


@dataclass(frozen=True)
class Killers:
    """Which rows failed."""

    quantities: tuple[str, ...]
    families: tuple[str, ...]
    optimizers: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One line of faults.json.

    `variants` holds the fault itself and its other amounts where it has any; the entry's own
    figures are theirs together: killed and diagnosed if all are, the largest set of causes.
    """

    id: str
    killed: bool
    killed_by: Killers
    causes: tuple[str, ...]
    true_cause: str
    diagnosed: bool
    set_size: int
    seconds: float
    detectors: dict[str, bool]
    cases: tuple[str, ...]
    survived: tuple[str, ...] = ()
    """Cases that should have shown it and did not."""
    errored: tuple[str, ...] = ()
    """Cases that ended in an error, and which: of them nothing is known."""
    variants: tuple[Entry, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Give the entry as plain values."""
        unless_empty = ("variants", "survived", "errored")
        return {k: v for k, v in asdict(self).items() if v or k not in unless_empty}


def choose(fault: Fault, cases: Iterable[Case]) -> list[Case]:
    """Choose the smallest set that shows a fault: SHAPES shapes and, on the first, Adam.

    The order of the suite decides: its first shapes tell most causes apart. A fault that is `real`
    is also shown once on ranks that are processes, and every one that can be on DeepSpeed's engine.
    """
    cases = list(cases)
    able = [c for c in cases if fault.can_show(c) and c.engine.backend == "threads"]
    plain = [case for case in able if case.optimizer.name not in HIDES]
    chosen: dict[Any, Case] = {}
    for case in plain or able:
        chosen.setdefault((case.shape, case.engine.gas), case)
    kept = list(chosen.values())[:SHAPES]
    kept += [c for c in able if plain and kept and _same_but_optimizer(c, kept[0])][:1]
    processes = [c for c in cases if fault.can_show(c) and c.engine.backend != "threads"]
    if fault.real or not kept:
        kept += [case for case in processes if case.engine.name == "native"][:1]
    return kept + [case for case in processes if case.engine.name == "deepspeed"][:1]


def _same_but_optimizer(one: Case, other: Case) -> bool:
    ignored = {"id", "optimizer"}
    differs = one.optimizer.name != other.optimizer.name
    return differs and one.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def run_faults(
    faults: Sequence[Fault],
    cases: Sequence[Case],
    *,
    jobs: int = 1,
    done: Callable[[Entry], None] = lambda _: None,
) -> list[Entry]:
    """Judge every fault on its cases.

    Args:
        faults: what to plant, of the catalogue, one after the other in each process.
        cases: what to choose from, see `choose`.
        jobs: number of processes.
        done: told every entry when it is ready.

    Returns:
        one entry a fault, in their order.
    """
    entries = {}
    work = functools.partial(run_fault, cases)
    for entry in crew.spread([fault.id for fault in faults], jobs, open_judge, work, _lost):
        entries[entry.id] = entry
        done(entry)
    return [entries[fault.id] for fault in faults]


def run_fault(cases: Sequence[Case], judge: Judge, fault: str) -> Entry:
    """Judge one fault, and its variants; the judge's clean runs are used again."""
    return _merged([_run(variant, cases, judge) for variant in BY_ID[fault].all_variants()])


def _lost(fault: str, how: str) -> Entry:
    nothing = Killers((), (), ())
    return Entry(
        fault, killed=False, killed_by=nothing, causes=(), true_cause=BY_ID[fault].true_cause,
        diagnosed=False, set_size=0, seconds=0.0, detectors=dict.fromkeys(DETECTORS, False),
        cases=(), errored=(f"its judge died: {how}",),
    )  # fmt: skip


def _run(fault: Fault, cases: Sequence[Case], judge: Judge) -> Entry:
    start = time.perf_counter()
    chosen = choose(fault, cases)
    seen: list[Seen] = []
    errored: list[str] = []
    for case in chosen:
        try:
            seen.append(observe(fault, case, judge))
        except Exception as error:  # whatever a fault breaks, the others are still run
            errored.append(f"{case.id}: {type(error).__name__}: {error}")
    causes = diagnose(seen)
    survived = [
        s.made_of.case.id for s in seen
        if not DETECTORS["ours"](s) and (s.optimizer not in HIDES or s is seen[0])
    ]  # fmt: skip
    return Entry(
        id=fault.id,
        killed=bool(seen) and not survived and not errored,
        killed_by=_killers(seen),
        causes=causes,
        true_cause=fault.true_cause,
        diagnosed=fault.true_cause in causes,
        set_size=len(causes),
        seconds=round(time.perf_counter() - start, 3),
        detectors={name: any(map(sees, seen)) for name, sees in DETECTORS.items()},
        cases=tuple(case.id for case in chosen),
        survived=tuple(survived),
        errored=tuple(errored),
    )


def observe(fault: Fault, case: Case, judge: Judge) -> Seen:
    """Judge one case with a fault planted in the folded run."""
    planted = judge.with_planted(fault.planted(case))
    rows = planted.rows(case)
    if planted.last is None:
        raise ParityError(f"case {case.id}: {rows[0].reason}")
    return Seen(planted.last, rows)


def diagnose(seen: Iterable[Seen]) -> tuple[str, ...]:
    """Intersect the causes over several shapes, from rows and what their cases switch on."""
    seen = list(seen)
    cases = {one.made_of.case.id: one.made_of.case for one in seen}
    return tuple(cause.id for cause in explain.intersect([one.rows for one in seen], cases))


def _killers(seen: Iterable[Seen]) -> Killers:
    rows = [(one.optimizer, row) for one in seen for row in one.rows if _failed(row)]

    def found(values: Iterable[str | None]) -> tuple[str, ...]:
        return tuple(sorted({value for value in values if value}))

    return Killers(
        found(row.quantity for _, row in rows),
        found(row.family for _, row in rows),
        found(optimizer for optimizer, _ in rows),
    )


def _failed(row: Row) -> bool:
    return row.verdict in ("fail", "leak")


def _merged(each: Sequence[Entry]) -> Entry:
    """Make one entry of a fault and its variants."""
    first = each[0]
    if len(each) == 1:
        return first

    def union(values: Iterable[Sequence[str]]) -> tuple[str, ...]:
        return tuple(sorted({value for some in values for value in some}))

    return Entry(
        id=first.id,
        killed=all(e.killed for e in each),
        killed_by=Killers(
            union(e.killed_by.quantities for e in each),
            union(e.killed_by.families for e in each),
            union(e.killed_by.optimizers for e in each),
        ),
        causes=first.causes,
        true_cause=first.true_cause,
        diagnosed=all(e.diagnosed for e in each),
        set_size=max(e.set_size for e in each),
        seconds=round(sum(e.seconds for e in each), 3),
        detectors=first.detectors,
        cases=union(e.cases for e in each),
        survived=union(e.survived for e in each),
        errored=union(e.errored for e in each),
        variants=tuple(each),
    )


# ---------------------------------------------------------------- what is written


def headline(entries: Sequence[Entry]) -> str:
    """Sum the entries up in one line."""
    killed, told = sum(e.killed for e in entries), sum(e.diagnosed for e in entries)
    mean = statistics.fmean(e.set_size for e in entries) if entries else 0.0
    return (
        f"{killed} of {len(entries)} faults killed, {told} diagnosed, "
        f"mean set of causes {mean:.2f}, {sum(e.seconds for e in entries):.0f} s"
    )


def lines(entries: Iterable[Entry]) -> Iterator[Entry]:
    """List entries with variants in the place of the faults that have any."""
    for entry in entries:
        yield from entry.variants or (entry,)


def write(entries: Sequence[Entry], faults: Sequence[Fault], folder: Path) -> None:
    """Write faults.json and faults.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([entry.to_dict() for entry in entries], indent=2, allow_nan=False)
    (folder / "faults.json").write_text(text + "\n", encoding="utf-8")
    (folder / "faults.md").write_text(markdown(entries, faults), encoding="utf-8")


def markdown(entries: Sequence[Entry], faults: Sequence[Fault]) -> str:
    """Lay the kill matrix out: faults down, practices across."""
    parts = ["# Kill matrix", "", headline(entries), ""]
    parts += [f"- **{name}**: {said}." for name, said in LEGEND.items()]
    parts += ["", "x: sees the fault; empty: passes it.", "", *_matrix(entries), ""]
    missed = {n: sum(not e.detectors[n] for e in lines(entries)) for n in DETECTORS}
    total = sum(1 for _ in lines(entries))
    parts += [f"Passed of {total}: " + ", ".join(f"{n} {m}" for n, m in missed.items()) + ".", ""]
    parts += ["# Faults", "", *_catalogue(faults), "", "# Invisible by algebra", ""]
    parts += [*equivalences(faults), ""]
    return "\n".join(parts)


def _matrix(entries: Sequence[Entry]) -> Iterator[str]:
    names = list(DETECTORS)
    yield "| fault | " + " | ".join(names) + " | causes | true cause |"
    yield "|---" * (len(names) + 3) + "|"
    for entry in lines(entries):
        marks = ["x" if entry.detectors[name] else "" for name in names]
        told = "" if entry.diagnosed else " (not in the set)"
        causes = ", ".join(entry.causes) or "none"
        yield f"| {entry.id} | {' | '.join(marks)} | {causes} | {entry.true_cause}{told} |"


def _catalogue(faults: Sequence[Fault]) -> Iterator[str]:
    yield "| fault | point | signature | needs | imitates |"
    yield "|---|---|---|---|---|"
    for fault in faults:
        own = " (own finding)" if fault.id in OWN else ""
        cells = [fault.id, fault.point, fault.signature, f"`{fault.needs}`", fault.imitates + own]
        yield "| " + " | ".join(cells) + " |"


def equivalences(faults: Iterable[Fault]) -> Iterator[str]:
    """Give the table of where algebra says that a fault changes nothing."""
    bits = {"True": "everywhere there", "False": "no: another order of rounding"}
    yield "| fault | invisible where | because | equal to the bit |"
    yield "|---|---|---|---|"
    for fault in faults:
        for blind in fault.cannot:
            exact = bits.get(blind.exact, f"where `{blind.exact}`")
            yield f"| {fault.id} | `{blind.when}` | {blind.algebra} | {exact} |"


def listing(faults: Sequence[Fault]) -> str:
    """Lay the catalogue out for a terminal."""
    headers = ["fault", "point", "needs", "true cause", "variants"]
    rows = [
        {
            "fault": f.id, "point": f.point, "needs": f.needs, "true cause": f.true_cause,
            "variants": ", ".join(v.id for v in f.variants),
        }
        for f in faults
    ]  # fmt: skip
    return tables.grid(rows, dict(zip(headers, headers, strict=True)))


def described(fault: Fault) -> dict[str, Any]:
    """Give a fault as plain values."""
    plain = asdict(replace(fault, options={}, variants=(), cannot=()))
    for key in ("options", "variants", "cannot", "real"):
        del plain[key]
    blind = [{"when": b.when, "algebra": b.algebra} for b in fault.cannot]
    return {
        **plain, "own": fault.id in OWN, "cannot": blind, "variants": [v.id for v in fault.variants]
    }  # fmt: skip
