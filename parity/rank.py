"""What runs inside a rank, and the server that ranks are forked from.

Owns the fork server's loop, the loop of one rank, its process groups, and the watcher thread that
answers where the rank stands and ends it when the parent is gone. Must not know cases, nor import
torch before it is told to: the parent imports this module too. Easy to get wrong: after a fork
every descriptor of the server must be closed, or an end of file never arrives and ranks outlive
their parent.

The protocol: one `Channel` per rank carries tasks and results. A second one is the lifeline: a byte
on it asks for the rank's state, its end of file ends the rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import pickle
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from parity.failure import Frame, Raised, State, parse_records

if TYPE_CHECKING:
    import torch

NO_TIMEOUT = timedelta(days=1)
"""Collectives never give up by themselves: the deadline of the run is the only one."""
OUT_OF_BAND_BYTES = 1 << 16
"""Arrays at least this large are sent beside the pickle, without being copied into it."""
LOST_PARENT_STATUS = 86
MESSAGE_BYTES = 1 << 20
_HEADER = struct.Struct("!QQ")
_LENGTH = struct.Struct("!Q")


def encode(message: object) -> list[Any]:
    """Pickle a message into parts: header, pickle, then each large buffer as it lies in memory."""
    buffers: list[memoryview] = []

    def outside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    body = pickle.dumps(message, protocol=5, buffer_callback=outside)
    lengths = b"".join(_LENGTH.pack(b.nbytes) for b in buffers)
    return [_HEADER.pack(len(body), len(buffers)) + lengths + body, *buffers]


Parts = tuple[bytearray, list[bytearray]]
"""One received message: the pickle and its buffers."""


def decode(parts: Parts) -> Any:
    """Unpickle a message; arrays lie in the buffers received, writable and not copied again."""
    return pickle.loads(parts[0], buffers=parts[1])


class Channel:
    """Messages over a stream socket, every call bounded by a time on the monotonic clock."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self.sock = sock
        with contextlib.suppress(OSError):  # a larger buffer only saves wake-ups
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE_BYTES)

    def send(self, parts: Sequence[Any], until: float | None = None) -> None:
        """Send what `encode` gave.

        Raises:
            TimeoutError: the other end did not read in time.
            OSError: the other end is gone.
        """
        for part in parts:
            self._bound(until)
            self.sock.sendall(part)

    def receive_parts(self, until: float | None = None) -> Parts:
        """Receive one message without unpickling it.

        Raises:
            TimeoutError: no whole message came in time.
            EOFError: the other end is gone.
        """
        body_bytes, count = _HEADER.unpack(self._read(_HEADER.size, until))
        lengths = self._read(count * _LENGTH.size, until)
        body = self._read(body_bytes, until)
        return body, [self._read(n, until) for (n,) in _LENGTH.iter_unpack(lengths)]

    def receive(self, until: float | None = None) -> Any:
        """Receive and unpickle one message."""
        return decode(self.receive_parts(until))

    def close(self) -> None:
        """Close this end."""
        self.sock.close()

    def _bound(self, until: float | None) -> None:
        self.sock.settimeout(None if until is None else max(until - time.monotonic(), 1e-3))

    def _read(self, num_bytes: int, until: float | None) -> bytearray:
        block = bytearray(num_bytes)
        view = memoryview(block)
        while view:
            self._bound(until)
            try:
                got = self.sock.recv_into(view)
            except ConnectionError as error:
                raise EOFError("the other end is gone") from error
            if not got:
                raise EOFError("the other end is gone")
            view = view[got:]
        return block


@dataclass(frozen=True)
class Spec:
    """Everything a rank must know before its process group exists; plain JSON."""

    token: int
    gang: str
    rank: int
    world_size: int
    backend: str
    store: str
    log: str
    stack: str
    """File that faulthandler writes to on SIGUSR1, where the watcher cannot answer."""
    devices: tuple[str, ...] = ()
    """Leased devices, for every rank of the gang the same; the rank-th is this rank's."""


@dataclass(frozen=True)
class Setup:
    """What the fork server does before it forks anything; plain JSON."""

    preload: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    """Removed by the server when its parent is gone."""


@dataclass
class RankRuntime:
    """What a task is given: who this rank is, where it computes, how it gets groups."""

    rank: int
    world_size: int
    backend: str
    device: torch.device
    gang: str = ""
    """Name of the gang, unique on this machine among those alive."""
    _groups: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    def new_group(self, ranks: Sequence[int]) -> Any:
        """Give the process group of `ranks`, made once in the life of the gang.

        Only members wait for one another (local synchronisation); the whole world is the default
        group itself.

        Returns:
            The ProcessGroup, or None where this rank is no member.
        """
        import torch.distributed as dist

        key = tuple(sorted(ranks))
        if self.rank not in key:
            return None
        if len(key) == self.world_size:
            return dist.group.WORLD
        if key not in self._groups:
            self._groups[key] = dist.new_group(
                list(key), timeout=NO_TIMEOUT, backend=self.backend, use_local_synchronization=True
            )
        return self._groups[key]


