"""The parts of a rank that need no process: messages, reports, stacks, groups."""

from __future__ import annotations

import inspect
import os.path
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from parity.failure import State
from parity.rank import (
    OUT_OF_BAND_BYTES,
    Activity,
    Channel,
    RankRuntime,
    cores_of,
    encode,
    find,
    observe,
    report,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Give both ends of one channel."""
    a, b = (Channel(end) for end in socket.socketpair())
    yield a, b
    a.close()
    b.close()


def send_from_thread(channel: Channel, message: object) -> threading.Thread:
    """Send without waiting for the reader, as another process would."""
    thread = threading.Thread(target=channel.send, args=(encode(message),))
    thread.start()
    return thread


def test_message_arrives_as_sent(ends: tuple[Channel, Channel]) -> None:
    """Small and large arrays in nested containers come out equal and writable."""
    sent: dict[str, Any] = {"small": np.arange(3), "rest": ("a", None)}
    sent["large"] = np.arange(300_000, dtype=np.float64).reshape(3, -1)
    thread = send_from_thread(ends[0], sent)
    got = ends[1].receive(time.monotonic() + 5)
    thread.join()
    assert got["rest"] == ("a", None)
    np.testing.assert_array_equal(got["small"], [0, 1, 2])
    np.testing.assert_array_equal(got["large"], sent["large"])
    got["large"][0, 0] = 5.0
    got["small"][0] = 5


def test_large_arrays_travel_beside_the_pickle() -> None:
    """An array at the limit is a part of its own that shares the array's memory."""
    array = np.zeros(OUT_OF_BAND_BYTES, dtype=np.uint8)
    parts = encode({"at": array, "below": array[1:].copy()})
    assert len(parts) == 2
    array[7] = 9
    assert parts[1][7] == 9


def test_column_major_array_survives(ends: tuple[Channel, Channel]) -> None:
    """Memory order is no part of equality: a transposed large array arrives with its values."""
    sent = np.arange(40_000, dtype=np.float64).reshape(200, 200).T
    thread = send_from_thread(ends[0], sent)
    np.testing.assert_array_equal(ends[1].receive(time.monotonic() + 5), sent)
    thread.join()


def test_message_that_cannot_be_read_leaves_the_channel_in_step(
    ends: tuple[Channel, Channel],
) -> None:
    """The message after one that does not unpickle is received."""
    bad = encode("x")
    bad[0] = bad[0][:-3] + b"\xff" + bad[0][-2:]
    ends[0].send(bad)
    ends[0].send(encode("next"))
    with pytest.raises(UnicodeDecodeError):
        ends[1].receive(time.monotonic() + 5)
    assert ends[1].receive(time.monotonic() + 5) == "next"


def test_receive_gives_up_at_its_time(ends: tuple[Channel, Channel]) -> None:
    """Half a message is no message."""
    ends[0].sock.sendall(encode("hello")[0][:-1])
    with pytest.raises(TimeoutError):
        ends[1].receive(time.monotonic() + 0.05)


def test_send_gives_up_at_its_time(ends: tuple[Channel, Channel]) -> None:
    """A reader that does not read cannot hold up the sender."""
    with pytest.raises(TimeoutError):
        ends[0].send(encode(np.zeros(40_000_000, dtype=np.uint8)), time.monotonic() + 0.05)


def test_closed_end_is_an_end_of_file(ends: tuple[Channel, Channel]) -> None:
    """The other end gone is told apart from a late message."""
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive(time.monotonic() + 5)


def test_find_imports_the_named_function() -> None:
    """A task is named as module:function."""
    assert find("os.path:join") is os.path.join  # type: ignore[comparison-overlap]


def test_report_keeps_the_chain_and_the_lines() -> None:
    """An exception from another is reported with both, outermost first."""
    try:
        try:
            raise RuntimeError("inner")
        except RuntimeError as inner:
            raise ValueError("outer") from inner
    except ValueError as error:
        got = report(3, error)
    assert got.chain == (("ValueError", "outer"), ("RuntimeError", "inner"))
    assert got.frames[-1].function == "test_report_keeps_the_chain_and_the_lines"
    assert "raise ValueError" in got.traceback
    assert (got.rank, got.refusal) == (3, False)


def test_suppressed_context_is_left_out() -> None:
    """`raise ... from None` says that what was handled is not the reason."""
    error = ValueError("outer")
    error.__context__ = KeyError("fallback")
    assert len(report(0, error).chain) == 2
    error.__suppress_context__ = True  # what `from None` sets
    assert report(0, error).chain == (("ValueError", "outer"),)


def test_an_exception_that_cannot_say_itself_is_still_reported() -> None:
    """The rank must not end because an error's own `__str__` fails."""

    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    try:
        raise SilentError
    except SilentError as error:
        got = report(0, error)
    assert got.chain == (("SilentError", "(its __str__ raised RuntimeError)"),)
    assert "SilentError" in got.traceback


def test_refusal_is_known_by_its_attribute() -> None:
    """Any exception class with a true `refusal` is one, no base class is needed."""

    class NotTodayError(ValueError):
        refusal = True

    assert report(0, NotTodayError("no")).refusal


def test_observe_names_the_line_of_the_main_thread() -> None:
    """Asked from another thread, the main thread's own function is on the first stack."""
    states: list[State] = []
    main = Activity(2, threading.get_ident())
    here = inspect.currentframe()
    assert here is not None
    thread = threading.Thread(target=lambda: states.append(observe(main)))
    thread.start()
    thread.join()
    names = [frame.function for frame in states[0].stacks[0]]
    assert "test_observe_names_the_line_of_the_main_thread" in names
    assert (states[0].rank, states[0].busy) == (2, True)


def test_no_group_for_a_rank_that_is_no_member() -> None:
    """Only members make a group, so nothing is waited for here."""
    runtime = RankRuntime(0, 4, "gloo", torch.device("cpu"))
    assert runtime.new_group([1, 2]) is None


@pytest.mark.parametrize(
    ("world_size", "cores", "shares"),
    [
        (4, [1, 3], [[1], [1], [3], [3]]),
        (3, [0, 1], [[0], [0], [1]]),
        (2, [0, 1, 2, 3, 4], [[0, 1], [2, 3, 4]]),
        (1, [0, 1], [[0, 1]]),
        (3, [5], [[5], [5], [5]]),
    ],
)
def test_neighbours_share_a_core(
    world_size: int, cores: list[int], shares: list[list[int]]
) -> None:
    """Ranks take the cores in order: several to a core, or several cores to a rank."""
    assert [cores_of(rank, world_size, reversed(cores)) for rank in range(world_size)] == shares
