"""Many ranks as threads of one process: exact worlds of 24-60 ranks for implementations without
module-level state.

Owns the life of torch's threaded process group. Must not know cases. Easy to get wrong: the first
thread that raises must release the others, which would wait in a collective for ever.
"""  # noqa: D205

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import STORE_BASED_BARRIER_PREFIX
from torch.testing._internal.distributed import multi_threaded_pg

from parity import trial

T = TypeVar("T")
END_S = 5.0
"""Longest wait for threads that are to end."""
LAST = ":last_worker"
"""End of the key that torch's barrier of a new group waits for."""


@dataclass
class ThreadRuntime:
    """What `parity.rank.RankRuntime` is for a process, for a thread."""

    rank: int
    world_size: int
    backend: str = "threads"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _groups: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def new_group(self, ranks: Sequence[int]) -> Any:
        """Create the group once; None where this rank is not in it."""
        key = tuple(ranks)
        if key not in self._groups:
            group = dist.new_group(list(key))
            self._groups[key] = group if self.rank in key else None
        return self._groups[key]


def run(_: Any, order: trial.Order) -> list[trial.RankResult]:
    """Run `parity.trial.run` in one thread per rank and give their results in order."""
    return run_ranks(order.layout.world, lambda runtime: trial.run(runtime, order))


def run_ranks(world: int, work: Callable[[ThreadRuntime], T]) -> list[T]:
    """Run `work` in one thread per rank and give the results by rank.

    Raises:
        Exception: what the first failing thread raised.
    """
    results: list[Any] = [None] * world
    errors: list[BaseException] = []
    ended: list[int] = []
    store = HashStore()

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work(ThreadRuntime(rank, world))
        except BaseException as error:  # SystemExit too: it is how the others are released
            errors.append(error)
            _release(store)
        finally:
            ended.append(rank)

    excepthook = sys.excepthook  # every init_process_group wraps it once more
    multi_threaded_pg._install_threaded_pg()
    _isolate_threads(True)
    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
    try:
        with _on_one_core():
            for thread in threads:
                thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)
            if errors:  # a released thread may have gone on to the barrier of the next group
                _release(store)
    except BaseException:  # Ctrl-C, or the end of this process: no thread may wait for ever
        _let_go(sum(thread.ident is not None for thread in threads), ended, store)
        raise
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        _isolate_threads(False)
        multi_threaded_pg._uninstall_threaded_pg()
        sys.excepthook = excepthook
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def _on_one_core() -> Iterator[None]:
    """Let the threads started here run on the core that this one is on, where that can be chosen.

    They take turns at the interpreter's lock: spread over two cores the same worlds took 1.8 times
    as long and 2.4 times the CPU.
    """
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()} & allowed or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _let_go(started: int, ended: Sequence[int], store: HashStore) -> None:
    """Release the threads from collective after collective until they have ended.

    A join that Ctrl-C has cut short may take a running thread for one that has ended (3.11).
    """
    until = time.monotonic() + END_S
    while len(ended) < started and time.monotonic() < until:
        _release(store)
        time.sleep(0.01)


def _release(store: HashStore) -> None:
    """Wake every thread that waits for a rank which will not come.

    Not `ProcessLocalGroup.exception_handle`: it iterates over a table that other threads change
    (seen: `dictionary changed size during iteration`), and does not reach those in the store's
    barrier of a new group, which would wait for 30 minutes.
    """
    group = multi_threaded_pg.ProcessLocalGroup
    group._terminate.set()
    with group._coll_lock:
        waiting = list(group._cur_coll_on_pgs.values())
    for collective in waiting:
        for condition in (collective._start_cond, collective._done_cond):
            with condition:
                condition.notify_all()
    for key in store.list_keys():
        if STORE_BASED_BARRIER_PREFIX in key and not key.endswith(LAST):
            store.set(key + LAST, "1")


def _isolate_threads(active: bool) -> None:
    """Give every thread a table of process groups of its own (no annotation in torch)."""
    getattr(c10d, "_set_thread_isolation_mode")(active)  # noqa: B009 - not in torch's stubs
