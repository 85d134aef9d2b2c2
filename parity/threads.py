"""Many ranks as threads of one process: exact worlds of 24-60 ranks for implementations without
module-level state.

Owns the life of torch's threaded process group. Must not know cases. Easy to get wrong: the first
thread that raises must release the others, which would wait in a collective for ever.
"""  # noqa: D205

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore
from torch.testing._internal.distributed import multi_threaded_pg

from parity import trial


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
    """Run `parity.trial.run` in one thread per rank and give their results in order.

    Raises:
        Exception: what the first failing thread raised.
    """
    world = order.layout.world
    results: list[Any] = [None] * world
    errors: list[BaseException] = []
    store = HashStore()

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = trial.run(ThreadRuntime(rank, world), order)
        except BaseException as error:  # also what the release of the others raises in them
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    multi_threaded_pg._install_threaded_pg()
    _isolate_threads(True)
    try:
        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        _isolate_threads(False)
        multi_threaded_pg._uninstall_threaded_pg()
    if errors:
        raise errors[0]
    return results


def _isolate_threads(active: bool) -> None:
    """Give every thread a table of process groups of its own (no annotation in torch)."""
    getattr(c10d, "_set_thread_isolation_mode")(active)  # noqa: B009 - not in torch's stubs