@dataclass
class Activity:
    """What the main thread does, for the watcher to read."""

    rank: int
    main: int
    busy: bool = True


# --- the fork server ---------------------------------------------------------------------------


def serve(fd: int) -> NoReturn:
    """Preload, then fork ranks on request until the parent is gone; end them all and the process.

    Args:
        fd: this end of a SOCK_SEQPACKET pair; the first message on it is a `Setup`.
    """
    control = socket.socket(fileno=fd)
    setup = Setup(**json.loads(control.recv(MESSAGE_BYTES)))
    children: dict[int, int] = {}
    try:
        os.environ.update(setup.environment)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        if _preload(setup.preload, control):
            _fork_on_request(control, children)
    except OSError:
        traceback.print_exc()  # the parent is gone; the log may be read if it is not
    finally:
        for pid in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(setup.folder, ignore_errors=True)
        os._exit(0)


def _tell(control: socket.socket, **words: object) -> None:
    control.send(json.dumps(words).encode())


def _preload(names: Sequence[str], control: socket.socket) -> bool:
    """Import each module; `module:function` is also called, once, for all ranks to inherit."""
    for name in names:
        try:
            module = importlib.import_module(name.partition(":")[0])
            if ":" in name:
                getattr(module, name.partition(":")[2])()
        except BaseException:
            _tell(control, broken=f"cannot preload {name!r}\n{traceback.format_exc()}"[-60_000:])
            return False
    gc.collect()
    gc.freeze()  # a collection in a rank would copy every page the server has
    _tell(control, ready=True)
    return True


def _fork_on_request(control: socket.socket, children: dict[int, int]) -> None:
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    _reap(control, children)
                elif not _obey(control, children, (selector, woken, waker)):
                    return


def _reap(control: socket.socket, children: dict[int, int]) -> None:
    for token, pid in list(children.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del children[token]
            _tell(control, exited=token, status=os.waitstatus_to_exitcode(status))


def _obey(control: socket.socket, children: dict[int, int], opened: Sequence[Any]) -> bool:
    """Serve one request; False at the parent's end of file."""
    text, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 2)
    if not text:
        return False
    request = json.loads(text)
    for token in request.get("tokens", ()):
        if token in children:
            os.kill(children[token], request["signal"])
    if "fork" in request:
        spec = Spec(**request["fork"])
        pid = os.fork()
        if not pid:
            _become(spec, fds, [control, *opened])
        children[spec.token] = pid
        for fd in fds:
            os.close(fd)
        _tell(control, forked=spec.token, pid=pid)
    return True


