"""Warm ranks: start, submit, wait until a deadline, kill, replace.

Owns gangs (one per world size and backend, kept between runs), the server they are forked from and
the verdict on a run that gives no result. Must not know cases, nor import torch: the server imports
it while the caller does something else. Easy to get wrong: a rank's end of a socket that the parent
keeps open hides the rank's death.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from parity import devices
from parity.errors import InfrastructureError, UsageError
from parity.failure import (
    Died,
    Frame,
    Raised,
    RankFailure,
    Refused,
    Report,
    State,
    all_refused,
    explain_hang,
    explain_stop,
    parse_stacks,
)
from parity.fingerprint import HostClock
from parity.rank import MESSAGE_BYTES, Channel, Setup, Spec, encode

PRELOAD = ("torch", "torch.distributed", "torch.distributed.tensor")
GRACE_S = 0.3
"""After a real error: time for reports that are on their way, which may be earlier errors."""
ECHO_GRACE_S = 1.0
"""After nothing but echoes: time for the rank that they echo."""
REFUSAL_GRACE_S = 5.0
"""After nothing but refusals, which every rank is to raise: on a busy machine the others may still
be importing what refuses."""
ASK_S = 1.0
"""Longest wait for a rank's watcher to answer where it stands; then faulthandler is asked."""
SIGNAL_S = 0.5
KILL_S = 0.5
"""Time for killed ranks to be gone before the verdict is given; the next start waits longer."""
END_S = 10.0
LOG_TAIL_BYTES = 4000
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from parity.rank import serve; serve(int(sys.argv[1]))"
)


def rank_environment(device: str) -> dict[str, str]:
    """Give the variables a rank must have before torch is imported.

    Args:
        device: "cpu" or "cuda".
    """
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_FR_BUFFER_SIZE": "1024",
        "DS_ACCELERATOR": device,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for CUDA must not make a context to fork
    }
    return environment if device == "cuda" else {**environment, "CUDA_VISIBLE_DEVICES": ""}


class Server:
    """The parent's side of the fork server: asks for ranks, hears of their ends."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process and return; it preloads on its own time."""
        self.folder = Path(tempfile.mkdtemp(prefix="parity-ranks-"))
        self.pids: dict[int, int] = {}
        self.exits: dict[int, int] = {}
        self.broken = ""
        self.ready = False
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(self.folder / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the parent's; it ends the ranks
            )
        self._end = weakref.finalize(self, _end_server, self._sock, self._process, self.folder)
        self._ask(asdict(Setup(tuple(preload), dict(environment), str(self.folder))))

    def fork(self, spec: Spec, ends: Sequence[socket.socket]) -> None:
        """Ask for one rank; `ends` are its ends of the channels, closed here."""
        self._ask({"fork": asdict(spec)}, [end.fileno() for end in ends])
        for end in ends:
            end.close()

    def signal(self, tokens: Sequence[int], number: int) -> None:
        """Send a signal to ranks; the server knows which still live, so no pid is hit twice."""
        self._ask({"tokens": list(tokens), "signal": number})

    def hear(self, wait_s: float = 0.0) -> None:
        """Take in everything the server has said, waiting at most `wait_s` for the first word."""
        while not self.broken and select.select([self._sock], [], [], wait_s)[0]:
            wait_s = 0.0
            try:
                text = self._sock.recv(MESSAGE_BYTES)
            except ConnectionResetError:
                continue  # it closed with a request of ours unread; its last words are still queued
            except OSError:
                text = b""
            ended = {"broken": f"it ended\n{self._log()}"}
            word: dict[str, Any] = json.loads(text) if text else ended
            self.broken = word.get("broken", "")
            self.ready = self.ready or "ready" in word
            if "forked" in word:
                self.pids[word["forked"]] = word["pid"]
            if "exited" in word:
                self.exits[word["exited"]] = word["status"]

    def wait_exits(self, tokens: Sequence[int], wait_s: float) -> bool:
        """Wait until all these ranks have ended; False if one has not in time."""
        until = time.monotonic() + wait_s
        while not self.broken and not set(tokens) <= self.exits.keys():
            left = until - time.monotonic()
            if left <= 0:
                return False
            self.hear(left)
        return set(tokens) <= self.exits.keys()

    def fileno(self) -> int:
        """Give the socket to wait on."""
        return self._sock.fileno()

    def check(self) -> None:
        """Raise if no rank can come from this server any more."""
        self.hear()
        if self.broken:
            raise InfrastructureError(f"the fork server is broken: {self.broken}")

    def end(self) -> None:
        """End the server and every rank it has."""
        self._end()

    def _ask(self, words: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):  # a server that is gone is noticed in `hear`
            socket.send_fds(self._sock, [json.dumps(words).encode()], list(fds))

    def _log(self) -> str:
        return _tail(self.folder / "server.log")


