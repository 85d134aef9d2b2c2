"""Real ranks in small worlds: what they answer, and what is said when they do not."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parity.devices import DeviceUnavailableError
from parity.errors import InfrastructureError, UsageError
from parity.failure import RankFailure, Refused
from parity.fingerprint import HostClock
from parity.gang import PRELOAD, GangPool
from parity.rank import RankRuntime

DEADLINE_S = 1.0
"""Of runs that hang; the verdict must come within 3 s after it."""
LONG_S = 60.0
FOREVER_S = 3600
ROOT = Path(__file__).parents[2]


# --- tasks: they run in the ranks ----------------------------------------------------------------


def echo_payload(runtime: RankRuntime, payload: Any) -> Any:
    """Give back who this is and what came."""
    return runtime.rank, runtime.world_size, payload


def sum_ranks(runtime: RankRuntime, payload: Any) -> float:
    """Sum rank + 1 over the world."""
    total = torch.tensor(float(runtime.rank + 1))
    dist.all_reduce(total)
    return total.item()


def large_array(runtime: RankRuntime, payload: int) -> dict[str, Any]:
    """Give an array of `payload` numbers, all of them the rank."""
    return {"array": np.full(payload, runtime.rank, dtype=np.float64)}


def group_identity(runtime: RankRuntime, tables: Sequence[Sequence[int]]) -> list[Any]:
    """Give for each table the identity of its group and the sum of ranks over it."""
    found: list[Any] = []
    for ranks in tables:
        group = runtime.new_group(ranks)
        total = torch.tensor(float(runtime.rank))
        if group is not None:
            dist.all_reduce(total, group=group)
        found.append(None if group is None else (id(group), total.item()))
    return found


def surroundings(runtime: RankRuntime, names: Sequence[str]) -> dict[str, Any]:
    """Give environment variables and settings a rank must have."""
    values: dict[str, Any] = {name: os.environ.get(name) for name in names}
    return {**values, "threads": torch.get_num_threads(), "device": str(runtime.device)}


def cores_of_collectives(runtime: RankRuntime, payload: Any) -> tuple[set[int], int]:
    """Give the main thread's cores, and how many threads keep to them and displace no other."""
    dist.barrier()
    own = os.sched_getaffinity(0)
    threads = [int(thread) for thread in os.listdir("/proc/self/task")]
    kept = [thread for thread in threads if os.sched_getaffinity(thread) == own]
    return own, sum(os.sched_getscheduler(thread) == os.SCHED_BATCH for thread in kept)


def wait_for(runtime: RankRuntime, marks: Sequence[str]) -> str:
    """Make the first file, wait for the second one: it takes a world that runs beside this."""
    mine, other = (Path(mark) for mark in marks)
    mine.touch()
    until = time.monotonic() + LONG_S
    while not other.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return f"{mine.name} saw {other.name if other.exists() else 'nothing'}"


def own_pid(runtime: RankRuntime, payload: Any) -> int:
    """Give the rank's process id."""
    return os.getpid()


def server_pid(runtime: RankRuntime, payload: Any) -> int:
    """Give the process that this rank was forked from."""
    return os.getppid()


def raise_in_one(runtime: RankRuntime, payload: Any) -> None:
    """Raise in rank 1 while the others wait for it."""
    if runtime.rank == 1:
        raise ValueError("boom")
    dist.all_reduce(torch.ones(2))


def die_in_one(runtime: RankRuntime, number: int) -> None:
    """End rank 1 by a signal, or by an exit status where the number is negative."""
    if runtime.rank == 1 and number < 0:
        os._exit(-number)
    if runtime.rank == 1:
        os.kill(os.getpid(), number)
    dist.all_reduce(torch.ones(2))


def sleep_in_one(runtime: RankRuntime, payload: Any) -> None:
    """Leave rank 1 of a pair asleep; rank 0 waits for it, the world for both."""
    pair = runtime.new_group([0, 1])
    if runtime.rank == 1:
        time.sleep(FOREVER_S)
    if pair is not None:
        dist.all_reduce(torch.ones(2), group=pair)
    dist.barrier()


