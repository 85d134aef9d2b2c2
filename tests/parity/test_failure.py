"""Root causes from hand-written reports: no process is started here."""

from __future__ import annotations

import json
import pickle
import threading

import pytest

from parity.errors import InfrastructureError
from parity.failure import (
    Collective,
    Died,
    Finding,
    Frame,
    Raised,
    RankFailure,
    State,
    all_refused,
    blame_frame,
    explain_hang,
    explain_stop,
    parse_records,
    parse_stacks,
)

RESET = "[/a/pair.cc:534] Connection closed by peer [127.0.0.1]:7595. This is typically caused ..."
C10D = "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
USER = Frame("/home/me/moe.py", 41, "combine")
REDUCE = Collective("all_reduce", "0", (0, 1, 2), 5)


def raised(rank: int, time_s: float, text: str, kind: str = "RuntimeError") -> Raised:
    """Build a report without frames."""
    return Raised(rank, time_s, ((kind, text),), "")


def waiting(rank: int, call: Collective, line: int = 7) -> State:
    """Build the state of a rank that has entered `call` and not left it."""
    assert call.group is not None
    assert call.seq is not None
    stack = (Frame("/home/me/train.py", line, "step"), Frame(C10D, 2900, call.op))
    return State(rank, stacks=(stack,), pending=(call,), entered={(call.group, call.seq): call})


def sleeping(rank: int, entered: dict[tuple[str, int], Collective] | None = None) -> State:
    """Build the state of a rank that stands in its own code."""
    return State(rank, stacks=((USER,),), entered={} if entered is None else entered)


def test_earliest_real_error_is_the_cause() -> None:
    """Of two real errors the one with the smaller time is shown, whatever came in first."""
    finding = explain_stop([raised(0, 9.0, "later"), raised(2, 8.0, "first", "ValueError")])
    assert (finding.kind, finding.rank) == ("raised", 2)
    assert finding.summary == (
        "rank 2 raised ValueError: first; folded away: rank 0 raised RuntimeError: later"
    )


def test_echo_is_folded_away_even_if_it_is_earlier() -> None:
    """A rank that lost its peer is never the cause while another rank has a reason of its own."""
    finding = explain_stop([raised(0, 1.0, RESET), raised(1, 1.2, "boom", "ValueError")])
    assert finding.rank == 1


@pytest.mark.parametrize(
    "text",
    [
        RESET,
        "[/x/pair.cc:152] Read error [127.0.0.1]:1445: Connection reset by peer.",
        "[/x/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete",
        "wait timeout after 500ms, keys: /default_pg/0//cpu//0/1",
        "NCCL communicator was aborted on rank 1.",
        "ncclRemoteError: remote process exited or there was a network error",
    ],
)
def test_known_echoes(text: str) -> None:
    """What Gloo, NCCL and the store say about a lost peer is an echo."""
    assert raised(0, 0.0, text).echo


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ValueError", "connection reset by peer"),
        ("RuntimeError", "expected scalar type Float but found Double"),
        ("RuntimeError", "CUDA out of memory"),
    ],
)
def test_near_misses_are_no_echoes(kind: str, text: str) -> None:
    """The words in another type of exception, or other words, make no echo."""
    assert not raised(0, 0.0, text, kind).echo


def test_error_raised_while_handling_an_echo_is_an_echo() -> None:
    """A wrapper around a lost connection does not become the cause."""
    wrapped = Raised(0, 1.0, (("EngineError", "step failed"), ("RuntimeError", RESET)), "")
    assert explain_stop([wrapped, raised(1, 2.0, "boom", "KeyError")]).rank == 1


def test_only_echoes_still_name_the_first() -> None:
    """Where nothing but echoes came, the earliest is shown rather than nothing."""
    assert explain_stop([raised(1, 3.0, RESET), raised(0, 2.0, RESET)]).rank == 0


