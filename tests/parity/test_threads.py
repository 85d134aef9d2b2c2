"""Ranks as threads: results by rank, groups made once, the first error is what is raised."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl.adapter import FoldImplementation
from parity import case, threads, trial
from tests.worlds import run_ranks

HERE = "tests.parity.test_threads"
TINY = {
    "engine.dtype": "float64",
    "engine.backend": "threads",
    "model.layers": 1,
    "model.heads": 4,
    "model.mlp_width": 8,
    "model.vocab": 7,
    "model.experts": 4,
    "model.expert_width": 4,
}


def order(*planted: trial.Planted, **fields: Any) -> trial.Order:
    """Order one small folded run: world 4, tp 2, ep 4."""
    shape = {"shape.world": 4, "shape.tp": 2, "shape.ep": 4}
    made = case.make({**TINY, **shape, **fields}, suite="s", file="f")
    return trial.Order(made, "fold_impl", made.layout, 0, 0.1, 0.0, planted=planted)


def test_every_rank_hands_back_its_own_part() -> None:
    """Four results in rank order: rank r holds expert r; both dp ranks their own loss."""
    results = threads.run(None, order())
    whole = [r.steps[0].before.tensors()["layers.0.moe.experts.w1"] for r in results]
    found = [w.numpy() for w in whole if w is not None]
    assert [w.shape for w in found] == [(1, 4, 48)] * 4
    assert len({w.tobytes() for w in found}) == 4
    losses = [r.steps[0].losses[0] for r in results]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_afterwards_the_process_is_as_it_was() -> None:
    """No process group and no thread is left; a second world of another size works."""
    before = threading.active_count()
    threads.run(None, order())
    assert not dist.is_initialized()
    assert threading.active_count() == before
    assert len(threads.run(None, order(**{"shape.world": 2, "shape.ep": 2}))) == 2


def fail_on(value: Any, ranks: tuple[int, ...], **context: Any) -> Any:
    """Raise on some ranks where a value passes."""
    if dist.get_rank() in ranks:
        raise ValueError(f"rank {dist.get_rank()} is broken")
    return value


@pytest.mark.parametrize("point", ["router.logits", "reduce.gradient", "norm.square"])
def test_the_first_failing_rank_is_named_and_the_others_released(point: str) -> None:
    """Ranks 0, 2 and 3 wait in a collective; what is raised is rank 1's error, not the release."""
    fault = trial.Planted(point, f"{HERE}:fail_on", {"ranks": (1,)})
    with pytest.raises(ValueError, match="rank 1 is broken"):
        threads.run(None, order(fault))
    assert len(threads.run(None, order())) == 4  # and the next world is not harmed


CUT_SHORT = """
import faulthandler, signal, threading, time, torch
from torch import distributed as dist
from tests.worlds import run_ranks

def work(runtime):
    group = runtime.new_group(range(3))
    while True:
        dist.all_reduce(torch.ones(1), group=group)

faulthandler.dump_traceback_later(50, exit=True)  # of every thread, where one waits for ever
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
try:
    run_ranks(3, work)
except KeyboardInterrupt:
    until = time.monotonic() + 5.0
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.01)
    print(threading.active_count(), run_ranks(2, lambda runtime: runtime.rank), flush=True)
"""


def test_ctrl_c_leaves_no_thread_behind() -> None:
    """Ranks in the middle of collectives are let go before their groups are taken away."""
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", CUT_SHORT]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1 [0, 1]\n", done.stderr


def test_a_group_is_made_once_and_is_none_for_those_outside() -> None:
    """The same ranks give the same group again; a rank outside takes part in making it."""

    def work(runtime: threads.ThreadRuntime) -> tuple[bool, bool, float]:
        pair = runtime.new_group([0, 2])
        again = runtime.new_group((0, 2))
        total = torch.tensor(float(runtime.rank + 1))
        if pair is not None:
            dist.all_reduce(total, group=pair)
        return pair is again, pair is None, float(total)

    assert run_ranks(3, work) == [(True, False, 4.0), (True, True, 2.0), (True, False, 4.0)]


def test_a_thread_knows_who_it_is_and_where_it_computes() -> None:
    """The same members as a rank of a gang."""
    runtime = threads.ThreadRuntime(2, 5)
    assert (runtime.rank, runtime.world_size, runtime.backend) == (2, 5, "threads")
    assert runtime.device == torch.device("cpu")


def test_gradients_of_threads_do_not_mix() -> None:
    """Each thread differentiates its own graph, also while others wait."""

    def work(runtime: threads.ThreadRuntime) -> Tensor:
        x = torch.full((3,), float(runtime.rank + 1), dtype=torch.float64, requires_grad=True)
        x.square().sum().backward()
        assert x.grad is not None
        return x.grad

    found = run_ranks(4, work)
    assert [g.tolist() for g in found] == [[2.0 * (r + 1)] * 3 for r in range(4)]


class BrokenBuild(FoldImplementation):
    """Fails on one rank before any group exists."""

    def build(self, model: Any, config: Any, context: Any) -> None:
        """Raise on rank 1."""
        if context.rank == 1:
            raise ValueError("rank 1 is broken")
        super().build(model, config, context)


def test_a_rank_that_fails_before_its_groups_exist_releases_the_others() -> None:
    """They wait in the store-based barrier of `new_group`, which no event interrupts."""
    with pytest.raises(ValueError, match="rank 1 is broken"):
        threads.run(None, replace(order(), implementation=f"{HERE}:BrokenBuild"))


@pytest.mark.parametrize("moment", ["before groups", "between groups", "in a collective"])
def test_the_tests_own_world_releases_its_ranks_at_any_moment(moment: str) -> None:
    """`tests.worlds.run_ranks`: rank 1 of four fails, the others end, its error is raised."""

    def work(runtime: threads.ThreadRuntime) -> None:
        broken = runtime.rank == 1
        if broken and moment == "before groups":
            raise ValueError("rank 1 is broken")
        first = runtime.new_group([0, 1, 2, 3])
        if broken and moment == "between groups":
            raise ValueError("rank 1 is broken")
        runtime.new_group([0, 1])
        runtime.new_group([2, 3])
        if broken:
            raise ValueError("rank 1 is broken")
        dist.all_reduce(torch.ones(1), group=first)

    before = threading.active_count()
    for _ in range(10):
        with pytest.raises(ValueError, match="rank 1 is broken"):
            run_ranks(4, work)
    assert threading.active_count() == before