def hold_interpreter_in_one(runtime: RankRuntime, payload: Any) -> None:
    """Hang rank 1 in native code that never lets another thread run Python."""
    if runtime.rank == 1:
        ctypes.PyDLL(None).sleep(FOREVER_S)
    dist.all_reduce(torch.ones(2))


def disagree(runtime: RankRuntime, payload: Any) -> None:
    """Call another collective in rank 2 than in the others."""
    if runtime.rank == 2:
        dist.barrier()
    else:
        dist.all_reduce(torch.ones(2))


def skip_in_one(runtime: RankRuntime, payload: Any) -> None:
    """Return from rank 1 without the collective that the others are in."""
    if runtime.rank != 1:
        dist.all_reduce(torch.ones(2))


class NotSupported(Exception):  # noqa: N818 - stands for an implementation's own class
    """A refusal as an implementation would raise it."""

    refusal = True


def refuse(runtime: RankRuntime, ranks: Sequence[int]) -> None:
    """Refuse on the given ranks."""
    if runtime.rank in ranks:
        raise NotSupported("pipelines are not supported")


def unpicklable(runtime: RankRuntime, payload: Any) -> Any:
    """Give a result that cannot leave the process."""
    return lambda: None


def mark_preloaded() -> None:
    """Leave a trace that ranks inherit."""
    os.environ["PARITY_TEST_PRELOADED"] = "yes"


def line_of(task: Callable[..., Any], text: str) -> str:
    """Give `file:line` of the line of a task that holds `text`."""
    lines, first = inspect.getsourcelines(task)
    return f"{__file__}:{first + next(n for n, line in enumerate(lines) if text in line)}"


def named(task: Callable[..., Any]) -> str:
    """Give a task's name as the pool takes it."""
    return f"{__name__}:{task.__name__}"


# --- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[GangPool]:
    """Give one pool to all tests of this module: a failed run must not harm the next."""
    with GangPool((*PRELOAD, f"{__name__}:mark_preloaded"), max_live_ranks=8) as made:
        yield made


def run(pool: GangPool, world: int, task: Callable[..., Any], payload: Any = None) -> list[Any]:
    """Run a task that is to succeed, with the same payload on every rank."""
    return pool.run(world, named(task), [payload] * world, LONG_S)


def fail(pool: GangPool, world: int, task: Callable[..., Any], payload: Any = None) -> RankFailure:
    """Run a task that is to fail, see the verdict in time and the next run green."""
    deadline_s = DEADLINE_S if task in HANGS else LONG_S
    run(pool, world, echo_payload)
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        pool.run(world, named(task), [payload] * world, deadline_s)
    assert time.monotonic() - start < DEADLINE_S + 3.0
    assert run(pool, world, sum_ranks) == [world * (world + 1) / 2] * world
    return caught.value


HANGS = (sleep_in_one, hold_interpreter_in_one, disagree, skip_in_one)


def wait_gone(pids: Sequence[int], wait_s: float) -> list[int]:
    """Wait until processes have ended and give those that have not."""
    until, left = time.monotonic() + wait_s, []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([handle], [], [], max(0.0, until - time.monotonic()))[0]:
            left.append(pid)
        os.close(handle)
    return left


# --- answers -------------------------------------------------------------------------------------


def test_each_rank_gets_its_payload(pool: GangPool) -> None:
    """Results stand in rank order."""
    got = pool.run(2, named(echo_payload), ["a", {"b": 1}], LONG_S)
    assert got == [(0, 2, "a"), (1, 2, {"b": 1})]


def test_ranks_reach_one_another(pool: GangPool) -> None:
    """An all_reduce over four ranks sums 1 + 2 + 3 + 4."""
    assert run(pool, 4, sum_ranks) == [10.0] * 4