def test_death_is_named_with_its_signal() -> None:
    """A rank killed by signal 9 is the cause and the memory killer is mentioned."""
    finding = explain_stop([raised(0, 1.0, RESET), Died(2, 1.1, -9, "last words")])
    assert (finding.kind, finding.rank, finding.exit_status) == ("died", 2, -9)
    assert finding.traceback == "last words"
    assert "rank 2 was killed by SIGKILL (out-of-memory killer" in finding.summary


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (7, "exited with status 7"),
        (-11, "was killed by SIGSEGV"),
        (-99, "was killed by signal 99"),
        (None, "died (exit status unknown)"),
    ],
)
def test_ends_in_words(status: int | None, text: str) -> None:
    """Exit statuses are named as the shell user knows them."""
    assert Died(0, 0.0, status).text == text


def test_death_noticed_late_outranks_what_it_caused() -> None:
    """An unknown complaint of a peer up to 0.25 s before the death is seen does not win."""
    peer = raised(0, 10.0, "unheard-of words about a peer")
    assert explain_stop([peer, Died(1, 10.2, -9)]).rank == 1
    assert explain_stop([peer, Died(1, 10.3, -9)]).rank == 0


def test_location_is_the_callers_line() -> None:
    """The line of an error inside torch is where the caller's own code called it."""
    inside = Frame("/v/lib/python3.11/site-packages/torch/nn/functional.py", 9, "linear")
    report = Raised(1, 0.0, (("RuntimeError", "shapes"),), "tb", (USER, inside))
    assert explain_stop([report]).location == "/home/me/moe.py:41"


def test_library_frames_alone_give_the_innermost() -> None:
    """A stack without any frame of the caller still gives a line; an empty one gives none."""
    library = Frame(threading.__file__, 1, "wait")
    assert blame_frame([library]) == library
    assert blame_frame([USER, library]) == USER
    assert blame_frame([]) is None


def test_an_installed_implementation_is_not_a_library_to_skip() -> None:
    """A line of DeepSpeed is named; the wrappers of its collectives are not."""
    line = Frame("/v/lib/python3.11/site-packages/deepspeed/runtime/engine.py", 3, "step")
    wrapper = Frame("/v/lib/python3.11/site-packages/deepspeed/comm/comm.py", 5, "all_reduce")
    assert blame_frame([USER, line, wrapper]) == line


def test_stop_says_what_the_others_wait_in() -> None:
    """Ranks still in a collective are named with it."""
    finding = explain_stop([raised(1, 0.0, "boom")], [waiting(0, REDUCE), waiting(2, REDUCE)])
    assert finding.collective == REDUCE
    assert "ranks 0 2 wait in all_reduce #5 of group '0' (ranks 0 1 2)" in finding.summary


def test_refusal_counts_only_on_every_rank() -> None:
    """One rank that does not refuse makes a failure that says so."""
    refusals = [Raised(r, 0.0, (("Refusal", "no pp"),), "", refusal=True) for r in (0, 1)]
    assert all_refused(refusals, 2)
    assert not all_refused(refusals, 3)
    finding = explain_stop(refusals, world=3)
    assert "must be raised on every rank alike; rank 2 did not" in finding.summary


def test_error_beside_refusals_is_the_cause() -> None:
    """A real error is shown before an earlier refusal that not all ranks share."""
    refusal = Raised(0, 0.0, (("Refusal", "no pp"),), "", refusal=True)
    assert explain_stop([refusal, raised(1, 5.0, "boom")], world=2).rank == 1


def test_laggard_is_the_member_that_has_not_entered() -> None:
    """Two ranks wait in #5; the third has entered up to #4 only and is the cause."""
    before = Collective("all_reduce", "0", (0, 1, 2), 4)
    states = [waiting(0, REDUCE), sleeping(1, {("0", 4): before}), waiting(2, REDUCE)]
    finding = explain_hang(states, 1.0)
    assert (finding.kind, finding.rank, finding.laggards) == ("hung", 1, (1,))
    assert (finding.location, finding.collective) == ("/home/me/moe.py:41", REDUCE)
    assert "rank 1 has not entered and stands at /home/me/moe.py:41 in combine" in finding.summary


