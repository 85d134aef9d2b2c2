"""Reports of all ranks -> one root cause: the echo, the laggard and the dead told apart.

Owns what a rank reports when it raises, dies or is asked where it stands, and the pure rules that
name one rank and one line. Must not know processes or torch. Easy to get wrong: the rank that
waits in a collective is the victim; the cause is the member that has *not* entered it.
"""

from __future__ import annotations

import json
import re
import signal
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from parity.errors import InfrastructureError, ParityError

DEATH_NOTICE_S = 0.25
"""Peers may report the broken connection of a killed rank before the kernel has reaped it."""
HASH_LENGTH = 40
"""Groups that only their members know of are named by a hash of this length."""
_LIBRARY = re.compile(
    r"/(site|dist)-packages/(torch|numpy)/|/deepspeed/comm/|/parity/rank\.py$|^<frozen "
)
_THREADS = "/parity/threads.py"
_COLLECTIVE_FILE = re.compile(r"/torch/distributed/distributed_c10d\.py$")
_ECHO_TYPE = re.compile(
    r"^(RuntimeError|Dist(Backend|Network|Store|Queue\w*)?Error|Connection\w*Error|BrokenPipeError)$"
)
_ECHO_TEXT = re.compile(
    r"connection (was )?(reset|closed|aborted)( by (peer|remote))?|broken pipe"
    r"|connection refused|connectfullmesh failed|timed out waiting|wait timeout|socket timeout"
    r"|timed out after \d+ms|timeout caused pair closure|remote process exited"
    r"|communicator was aborted",
    re.IGNORECASE,
)


class Frame(NamedTuple):
    """One line of a stack."""

    file: str
    line: int
    function: str

    @property
    def where(self) -> str:
        """Give `file:line`."""
        return f"{self.file}:{self.line}"


Stack = tuple[Frame, ...]


@dataclass(frozen=True)
class Collective:
    """One collective call as the flight recorder numbers it; None where it saw nothing."""

    op: str
    group: str | None = None
    ranks: tuple[int, ...] = ()
    seq: int | None = None
    sizes: str = ""

    def __str__(self) -> str:
        """Name operation, sequence number and group in words."""
        number = "" if self.seq is None else f" #{self.seq}"
        if self.group is None:
            return f"{self.op}{number}"
        name = self.group if len(self.group) < HASH_LENGTH else self.group[:8]
        return f"{self.op}{number} of group {name!r} (ranks {_ranks(self.ranks)})"


@dataclass(frozen=True)
class Raised:
    """An exception of one rank; `chain` holds (type name, text), the exception itself first."""

    rank: int
    time_s: float
    chain: tuple[tuple[str, str], ...]
    traceback: str
    frames: tuple[Frame, ...] = ()
    refusal: bool = False

    @property
    def echo(self) -> bool:
        """Tell whether it only says that another rank is gone."""
        return any(_ECHO_TYPE.match(t) and _ECHO_TEXT.search(x) for t, x in self.chain)

    @property
    def text(self) -> str:
        """Give `Type: message`."""
        name, words = self.chain[0]
        return f"{name}: {words}" if words else name


@dataclass(frozen=True)
class Died:
    """A rank that ended without a word: `exit_status` is negative for a signal, None if unknown."""

    rank: int
    time_s: float
    exit_status: int | None
    log: str = ""

    @property
    def text(self) -> str:
        """Say how it ended."""
        if self.exit_status is None:
            return "died (exit status unknown)"
        if self.exit_status >= 0:
            return f"exited with status {self.exit_status}"
        try:
            name = signal.Signals(-self.exit_status).name
        except ValueError:
            name = f"signal {-self.exit_status}"
        hint = " (out-of-memory killer, or killed from outside)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"