def _end_server(sock: socket.socket, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Close the lifeline; the server then kills its ranks and ends."""
    sock.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return ""


@dataclass
class Member:
    """The parent's side of one rank."""

    spec: Spec
    channel: Channel
    lifeline: Channel


Outcome = tuple[str, Any] | Died


@dataclass(eq=False)
class Gang:
    """The ranks of one world; started when made, joined at the first run."""

    server: Server
    world: int
    backend: str
    members: list[Member] = field(default_factory=list)
    joined: bool = False
    runs: int = 0
    """Tasks it has been given."""
    running: Pending | None = None
    """The task whose answers have not been received."""

    @property
    def tokens(self) -> list[int]:
        """Give the server's names of the ranks."""
        return [member.spec.token for member in self.members]

    @property
    def pids(self) -> list[int]:
        """Give the process ids known so far."""
        return [self.server.pids[t] for t in self.tokens if t in self.server.pids]

    def whole(self) -> bool:
        """Tell whether no rank has ended since the last run."""
        self.server.hear()
        if self.server.broken or not self.server.exits.keys().isdisjoint(self.tokens):
            return False
        # An idle rank says nothing, so what can be read is its end of file, which is there before
        # the server has reaped it.
        socks = [member.channel.sock for member in self.members] if self.joined else []
        return not select.select(socks, [], [], 0.0)[0]

    def join(self, deadline_s: float) -> None:
        """Wait until every rank is in the world's process group.

        The deadline counts from when the server has preloaded: a rank cannot start earlier.

        Raises:
            RankFailure: a rank raised, died or hung on the way.
        """
        if self.joined:
            return
        until = time.monotonic() + deadline_s
        while not self.server.ready:
            self.server.check()
            if time.monotonic() > until:
                raise InfrastructureError(f"the fork server did not preload in {deadline_s:g} s")
            self.server.hear(0.2)
        self.settle(deadline_s)
        self.joined = True

    def start(self, task: str, payloads: Sequence[Any], deadline_s: float) -> float:
        """Give every rank a task, pickled before any hears of it; tell until when it may run."""
        frames = [encode((task, payload)) for payload in payloads]
        until = time.monotonic() + deadline_s
        for member, frame in zip(self.members, frames, strict=True):
            with contextlib.suppress(OSError):  # gone or stuck: its answer will not come
                member.channel.send(frame, until)
        self.runs += 1
        return until

    def settle(self, deadline_s: float, until: float | None = None) -> list[Any]:
        """Give the answer of every rank, or raise the root cause of why there is none."""
        host = HostClock()
        outcomes = self._collect(until or time.monotonic() + deadline_s)
        reports = _failures(outcomes.values())
        if all_refused(reports, self.world):
            raise Refused(_refusal(reports[0]))
        silent = [m for m in self.members if m.spec.rank not in outcomes]
        if reports:
            states = self._ask_states(silent, thorough=False)
            raise RankFailure(explain_stop(reports, states, self.world))
        if silent:
            found = explain_hang(self._ask_states(self.members), deadline_s)
            said = "; ".join(filter(None, (found.summary, host.note())))
            raise RankFailure(replace(found, summary=said))
        return [outcomes[rank][1] for rank in range(self.world)]  # type: ignore[index]

    def _collect(self, until: float) -> dict[int, Outcome]:
        """Receive one answer per rank until all are there, or a failure's grace or `until` ends."""
        outcomes: dict[int, Outcome] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self.server, selectors.EVENT_READ)
            for member in self.members:
                selector.register(member.channel.sock, selectors.EVENT_READ, member)
            while len(outcomes) < self.world:
                left = until - time.monotonic()
                ready = selector.select(max(left, 0.0))  # asked too late, answers may be there
                if left <= 0 and not any(key.data for key, _ in ready):
                    break
                for key, _ in ready:
                    if key.data is None:
                        self.server.check()
                        continue
                    selector.unregister(key.fileobj)
                    arrives = max(until, time.monotonic() + GRACE_S)  # its first bytes are there
                    with contextlib.suppress(TimeoutError):
                        outcomes[key.data.spec.rank] = self._receive(key.data, arrives)
                until = min(until, time.monotonic() + _grace(outcomes.values()))
        return outcomes

    def _receive(self, member: Member, until: float) -> Outcome:
        try:
            outcome: Outcome = member.channel.receive(until)
            return outcome
        except EOFError:
            now = time.monotonic()
        except TimeoutError:
            raise
        except Exception as error:  # unpickling the result here: a class this process lacks
            rank, words = member.spec.rank, (type(error).__name__, f"reading its result: {error}")
            return "raised", Raised(rank, time.monotonic(), (words,), "")
        token = member.spec.token
        self.server.wait_exits([token], ECHO_GRACE_S)
        return Died(
            member.spec.rank, now, self.server.exits.get(token), _tail(Path(member.spec.log))
        )

    def _ask_states(self, members: Sequence[Member], thorough: bool = True) -> list[State]:
        """Ask ranks where they stand; thoroughly: through faulthandler where no watcher answers."""
        until = time.monotonic() + ASK_S
        for member in members:
            with contextlib.suppress(OSError):
                member.lifeline.send([b"?"], until)
        states: dict[int, State] = {}
        with selectors.DefaultSelector() as selector:
            for member in members:
                selector.register(member.lifeline.sock, selectors.EVENT_READ, member)
            while len(selector.get_map()) and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(OSError, EOFError):
                        states[key.data.spec.rank] = key.data.lifeline.receive(until)
        mute = [m for m in members if m.spec.rank not in states]
        if mute and thorough:
            states.update({s.rank: s for s in self._signal_states(mute)})
        return [states[rank] for rank in sorted(states)]

    def _signal_states(self, members: Sequence[Member]) -> list[State]:
        """Read the stacks that faulthandler prints without the interpreter's lock."""
        self.server.signal([m.spec.token for m in members], signal.SIGUSR1)
        until = time.monotonic() + SIGNAL_S
        files = {m.spec.rank: Path(m.spec.stack) for m in members}
        while time.monotonic() < until and not all(_size(f) for f in files.values()):
            time.sleep(0.02)  # a file has no event to wait for
        time.sleep(0.02)  # and it grows while it is being written
        notes = {m.spec.rank: self._process_note(m) for m in members}
        return [
            State(rank, stacks=_stacks(path), entered=None, note=notes[rank])
            for rank, path in files.items()
        ]

    def _process_note(self, member: Member) -> str:
        pid = self.server.pids.get(member.spec.token)
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "its watcher did not answer"
        why = "is stopped by a signal" if fields[0] in "Tt" else "holds the interpreter's lock"
        return f"its watcher did not answer: the process {why}"

    def kill(self) -> bool:
        """Kill the ranks; tell whether all of them are gone already."""
        self.server.signal(self.tokens, signal.SIGKILL)
        for member in self.members:
            member.channel.close()
            member.lifeline.close()
        return self.gone(KILL_S)

    def gone(self, wait_s: float) -> bool:
        """Wait for the end of killed ranks."""
        return self.server.wait_exits(self.tokens, wait_s) or bool(self.server.broken)