def test_chain_of_waits_ends_at_the_rank_that_waits_for_nobody() -> None:
    """Ranks 2 and 3 wait for 0, which waits for 1: rank 1 is the cause, not rank 0."""
    world, pair = Collective("barrier", "0", (0, 1, 2, 3), 3), Collective("gather", "p", (0, 1), 1)
    states = [waiting(0, pair), sleeping(1), waiting(2, world), waiting(3, world)]
    finding = explain_hang(states, 1.0)
    assert (finding.rank, finding.laggards, finding.collective) == (1, (1,), pair)


def test_two_laggards_are_both_named() -> None:
    """Every rank that is missing and waits for nobody is a laggard."""
    assert explain_hang([waiting(0, REDUCE), sleeping(1), sleeping(2)], 1.0).laggards == (1, 2)


def test_rank_that_already_returned_can_be_the_laggard() -> None:
    """A rank that skipped the collective and finished is named as such, without a line."""
    gone = State(1, busy=False, stacks=((Frame("<string>", 1, "<module>"),),))
    finding = explain_hang([waiting(0, REDUCE), gone, waiting(2, REDUCE)], 1.0)
    assert (finding.rank, finding.location) == (1, None)
    assert "has already returned from the task" in finding.summary


def test_rank_without_a_record_is_a_laggard() -> None:
    """A rank whose watcher was mute cannot be shown to have entered."""
    mute = State(2, stacks=((USER,),), entered=None, note="its watcher did not answer")
    finding = explain_hang([waiting(0, REDUCE), waiting(1, REDUCE), mute], 1.0)
    assert (finding.rank, finding.location) == (2, USER.where)


def test_finished_collective_still_listed_does_not_hide_the_real_one() -> None:
    """The first pending call that lacks a member counts, not the oldest."""
    done = Collective("all_gather", "0", (0, 1, 2), 4)
    first = State(0, pending=(done, REDUCE), entered={("0", 4): done, ("0", 5): REDUCE})
    late = sleeping(1, {("0", 4): done})
    assert explain_hang([first, late, waiting(2, REDUCE)], 1.0).collective == REDUCE


def test_different_operations_at_one_number_blame_the_odd_rank() -> None:
    """Two ranks in all_reduce and one in barrier at #5: the third is odd."""
    odd = Collective("barrier", "0", (0, 1, 2), 5)
    finding = explain_hang([waiting(0, REDUCE), waiting(1, REDUCE), waiting(2, odd)], 1.0)
    assert finding.rank == 2
    assert "ranks disagree on #5 of group '0'" in finding.summary


def test_different_sizes_in_one_operation_blame_the_odd_rank() -> None:
    """All ranks are in the same all_reduce, one with another shape."""
    calls = [Collective("all_reduce", "0", (0, 1, 2), 5, f"[[{n}]]") for n in (4, 3, 4)]
    assert explain_hang([waiting(r, c) for r, c in enumerate(calls)], 1.0).rank == 1


def test_all_in_one_collective_without_disagreement() -> None:
    """Nobody is missing and nobody differs: the collective itself is said to hang."""
    finding = explain_hang([waiting(r, REDUCE) for r in range(3)], 1.0)
    assert "every rank is in all_reduce #5" in finding.summary


def test_crossed_waits_name_a_rank_and_its_collective() -> None:
    """Ranks 0 and 1 wait in different groups for one another; one of them is named."""
    a, b = Collective("all_reduce", "a", (0, 1), 1), Collective("all_reduce", "b", (0, 1), 1)
    finding = explain_hang([waiting(0, a), waiting(1, b)], 1.0)
    assert finding.laggards == (0, 1)
    assert finding.collective == b