@dataclass(frozen=True)
class State:
    """Where one rank stands: stacks (main thread first, innermost frame last) and its record.

    `entered` maps (group, seq) to what this rank called there; None: the rank gave no record.
    """

    rank: int
    busy: bool = True
    stacks: tuple[tuple[Frame, ...], ...] = ()
    pending: tuple[Collective, ...] = ()
    entered: Mapping[tuple[str, int], Collective] | None = field(default_factory=dict)
    note: str = ""

    @property
    def waits_in(self) -> Collective | None:
        """Give the oldest collective it has not left, by record, else by its stack."""
        if self.pending:
            return self.pending[0]
        return self.called if self.busy else None

    @property
    def called(self) -> Collective | None:
        """Give the collective whose Python frame is on a stack, if any."""
        for stack in self.stacks:
            for frame in stack:
                if _COLLECTIVE_FILE.search(frame.file) and frame.function != "wrapper":
                    return Collective(frame.function)
        return None

    @property
    def place(self) -> Frame | None:
        """Give the line of the caller's own code it stands at."""
        if not self.busy:
            return None
        for stack in sorted(self.stacks, key=lambda s: not _in_collective(s)):
            if _in_collective(stack) or stack is self.stacks[0]:
                return blame_frame(stack)
        return None

    @property
    def text(self) -> str:
        """Say where it stands."""
        if not self.busy:
            return "has already returned from the task"
        here = self.place
        words = f"stands at {here.where} in {here.function}" if here else "gave no stack"
        return f"{words} ({self.note})" if self.note else words


Report = Raised | Died


@dataclass(frozen=True)
class Finding:
    """The root cause of a failed run, in values and in one text."""

    kind: Literal["raised", "died", "hung"]
    rank: int
    summary: str
    traceback: str = ""
    location: str | None = None
    collective: Collective | None = None
    laggards: tuple[int, ...] = ()
    exit_status: int | None = None


class RankFailure(InfrastructureError):  # noqa: N818 - name fixed by the runner's contract
    """A rank raised, died or hung; names one rank, one line and what the others waited for."""

    def __init__(self, finding: Finding) -> None:
        """Take over the finding's values, so that a pickled failure keeps them."""
        super().__init__(finding)
        self.finding = finding
        self.kind, self.rank, self.summary = finding.kind, finding.rank, finding.summary
        self.traceback, self.location = finding.traceback, finding.location
        self.collective, self.laggards = finding.collective, finding.laggards
        self.exit_status = finding.exit_status

    def __str__(self) -> str:
        """Give the summary."""
        return self.summary


class Refused(ParityError):  # noqa: N818 - a verdict of the implementation, not an error of ours
    """Every rank refused the task alike; the text is the implementation's own."""


def _ranks(ranks: Sequence[int]) -> str:
    return " ".join(map(str, sorted(ranks)))


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_ranks(ranks)}"


def _is_library(file: str) -> bool:
    if _LIBRARY.search(file):
        return True
    outside = "/site-packages/" not in file and "/dist-packages/" not in file
    return outside and file.startswith(sysconfig.get_paths()["stdlib"] + "/")


def blame_frame(stack: Sequence[Frame]) -> Frame | None:
    """Pick the innermost frame that is not torch, the standard library or the rank's loop."""
    own = [frame for frame in stack if not _is_library(frame.file)]
    return own[-1] if own else (stack[-1] if stack else None)


def _in_collective(stack: Sequence[Frame]) -> bool:
    return any(_COLLECTIVE_FILE.search(frame.file) for frame in stack)


def format_stack(stack: Sequence[Frame]) -> str:
    """Print a stack as Python prints a traceback, source lines included."""
    listed = traceback.StackSummary.from_list([(f.file, f.line, f.function, None) for f in stack])
    return "".join(listed.format())