def _become(spec: Spec, fds: Sequence[int], opened: Sequence[Any]) -> NoReturn:
    """Turn a fresh fork into a rank; never returns into the server's loop."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in opened:
            end.close()
        log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        live(spec, *(Channel(socket.socket(fileno=fd)) for fd in fds))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)  # never the interpreter's teardown: it takes seconds and can hang


# --- one rank ----------------------------------------------------------------------------------


def live(spec: Spec, channel: Channel, lifeline: Channel) -> None:
    """Join the world, then run tasks until the parent is gone."""
    activity = Activity(spec.rank, threading.get_ident())
    # Open as long as the rank lives: faulthandler writes to the descriptor.
    stack = open(spec.stack, "w")  # noqa: SIM115
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True, chain=False)
    threading.Thread(target=watch, args=(lifeline, activity), daemon=True).start()
    runtime: list[RankRuntime] = []
    try:
        channel.send(_attempt(spec.rank, lambda: runtime.append(join(spec))))
        while True:
            activity.busy = False
            call = channel.receive_parts()
            activity.busy = True
            channel.send(_attempt(spec.rank, partial(_perform, runtime[0], call)))
    except (EOFError, OSError):
        os._exit(LOST_PARENT_STATUS)


def join(spec: Spec) -> RankRuntime:
    """Set this rank's environment and device and make the default process group.

    init_process_group: world group, over a file store (no port); must be called by every rank.
    """
    random.seed()
    os.environ.update(
        RANK=str(spec.rank),
        LOCAL_RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_WORLD_SIZE=str(spec.world_size),
    )
    if spec.backend == "nccl":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if spec.backend == "nccl":
        device = torch.device("cuda", spec.rank)
        torch.cuda.set_device(device)
    elif hasattr(os, "sched_setaffinity"):  # Linux
        schedule(spec.rank, spec.world_size)
    dist.init_process_group(
        spec.backend,
        store=FileStore(spec.store, spec.world_size),
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=NO_TIMEOUT,  # no device_id: bound groups are split, which non-members must join
    )
    return RankRuntime(spec.rank, spec.world_size, spec.backend, device, spec.gang)


def schedule(rank: int, world_size: int) -> None:
    """Give this thread, and those it starts, their cores, and let none displace another on waking.

    Gloo's loop thread only tries a connection's lock and polls again at once where it is held: 57
    polls a message, 27 % of both cores. Under SCHED_BATCH, where the thread that sends is not
    displaced by the loop that its message woke, it was 6 %.
    """
    with contextlib.suppress(OSError):  # a container may forbid either
        os.sched_setaffinity(0, cores_of(rank, world_size, os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def cores_of(rank: int, world_size: int, allowed: Iterable[int]) -> list[int]:
    """Give a rank its share of the cores: neighbours, who are the lanes that talk most, share one.

    Free to wander, four ranks on two cores took 1.3 times as long: waking a thread on another core
    costs more than the message it waits for.
    """
    cores = sorted(allowed)
    first = rank * len(cores) // world_size
    return cores[first : max(first + 1, (rank + 1) * len(cores) // world_size)]


def _attempt(rank: int, work: Callable[[], Any]) -> list[Any]:
    """Encode ("done", result) or, if `work` or the pickling raises, ("raised", report)."""
    try:
        return encode(("done", work()))
    except BaseException as error:  # SystemExit of a task is the task's failure, not our end
        return encode(("raised", report(rank, error)))


def _perform(runtime: RankRuntime, call: Parts) -> Any:
    task, payload = decode(call)
    return find(task)(runtime, payload)


def find(task: str) -> Callable[[RankRuntime, Any], Any]:
    """Import the function that `module:function` names."""
    module, _, name = task.partition(":")
    function: Callable[[RankRuntime, Any], Any] = getattr(importlib.import_module(module), name)
    return function


def report(rank: int, error: BaseException) -> Raised:
    """Put an exception into words that need none of its classes to be read."""
    now = time.monotonic()
    chain: list[tuple[str, str]] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 20:
        chain.append((type(link).__name__, _said(link)))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    frames = traceback.extract_tb(error.__traceback__)
    return Raised(
        rank=rank,
        time_s=now,
        chain=tuple(chain),
        traceback="".join(traceback.format_exception(error)),
        frames=tuple(Frame(f.filename, f.lineno or 0, f.name) for f in frames),
        refusal=bool(getattr(error, "refusal", False)),
    )


def _said(error: BaseException) -> str:
    """Give the words of an exception, whose class may fail to."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its __str__ raised {type(failure).__name__})"


# --- the watcher thread ------------------------------------------------------------------------


def watch(lifeline: Channel, activity: Activity) -> None:
    """Answer each byte on the lifeline with this rank's state; end the rank at its end of file."""
    while True:
        try:
            asked = lifeline.sock.recv(1)
        except OSError:
            asked = b""
        if not asked:
            os._exit(LOST_PARENT_STATUS)
        with contextlib.suppress(OSError):
            lifeline.send(encode(observe(activity)), time.monotonic() + 1.0)
        lifeline.sock.settimeout(None)


def observe(activity: Activity) -> State:
    """Say where every thread of this rank but the watcher stands and what it waits in."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    order = sorted(frames, key=lambda ident: ident != activity.main)
    stacks = tuple(_walk(frames[ident]) for ident in order)
    try:
        pending, entered = parse_records(flight_records(), group_ranks())
    except Exception as error:
        note = f"no flight record: {error}"
        return State(activity.rank, activity.busy, stacks, entered=None, note=note)
    return State(activity.rank, activity.busy, stacks, pending, entered)


def _walk(frame: FrameType | None) -> tuple[Frame, ...]:
    stack = []
    while frame is not None:
        stack.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(reversed(stack))


def flight_records() -> list[str]:
    """Give torch's flight records as JSON: the one place that knows these private functions.

    A build with CUDA keeps a record of its own for NCCL.
    """
    from torch._C import _distributed_c10d

    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    dumps = [d for name in names if (d := getattr(_distributed_c10d, name, None))]
    if not dumps:
        raise RuntimeError("this torch has none")
    texts = [dump(True, False) for dump in dumps]
    return [text.decode() if isinstance(text, bytes) else text for text in texts]


def group_ranks() -> dict[str, tuple[int, ...]]:
    """Map the name of every process group this rank is in to its global ranks."""
    from torch.distributed import distributed_c10d

    world = distributed_c10d._world
    return {
        world.pg_names[group]: tuple(ranks)
        for group, ranks in list(world.pg_group_ranks.items())
        if group in world.pg_names
    }