def test_no_collective_at_all() -> None:
    """Where only own code hangs, the busy rank is named."""
    finding = explain_hang([State(0, busy=False), sleeping(1)], 2.5)
    assert finding.rank == 1
    assert finding.summary.startswith("no answer in 2.5 s: no rank waits in a collective; rank 1")


def test_stacks_alone_tell_the_laggard() -> None:
    """Without a flight record a rank whose stack is in no collective is the cause."""
    stack = (Frame("/home/me/train.py", 7, "step"), Frame(C10D, 2900, "all_reduce"))
    states = [State(r, stacks=(stack,), entered=None) for r in (0, 2)]
    finding = explain_hang([*states, State(1, stacks=((USER,),), entered=None)], 1.0)
    assert (finding.rank, finding.collective) == (1, Collective("all_reduce"))


def test_flight_records_are_read() -> None:
    """Retired entries were entered, others are pending too; a message counts no collective."""
    entry = {
        "process_group": ["0", "default_pg"],
        "collective_seq_id": 4,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": "gloo:all_reduce",
        "input_sizes": [[4]],
        "retired": True,
        "state": "scheduled",
    }
    then = {**entry, "collective_seq_id": 5, "retired": False}
    message = {**entry, "is_p2p": True, "profiling_name": "gloo:recv", "retired": False}
    texts = [json.dumps({"entries": [entry, then]}), json.dumps({"entries": [message]})]
    pending, entered = parse_records(texts, {"0": (0, 1)})
    reduce = Collective("all_reduce", "0", (0, 1), 5, "[[4]]")
    assert pending == (reduce, Collective("recv", "0", (0, 1), None, "[[4]]"))
    assert list(entered) == [("0", 4), ("0", 5)]


def test_faulthandler_text_is_read_current_thread_first() -> None:
    """The signalled thread comes first and its innermost frame last."""
    text = (
        "Thread 0x00007f01 (most recent call first):\n"
        '  File "/rank.py", line 9 in watch\n\n'
        "Current thread 0x00007f02 (most recent call first):\n"
        '  File "/moe.py", line 41 in combine\n'
        '  File "/train.py", line 7 in <module>\n'
    )
    assert parse_stacks(text) == (
        (Frame("/train.py", 7, "<module>"), Frame("/moe.py", 41, "combine")),
        (Frame("/rank.py", 9, "watch"),),
    )
    assert parse_stacks("") == ()


def test_failure_survives_pickling_and_ends_in_exit_code_3() -> None:
    """A worker can send the failure on; it is infrastructure, never a verdict on parity."""
    sent = RankFailure(Finding("hung", 1, "text", laggards=(1,)))
    failure = pickle.loads(pickle.dumps(sent))
    assert isinstance(failure, RankFailure)
    assert isinstance(failure, InfrastructureError)
    assert (str(failure), failure.rank, failure.laggards) == ("text", 1, (1,))
    assert failure.exit_code == 3


def test_ranks_that_are_threads_are_counted_where_they_stand() -> None:
    """One process, six ranks: no collective is blamed that one of them alone is in."""
    top = Frame("/site-packages/parity/threads.py", 60, "main")

    def standing(line: int, function: str) -> tuple[Frame, ...]:
        own = Frame("/repo/fold_impl/dispatch.py", line, function)
        torch = "/site-packages/torch/distributed/distributed_c10d.py"
        return top, own, Frame(torch, 1, "all_reduce")

    waiting_main = (Frame("/site-packages/parity/threads.py", 80, "run_ranks"),)
    stacks = (waiting_main, *[standing(149, "exchange")] * 5, standing(47, "backward"))
    finding = explain_hang([State(0, stacks=stacks)], 10.0)
    assert finding.summary == (
        "no answer in 10 s: ranks are threads here, 1 at /repo/fold_impl/dispatch.py:47 in "
        "backward, 5 at /repo/fold_impl/dispatch.py:149 in exchange"
    )
    assert finding.location == "/repo/fold_impl/dispatch.py:47"