def _failures(outcomes: Iterable[Outcome]) -> list[Report]:
    """Pick what failed out of the answers so far."""
    found: list[Report] = []
    for outcome in outcomes:
        if isinstance(outcome, Died):
            found.append(outcome)
        elif outcome[0] == "raised":
            found.append(outcome[1])
    return found


def _grace(outcomes: Iterable[Outcome]) -> float:
    """Give how long to wait for the ranks that are still out, once some have failed."""
    failures = _failures(outcomes)
    if not failures:
        return float("inf")
    if all(isinstance(f, Raised) and f.refusal for f in failures):
        return REFUSAL_GRACE_S
    echoes = all(isinstance(f, Raised) and f.echo for f in failures)
    return ECHO_GRACE_S if echoes else GRACE_S


def _refusal(report: Report) -> str:
    assert isinstance(report, Raised)
    return report.chain[0][1] or report.chain[0][0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _stacks(path: Path) -> tuple[tuple[Frame, ...], ...]:
    try:
        return parse_stacks(path.read_text(errors="replace"))
    except OSError:
        return ()


class GangPool:
    """Gangs kept warm between runs; nothing starts before the first `warm`, `start` or `run`.

    One call at a time: those from several threads wait for one another. Not to be carried over a
    fork of the calling process.
    """

    def __init__(
        self,
        preload: Sequence[str] = PRELOAD,
        *,
        max_live_ranks: int = 16,
        backend: str = "gloo",
        log_dir: str | Path | None = None,
        visible_devices: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_deadline_s: float = 120.0,
        lease_deadline_s: float = 600.0,
        runs_a_gang: int | None = None,
    ) -> None:
        """Describe the pool.

        Args:
            preload: modules the server imports before it forks, in order; `module:function` is
                also called. Replaces the default, so name torch first.
            max_live_ranks: gangs not used for longest are ended to stay within it.
            backend: backend of runs that name none, "gloo" or "nccl".
            log_dir: folder for the output of ranks; None: a temporary one.
            visible_devices: GPUs that NCCL gangs may lease (`parity.devices.visible_devices`).
            environment: further variables of the server and its ranks.
            start_deadline_s: longest start of the server, and again of a gang.
            lease_deadline_s: longest wait for GPUs.
            runs_a_gang: a gang that has run so many tasks is replaced by a fresh one; None: never.
        """
        self.preload, self.max_live_ranks, self.backend = tuple(preload), max_live_ranks, backend
        self.log_dir = None if log_dir is None else Path(log_dir).absolute()
        self.visible_devices = tuple(visible_devices)
        self.environment = dict(environment or {})
        self.start_deadline_s, self.lease_deadline_s = start_deadline_s, lease_deadline_s
        self.runs_a_gang = runs_a_gang
        self._servers: dict[str, Server] = {}
        self._gangs: dict[tuple[int, str], Gang] = {}
        self._ending: list[Gang] = []
        self._lease: devices.Lease | None = None
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def warm(self, world: int, backend: str | None = None) -> None:
        """Start a gang, where there is none, without waiting for it."""
        with self._lock:
            if (world, backend or self.backend) not in self._gangs:
                self._gang(world, backend or self.backend)

    def run(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,
        backend: str | None = None,
    ) -> list[Any]:
        """Run `task` in every rank of a world and give one result per rank: `start`, and wait."""
        return self.start(world, task, payloads, deadline_s, backend).results()

    def start(
        self,
        world: int,
        task: str,
        payloads: Sequence[Any],
        deadline_s: float,
        backend: str | None = None,
    ) -> Pending:
        """Start `task` in every rank of a world; gangs of other worlds may run beside it.

        A gang that still runs something, and on GPUs any gang, is waited for first.

        Args:
            world: number of ranks.
            task: `module:function`, called as function(RankRuntime, payload) in every rank.
            payloads: one per rank, picklable.
            deadline_s: counted from when the gang stands; starting it has its own deadline.
            backend: "gloo" or "nccl"; None: the pool's.

        Returns:
            What waits for the results. Somebody has to: nobody else sees a hang.

        Raises:
            RankFailure: a rank did not come up.
            UsageError: payloads do not fit the world, or the world the pool.
            DeviceUnavailableError: too few GPUs.
        """
        if len(payloads) != world:
            raise UsageError(f"world {world} needs as many payloads (got {len(payloads)})")
        with self._lock:
            gang = self._gang(world, backend or self.backend)
            try:
                gang.join(self.start_deadline_s)
                until = gang.start(task, payloads, deadline_s)
                gang.running = Pending(self, gang, deadline_s, until)
            except BaseException:  # KeyboardInterrupt too: answers would be left in the channels
                self._drop(gang)
                raise
            return gang.running

    def _finish(self, gang: Gang) -> None:
        """Wait for what a gang still runs; its caller asks for the outcome, now or later."""
        running, gang.running = gang.running, None
        if running is None:
            return
        try:
            running.answers = gang.settle(running.deadline_s, running.until)
        except Refused as refusal:
            running.error = refusal
        except Exception as error:
            running.error = error
            self._drop(gang)
        except BaseException:  # KeyboardInterrupt: answers would be left in the channels
            self._drop(gang)
            raise

    def gangs(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """Map (world, backend) of the live gangs, least recently used first, to known pids."""
        with self._lock:
            for server in self._servers.values():
                server.hear()
            return {key: tuple(gang.pids) for key, gang in self._gangs.items()}

    def end(self, backend: str | None = None) -> None:
        """End the gangs of one backend, or all, and give back the GPUs no gang uses."""
        with self._lock:
            for gang in list(self._gangs.values()):
                if backend in (None, gang.backend):
                    self._drop(gang)
            if self._lease and not any(g.backend == "nccl" for g in self._gangs.values()):
                self._lease.release()
                self._lease = None

    def close(self) -> None:
        """End every gang and server; the pool may be used again and starts afresh."""
        with self._lock:
            self.end()
            while self._servers:
                self._servers.popitem()[1].end()

    def __enter__(self) -> GangPool:
        """Use the pool for a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pool."""
        self.close()

    def _gang(self, world: int, backend: str) -> Gang:
        """Find the gang, or make room and start it; it becomes the most recently used."""
        if not 1 <= world <= self.max_live_ranks:
            raise UsageError(
                f"world must be 1 to max_live_ranks = {self.max_live_ranks} (got {world})"
            )
        key = world, backend
        for other in list(self._gangs.values()):
            if other is self._gangs.get(key) or other.backend == backend == "nccl":
                self._finish(other)
        gang = self._gangs.get(key)
        if gang is not None and (gang.runs == self.runs_a_gang or not gang.whole()):
            self._drop(gang)  # worn out; or lost while idle, and no task of ours is to blame
            gang = None
        if gang is None:
            held = self._devices(world) if backend == "nccl" else ()
            self._make_room(world)
            gang = self._start(world, backend, held)
        self._gangs.pop(key, None)
        self._gangs[key] = gang
        return gang

    def _make_room(self, world: int) -> None:
        """Keep within `max_live_ranks`, and on a GPU let the dead give back its memory."""
        while self._gangs and sum(w for w, _ in self._gangs) + world > self.max_live_ranks:
            oldest = next(iter(self._gangs.values()))
            self._finish(oldest)
            self._drop(oldest)
        while self._ending:
            self._ending.pop().gone(END_S)

    def _drop(self, gang: Gang) -> None:
        self._gangs.pop((gang.world, gang.backend), None)
        gang.running = None
        if not gang.kill():
            self._ending.append(gang)

    def _devices(self, world: int) -> tuple[str, ...]:
        """Give the leased devices; a larger lease is a new one, since none may be waited for."""
        if self._lease is None or len(self._lease.devices) < world:
            self.end("nccl")
            self._lease = devices.lease(
                world, self.visible_devices, timeout_s=self.lease_deadline_s
            )
        return self._lease.devices

    def _server(self, device: str) -> Server:
        server = self._servers.get(device)
        if server is not None:
            server.hear()
            if server.broken:
                server.end()
                server = None
        if server is None:
            environment = {**rank_environment(device), **self.environment}
            server = self._servers[device] = Server(self.preload, environment)
        return server

    def _start(self, world: int, backend: str, held: tuple[str, ...]) -> Gang:
        server = self._server("cuda" if backend == "nccl" else "cpu")
        number = next(self._numbers)
        logs = self.log_dir or server.folder
        logs.mkdir(parents=True, exist_ok=True)
        base = Spec(
            token=0, gang=f"{server.folder.name}-{number}", rank=0, world_size=world,
            backend=backend, store=str(server.folder / f"store-{number}"), log="", stack="",
            devices=held,
        )  # fmt: skip
        gang = Gang(server, world, backend)
        for rank in range(world):
            name = f"{base.gang}-rank{rank}"
            spec = replace(
                base,
                token=next(self._numbers),
                rank=rank,
                log=str(logs / f"{name}.log"),
                stack=str(server.folder / f"{name}.stack"),
            )
            gang.members.append(_fork(server, spec))
        return gang


@dataclass(eq=False)
class Pending:
    """A task that a gang of a pool runs, and what became of it; `parity.judge.Running`."""

    pool: GangPool
    gang: Gang
    deadline_s: float
    until: float
    answers: list[Any] | None = None
    error: Exception | None = None

    def results(self) -> list[Any]:
        """Wait for the results and give one per rank; asked again, say the same.

        Raises:
            RankFailure: a rank raised, died or hung; the gang is killed and replaced when needed.
            Refused: every rank refused alike; the gang is kept.
            InfrastructureError: the ranks were ended in between.
        """
        with self.pool._lock:
            if self.gang.running is self:
                self.pool._finish(self.gang)
        if self.error is not None:
            raise self.error
        if self.answers is None:
            raise InfrastructureError("the ranks were ended before they answered")
        return self.answers

    def cancel(self) -> None:
        """Have the ranks free again: they have a moment to answer, or are killed."""
        with self.pool._lock:
            if self.gang.running is self:
                self.until = min(self.until, time.monotonic() + GRACE_S)
                self.pool._finish(self.gang)


def _fork(server: Server, spec: Spec) -> Member:
    channel, their_channel = socket.socketpair()
    lifeline, their_lifeline = socket.socketpair()
    server.fork(spec, (their_channel, their_lifeline))
    return Member(spec, Channel(channel), Channel(lifeline))
