"""A world of ranks inside one test: threads of this process on torch's threaded process group.

Owns starting, releasing and joining the threads. Must not know what they compute. Easy to get
wrong: the process group of a thread is thread-local, so everything a rank does stays in `work`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import STORE_BASED_BARRIER_PREFIX
from torch.testing._internal.distributed import multi_threaded_pg

from fold_impl.groups import FoldGroups, Group, build_groups
from fold_impl.layout import FoldLayout
from parity.threads import ThreadRuntime

T = TypeVar("T")
LAST = ":last_worker"
"""End of the key that torch's barrier of a new group waits for."""
U = 2.0**-53
"""Unit round-off of float64."""


def run_ranks(world: int, work: Callable[[ThreadRuntime], T]) -> list[T]:
    """Run `work` in one thread per rank and give the results by rank.

    Raises:
        Exception: what the first failing thread raised.
    """
    results: list[Any] = [None] * world
    errors: list[BaseException] = []
    store = HashStore()

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work(ThreadRuntime(rank, world))
        except BaseException as error:  # SystemExit too: it is how the others are released
            errors.append(error)
            _release(store)

    multi_threaded_pg._install_threaded_pg()
    _isolate_threads(True)
    try:
        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)
            if errors:  # a released thread may have gone on to the barrier of the next group
                _release(store)
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        _isolate_threads(False)
        multi_threaded_pg._uninstall_threaded_pg()
    if errors:
        raise errors[0]
    return results


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
    getattr(c10d, "_set_thread_isolation_mode")(active)  # noqa: B009 - not in torch's stubs


def whole_world(runtime: ThreadRuntime) -> Group:
    """Give the group of all ranks, as a folded layer would see it."""
    ranks = tuple(range(runtime.world_size))
    handle = runtime.new_group(ranks) if len(ranks) > 1 else None
    return Group(ranks, runtime.rank, handle)


def fold_groups(runtime: ThreadRuntime, layout: FoldLayout) -> FoldGroups:
    """Make the communicators of every axis."""
    return build_groups(layout, runtime.rank, runtime.new_group)


def alone(layout: FoldLayout | None = None) -> FoldGroups:
    """Give the groups of a world of one rank: no process group is made."""
    return build_groups(layout or FoldLayout(1), 0, _no_group)


def _no_group(ranks: Any) -> Any:
    raise AssertionError(f"a process group of {ranks} was asked for")


def random(*shape: int, seed: int) -> torch.Tensor:
    """Draw a float64 normal tensor that depends on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