def parse_stacks(text: str) -> tuple[tuple[Frame, ...], ...]:
    """Read what faulthandler printed, the signalled (current) thread first.

    Args:
        text: one or more `Thread 0x... (most recent call first):` blocks.
    """
    blocks = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)
    heads = re.findall(r"^(Current thread|Thread) ", text, flags=re.MULTILINE)
    line = re.compile(r'^\s+File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
    stacks = [
        (head, tuple(Frame(f, int(n), who) for f, n, who in reversed(line.findall(block))))
        for head, block in zip(heads, blocks[1:], strict=True)
    ]
    return tuple(s for _, s in sorted(stacks, key=lambda pair: pair[0] != "Current thread") if s)


def parse_records(
    texts: Sequence[str], groups: Mapping[str, Sequence[int]]
) -> tuple[tuple[Collective, ...], dict[tuple[str, int], Collective]]:
    """Read flight records into what is pending and what was entered.

    Args:
        texts: JSON of torch's flight recorders; an entry that is not `retired` is still pending.
        groups: group name -> global ranks, as the rank itself knows them.
    """
    pending, entered = [], {}
    for entry in (e for text in texts for e in json.loads(text).get("entries", [])):
        call = _read_entry(entry, groups)
        if call.group is not None and call.seq is not None:
            entered[call.group, call.seq] = call
        if not entry.get("retired") and entry.get("state") != "completed":
            pending.append(call)
    return tuple(pending), entered


def _read_entry(entry: Mapping[str, Any], groups: Mapping[str, Sequence[int]]) -> Collective:
    group = str(entry["process_group"][0])
    return Collective(
        op=str(entry["profiling_name"]).split(":")[-1],  # "gloo:all_reduce"
        group=group,
        ranks=tuple(groups.get(group, ())),
        # Each pair counts its messages for itself, so a p2p number says nothing of other ranks.
        seq=None if entry.get("is_p2p") else int(entry["collective_seq_id"]),
        sizes=json.dumps(entry.get("input_sizes", [])),
    )


def all_refused(reports: Sequence[Report], world: int) -> bool:
    """Tell whether every rank of the world refused."""
    refusals = [r for r in reports if isinstance(r, Raised) and r.refusal]
    return len(refusals) == world


def _order(report: Report) -> tuple[int, float, int]:
    """Sort key: echoes last, a refusal that not all ranks share next to last, then time."""
    if isinstance(report, Died):
        return (0, report.time_s - DEATH_NOTICE_S, report.rank)
    return (2 if report.echo else int(report.refusal), report.time_s, report.rank)


def explain_stop(
    reports: Sequence[Report], states: Sequence[State] = (), world: int | None = None
) -> Finding:
    """Name the first exception or death in time order that is not an echo of another.

    Args:
        reports: what ranks raised and which died, in any order.
        states: where the ranks stood that had reported nothing.
        world: number of ranks, to say who did not refuse.
    """
    first = min(reports, key=_order)
    parts = [f"rank {first.rank} {_what(first)}"]
    frame = blame_frame(first.frames) if isinstance(first, Raised) else None
    if frame is not None:
        parts[0] += f" at {frame.where}"
    if isinstance(first, Raised) and first.refusal and world is not None:
        others = sorted(set(range(world)) - {r.rank for r in reports})
        parts.append(f"a refusal must be raised on every rank alike; {_named(others)} did not")
    waiting = {s.rank: s.waits_in for s in states if s.waits_in is not None}
    if waiting:
        parts.append(_waits(list(waiting), waiting))
    rest = [r for r in reports if r is not first]
    if rest:
        parts.append("folded away: " + ", ".join(f"rank {r.rank} {_brief(r)}" for r in rest))
    return Finding(
        kind="died" if isinstance(first, Died) else "raised",
        rank=first.rank,
        summary="; ".join(parts),
        traceback=first.log if isinstance(first, Died) else first.traceback,
        location=frame.where if frame else None,
        collective=next(iter(waiting.values()), None),
        exit_status=first.exit_status if isinstance(first, Died) else None,
    )


def _brief(report: Report) -> str:
    """Shorten to what fits beside others, without the source line gloo and NCCL begin with."""
    return re.sub(r"\[/[^\]]*\] ?", "", _what(report))[:90]


def _what(report: Report) -> str:
    if isinstance(report, Died):
        return report.text
    return f"{'refused' if report.refusal else 'raised'} {report.text}"


def missing_from(call: Collective, states: Mapping[int, State]) -> list[int]:
    """List the members of a pending collective that have not entered it.

    A member without a record cannot be shown to have entered, so it is missing. Without group or
    number every rank whose stack is in no collective is.
    """
    if call.group is None or call.seq is None:
        return [r for r, s in states.items() if s.waits_in is None]
    return [
        r for r in call.ranks if r in states and call.seq > _last(states[r].entered, call.group)
    ]


def _last(entered: Mapping[tuple[str, int], Collective] | None, group: str) -> int:
    return max((seq for name, seq in entered or {} if name == group), default=0)


def explain_hang(states: Sequence[State], deadline_s: float) -> Finding:
    """Name the laggard: the rank others wait for that waits for nobody.

    Args:
        states: where every rank stood at the deadline.
        deadline_s: the deadline that passed.
    """
    if len(states) == 1 and (standing := _thread_ranks(states[0])):
        return _hung_threads(states[0], standing, deadline_s)
    table = {s.rank: s for s in states}
    calls = {s.rank: call for s in states if (call := _blocked_in(s, table))}
    waits = {r: missing_from(call, table) for r, call in calls.items()}
    laggards = sorted({m for missing in waits.values() for m in missing})
    roots = [r for r in laggards if not waits.get(r)] or laggards
    roots.sort(key=lambda r: (_in_some_collective(table[r]), r))
    odd = _disagreement(states)
    stuck = [s.rank for s in states if s.busy] or [s.rank for s in states]
    rank = roots[0] if roots else (odd[0] if odd else stuck[0])
    victims = [r for r, missing in waits.items() if rank in missing]
    call = calls.get(victims[0] if victims else rank)
    if victims:
        head = f"{_waits(victims, calls)}; rank {rank} has not entered and"
    elif odd:
        head = f"{odd[1]}; rank {rank}"
    elif call:
        head = f"every rank is in {call} and none leaves; rank {rank}"
    else:
        head = f"no rank waits in a collective; rank {rank}"
    frame = table[rank].place
    return Finding(
        kind="hung",
        rank=rank,
        summary=f"no answer in {deadline_s:g} s: {head} {table[rank].text}{_others(states, rank)}",
        traceback="\n".join(format_stack(stack) for stack in table[rank].stacks),
        location=frame.where if frame else None,
        collective=call,
        laggards=tuple(roots) if victims else (rank,),
    )


def _thread_ranks(state: State) -> dict[str, list[Stack]]:
    """Group the stacks of a world of threads by where they stand, the fewest first."""
    found: dict[str, list[Stack]] = {}
    for stack in state.stacks:
        here = blame_frame(stack)
        if here and any(f.file.endswith(_THREADS) and f.function == "main" for f in stack):
            found.setdefault(f"{here.where} in {here.function}", []).append(stack)
    return dict(sorted(found.items(), key=lambda item: len(item[1])))


def _hung_threads(
    state: State, standing: Mapping[str, Sequence[Stack]], deadline_s: float
) -> Finding:
    """Say where the ranks of a world of threads stand; which is which no stack says."""
    counted = [f"{len(stacks)} at {place}" for place, stacks in standing.items()]
    stack = next(iter(standing.values()))[0]
    frame = blame_frame(stack)
    return Finding(
        kind="hung",
        rank=state.rank,
        summary=f"no answer in {deadline_s:g} s: ranks are threads here, {', '.join(counted)}",
        traceback=format_stack(stack),
        location=frame.where if frame else None,
    )


def _blocked_in(state: State, table: Mapping[int, State]) -> Collective | None:
    """Give the oldest pending collective that lacks a member, else what it waits in anyway."""
    return next((c for c in state.pending if missing_from(c, table)), state.waits_in)


def _waits(ranks: Sequence[int], calls: Mapping[int, Collective]) -> str:
    """Say which of the ranks wait in which collective."""
    listed: dict[str, list[int]] = {}
    for rank in ranks:
        listed.setdefault(str(calls[rank]), []).append(rank)
    return ", ".join(
        f"{_named(who)} wait{'' if len(who) > 1 else 's'} in {call}" for call, who in listed.items()
    )


def _in_some_collective(state: State) -> bool:
    return any(_in_collective(stack) for stack in state.stacks)


def _disagreement(states: Sequence[State]) -> tuple[int, str] | None:
    """Find a pending (group, seq) that ranks entered with different operations or sizes."""
    for call in (c for s in states for c in s.pending):
        if call.group is None or call.seq is None:
            continue
        seen = {s.rank: (s.entered or {}).get((call.group, call.seq)) for s in states}
        for key in ("op", "sizes"):
            values = {r: getattr(c, key) for r, c in seen.items() if c is not None}
            kinds = sorted(set(values.values()), key=lambda v: list(values.values()).count(v))
            if len(kinds) > 1:
                rank = next(r for r, v in values.items() if v == kinds[0])
                listed = ", ".join(f"rank {r} {c.op} {c.sizes}" for r, c in seen.items() if c)
                return rank, f"ranks disagree on #{call.seq} of group {call.group!r}: {listed}"
    return None


def _others(states: Sequence[State], rank: int) -> str:
    listed: dict[str, list[int]] = {}
    for state in states:
        if state.rank != rank:
            listed.setdefault(state.text, []).append(state.rank)
    return "".join(f"; {_named(who)}: {text}" for text, who in listed.items())