def test_two_worlds_run_beside_one_another(pool: GangPool, tmp_path: Path) -> None:
    """Each waits for the other, which a pool that ran one after the other would never end."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = pool.start(1, named(wait_for), [(one, two)], LONG_S)
    second = pool.start(2, named(wait_for), [(two, one)] * 2, LONG_S)
    assert second.results() == ["two saw one"] * 2
    assert first.results() == ["one saw two"]
    assert first.results() == ["one saw two"], "asked again, it is the same"


def test_a_gang_does_one_task_after_the_other(pool: GangPool) -> None:
    """A second task waits for the first, whose results are kept, as is its error."""
    first = pool.start(2, named(echo_payload), ["a", "b"], LONG_S)
    second = pool.start(2, named(echo_payload), ["c", "d"], LONG_S)
    assert [payload for *_, payload in first.results()] == ["a", "b"]
    assert [payload for *_, payload in second.results()] == ["c", "d"]
    failing = pool.start(2, named(raise_in_one), [None] * 2, LONG_S)
    assert run(pool, 2, sum_ranks) == [3.0] * 2, "by a fresh gang"
    with pytest.raises(RankFailure, match="boom"):
        failing.results()


def test_a_cancelled_run_leaves_its_ranks_free(pool: GangPool) -> None:
    """Ranks that answer at once are kept; those that hang are gone soon, not at their deadline."""
    pool.start(2, named(echo_payload), [None] * 2, LONG_S).cancel()
    before = pool.gangs()[2, "gloo"]
    assert run(pool, 2, sum_ranks) == [3.0] * 2
    assert pool.gangs()[2, "gloo"] == before
    start = time.monotonic()
    hanging = pool.start(2, named(sleep_in_one), [None] * 2, LONG_S)
    hanging.cancel()
    assert time.monotonic() - start < 3.0
    assert (2, "gloo") not in pool.gangs()
    assert wait_gone(before, 5.0) == []
    with pytest.raises(RankFailure, match="rank 1"):
        hanging.results()


def test_results_after_the_end_of_the_ranks_are_an_error(pool: GangPool) -> None:
    """Whoever ends the pool first is told so."""
    pending = pool.start(2, named(sleep_in_one), [None] * 2, LONG_S)
    pool.end()
    with pytest.raises(InfrastructureError, match="ended before they answered"):
        pending.results()


@pytest.mark.parametrize("megabytes", [1, 16])
def test_answers_that_are_there_count_however_late_they_are_asked_for(
    pool: GangPool, megabytes: int
) -> None:
    """More than a socket holds: the rest comes while it is read, behind the deadline."""
    late = pool.start(2, named(large_array), [megabytes << 17] * 2, 0.5)
    time.sleep(1.0)
    assert [len(answer["array"]) for answer in late.results()] == [megabytes << 17] * 2


def test_large_results_arrive_whole_and_writable(pool: GangPool) -> None:
    """2 MB from every rank come back as arrays of their own."""
    results = run(pool, 4, large_array, 250_000)
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(result["array"], np.full(250_000, float(rank)))
        result["array"][0] = -1.0


def test_groups_live_as_long_as_the_gang(pool: GangPool) -> None:
    """The same ranks give the same group again, in the next run too; others give None."""
    tables = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1)]
    first, second = (run(pool, 4, group_identity, tables) for _ in range(2))
    assert first == second
    assert first[0][0] == first[0][4]
    sums = [[entry and entry[1] for entry in entries] for entries in first]
    assert sums[0] == [1.0, None, 2.0, None, 1.0]
    assert sums[3] == [None, 5.0, None, 4.0, None]


def test_gang_stays_warm_between_runs(pool: GangPool) -> None:
    """Two runs of one world are served by the same processes."""
    run(pool, 2, echo_payload)
    before = pool.gangs()[2, "gloo"]
    run(pool, 2, echo_payload)
    assert pool.gangs()[2, "gloo"] == before
    assert len(before) == 2


def test_ranks_have_their_environment_and_the_caller_keeps_its_own(pool: GangPool) -> None:
    """One thread, the loopback device, no GPU, the preload's trace; nothing of it leaks out."""
    names = ["OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"]
    names += ["RANK", "WORLD_SIZE", "PARITY_TEST_PRELOADED"]
    before = dict(os.environ)
    expected = dict(zip(names, ["1", "lo", "cpu", "", "1", "2", "yes"], strict=True))
    got = run(pool, 2, surroundings, names)[1]
    assert got == {**expected, "threads": 1, "device": "cpu"}
    assert dict(os.environ) == before


def test_ranks_share_the_cores_out(pool: GangPool) -> None:
    """Every core is some rank's, a lone rank has all; Gloo's threads keep to it, displace none."""
    allowed = os.sched_getaffinity(0)
    answers = run(pool, 4, cores_of_collectives)
    assert set().union(*(cores for cores, _ in answers)) == allowed
    assert all(len(cores) == max(1, len(allowed) // 4) for cores, _ in answers) or len(allowed) > 4
    assert min(threads for _, threads in answers) >= 3, "the main thread and two of Gloo's"
    assert run(pool, 1, cores_of_collectives)[0][0] == allowed


# --- failures ------------------------------------------------------------------------------------


def test_error_in_one_rank_ends_the_run_early(pool: GangPool) -> None:
    """The raising rank and line are named at once, with the collective the others wait in."""
    failure = fail(pool, 3, raise_in_one)
    assert (failure.kind, failure.rank) == ("raised", 1)
    assert failure.location == line_of(raise_in_one, "raise ValueError")
    assert 'raise ValueError("boom")' in failure.traceback
    assert failure.collective is not None
    assert (failure.collective.op, failure.collective.ranks) == ("all_reduce", (0, 1, 2))
    assert "ranks 0 2 wait in all_reduce" in failure.summary


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGKILL, -9, "was killed by SIGKILL"),
        (signal.SIGSEGV, -11, "was killed by SIGSEGV"),
        (-7, 7, "exited with status 7"),
    ],
)
def test_dead_rank_is_named_with_its_end(
    pool: GangPool, number: int, status: int, words: str
) -> None:
    """A rank that dies is the cause, its peers' lost connections are not."""
    failure = fail(pool, 3, die_in_one, number)
    assert (failure.kind, failure.rank, failure.exit_status) == ("died", 1, status)
    assert f"rank 1 {words}" in failure.summary


def test_output_of_a_dead_rank_is_kept(pool: GangPool) -> None:
    """What faulthandler printed at a crash comes with the failure and names the task's line."""
    failure = fail(pool, 2, die_in_one, signal.SIGSEGV)
    assert "Segmentation fault" in failure.traceback
    assert "in die_in_one" in failure.traceback


def test_sleeping_laggard_is_named(pool: GangPool) -> None:
    """Rank 1 sleeps, 0 waits for it in a pair, 2 waits in the world: rank 1's line is the cause."""
    failure = fail(pool, 3, sleep_in_one)
    assert (failure.kind, failure.rank, failure.laggards) == ("hung", 1, (1,))
    assert failure.location == line_of(sleep_in_one, "time.sleep")
    assert failure.collective is not None
    assert (failure.collective.op, failure.collective.ranks) == ("all_reduce", (0, 1))
    assert failure.collective.seq is not None
    assert failure.collective.seq >= 1
    assert "time.sleep(FOREVER_S)" in failure.traceback


def test_a_hang_tells_what_the_host_kept(pool: GangPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stood still, no answer in time may be no hang."""
    monkeypatch.setattr(HostClock, "share", lambda _: 0.87)
    failure = fail(pool, 3, sleep_in_one)
    assert failure.rank == 1
    assert failure.summary.endswith("; the host kept 87% of the cores' time")


def test_rank_that_cannot_answer_is_named(pool: GangPool) -> None:
    """A rank whose watcher never gets the interpreter is still found, with its line."""
    failure = fail(pool, 2, hold_interpreter_in_one)
    assert (failure.rank, failure.laggards) == (1, (1,))
    assert failure.location == line_of(hold_interpreter_in_one, "ctypes.PyDLL")
    assert "holds the interpreter's lock" in failure.summary


def test_rank_in_another_collective_is_named(pool: GangPool) -> None:
    """One rank in a barrier, two in an all_reduce under the same number."""
    failure = fail(pool, 3, disagree)
    assert (failure.kind, failure.rank) == ("hung", 2)
    assert failure.location == line_of(disagree, "dist.barrier")
    assert "ranks disagree on" in failure.summary


def test_rank_that_returned_early_is_named(pool: GangPool) -> None:
    """A rank that never calls the collective and is done is the laggard."""
    failure = fail(pool, 2, skip_in_one)
    assert failure.rank == 1
    assert "rank 1 has not entered and has already returned" in failure.summary


def test_refusal_of_all_ranks_is_no_failure(pool: GangPool) -> None:
    """The implementation's own words come out, and the gang is kept."""
    run(pool, 2, echo_payload)
    before = pool.gangs()[2, "gloo"]
    with pytest.raises(Refused, match=r"^pipelines are not supported$"):
        run(pool, 2, refuse, [0, 1])
    assert pool.gangs()[2, "gloo"] == before
    assert run(pool, 2, sum_ranks) == [3.0, 3.0]


def test_refusal_of_one_rank_is_a_failure(pool: GangPool) -> None:
    """A refusal that the other rank does not share would hang it; the text says so."""
    failure = fail(pool, 2, refuse, [1])
    assert (failure.kind, failure.rank) == ("raised", 1)
    assert "rank 1 refused NotSupported" in failure.summary


def test_unpicklable_result_is_the_ranks_error(pool: GangPool) -> None:
    """A result that cannot be sent is reported as raised, not as a death."""
    failure = fail(pool, 2, unpicklable)
    assert failure.kind == "raised"
    assert "lambda" in failure.summary


def test_unknown_task_is_the_ranks_error(pool: GangPool) -> None:
    """A task that does not exist is named."""
    with pytest.raises(RankFailure, match="No module named 'no_such_module'"):
        pool.run(2, "no_such_module:task", [None] * 2, LONG_S)


def test_rank_lost_while_idle_is_replaced(pool: GangPool) -> None:
    """A gang that lost a rank between runs is replaced, since no task is to blame."""
    run(pool, 2, echo_payload)
    victim = pool.gangs()[2, "gloo"][1]
    os.kill(victim, signal.SIGKILL)
    assert wait_gone([victim], LONG_S) == []
    assert run(pool, 2, sum_ranks) == [3.0, 3.0]
    assert victim not in pool.gangs()[2, "gloo"]


# --- the pool ------------------------------------------------------------------------------------


def test_least_recently_used_gang_makes_room(pool: GangPool) -> None:
    """With room for 8 ranks, a gang of 3 beside 2 and 4 ends the one not used for longest."""
    pool.end()
    for world in (2, 4, 2, 3):
        run(pool, world, echo_payload)
    assert list(pool.gangs()) == [(2, "gloo"), (3, "gloo")]


@pytest.mark.parametrize("world", [0, 9])
def test_world_that_does_not_fit_is_refused(pool: GangPool, world: int) -> None:
    """The limit and the world are named."""
    with pytest.raises(UsageError, match=rf"max_live_ranks = 8 \(got {world}\)"):
        pool.run(world, named(echo_payload), [None] * world, LONG_S)


def test_payloads_must_fit_the_world(pool: GangPool) -> None:
    """One payload for two ranks is a mistake of the caller."""
    with pytest.raises(UsageError, match=r"world 2 needs as many payloads \(got 1\)"):
        pool.run(2, named(echo_payload), [None], LONG_S)


def test_nccl_without_devices_says_so(pool: GangPool) -> None:
    """A missing device is told apart from a failure, and no rank is started."""
    with pytest.raises(DeviceUnavailableError, match="2 devices needed, 0 visible"):
        pool.run(2, named(echo_payload), [None] * 2, LONG_S, backend="nccl")


def test_warm_starts_without_waiting(pool: GangPool) -> None:
    """A gang asked for ahead is the one that runs."""
    pool.end()
    pool.warm(2)
    assert list(pool.gangs()) == [(2, "gloo")]
    assert run(pool, 2, sum_ranks) == [3.0, 3.0]


def test_two_pools_do_not_meet_and_close_ends_all(pool: GangPool) -> None:
    """Both answer in turn; closing one ends its ranks, its server and its folder only."""
    with GangPool(PRELOAD[:2]) as other:
        assert run(other, 2, sum_ranks) == run(pool, 2, sum_ranks) == [3.0, 3.0]
        ours, theirs = pool.gangs()[2, "gloo"], other.gangs()[2, "gloo"]
        server = run(other, 2, server_pid)[0]
        assert set(ours).isdisjoint(theirs)
    assert wait_gone([*theirs, server], 5.0) == []
    run(pool, 2, echo_payload)
    assert pool.gangs()[2, "gloo"] == ours


def test_killed_server_is_replaced(tmp_path: Path) -> None:
    """After the server's death the next run starts another; its ranks do not stay."""
    with GangPool(PRELOAD[:2], log_dir=tmp_path / "logs") as pool:
        server = run(pool, 2, server_pid)[0]
        ranks = pool.gangs()[2, "gloo"]
        os.kill(server, signal.SIGKILL)
        assert wait_gone([server], LONG_S) == []
        assert run(pool, 2, sum_ranks) == [3.0, 3.0]
        assert wait_gone(ranks, 5.0) == []
    assert len(list((tmp_path / "logs").iterdir())) == 4


def test_module_that_cannot_be_preloaded_is_named() -> None:
    """A broken preload is an error of the infrastructure with the module's name."""
    with (
        GangPool(("no_such_module",)) as broken,
        pytest.raises(InfrastructureError, match="cannot preload 'no_such_module'"),
    ):
        run(broken, 2, echo_payload)


PARENT = """
import json, sys
from parity.gang import GangPool
pool = GangPool(("torch", "torch.distributed"))
server = pool.run(3, "tests.parity.test_gang:server_pid", [None] * 3, 60)[0]
print(json.dumps([server, *pool.gangs()[3, "gloo"]]), flush=True)
pool.run(3, "tests.parity.test_gang:" + sys.argv[1], [None] * 3, 3600)
"""


@pytest.mark.parametrize(
    ("task", "with_server"), [(hold_interpreter_in_one, False), (sleep_in_one, True)]
)
def test_no_process_outlives_a_killed_parent(
    task: Callable[..., Any], with_server: bool, tmp_path: Path
) -> None:
    """The server ends even ranks that hold the interpreter; without it each rank ends itself."""
    command = [sys.executable, "-c", PARENT, task.__name__]
    own = {**os.environ, "TMPDIR": str(tmp_path)}  # where both are killed, nobody tidies up
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=own) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert len(pids) == 4
        parent.send_signal(signal.SIGSTOP)  # or it would see the server's death and clean up
        if with_server:
            os.kill(pids[0], signal.SIGKILL)
        parent.kill()
        parent.wait()
        assert wait_gone(pids, 5.0) == []
    assert with_server or list(tmp_path.iterdir()) == []


def test_importing_the_pool_is_cheap() -> None:
    """The caller starts the server before it imports torch itself."""
    code = "import sys, parity.gang; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_worn_out_gang_is_replaced() -> None:
    """After so many runs other processes answer."""
    with GangPool(PRELOAD[:2], max_live_ranks=2, runs_a_gang=2) as pool:
        pids = [tuple(pool.run(2, f"{__name__}:own_pid", [None] * 2, 20.0)) for _ in range(5)]
    assert pids[0] == pids[1] != pids[2]
    assert pids[2] == pids[3] != pids[4]
