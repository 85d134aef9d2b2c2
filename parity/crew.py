"""Several processes that do one item of work after the other, each with a judge of its own.

Owns the processes, who gets which item, and their ends. Must not know what the work is. Easy to
get wrong: no worker may outlive a parent that was killed, and one that dies costs its item alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from parity.errors import InfrastructureError, ParityError

Tool = TypeVar("Tool")
Item = TypeVar("Item")
Result = TypeVar("Result")
END_S = 15.0
"""Longest wait for a worker to end its ranks."""


def spread(
    items: Iterable[Item],
    jobs: int,
    open_tool: Callable[[Item], AbstractContextManager[Tool]],
    work: Callable[[Tool, Item], Result],
    lost: Callable[[Item, str], Result],
) -> Generator[Result, None, None]:
    """Do every item in one of several processes and give the results as they come.

    Args:
        items: what there is to do, picklable; the first ones are begun first.
        jobs: number of processes; with one the work is done in this process.
        open_tool: called once a process with its first item; closed when it ends.
        work: does one item; it and `open_tool` are carried over by name.
        lost: gives the result of an item whose process died, from it and how the process ended.

    Raises:
        ParityError: what `open_tool` or `work` raised; nothing more is begun.
    """
    waiting = deque(items)
    if jobs == 1:
        with contextlib.ExitStack() as stack:
            if waiting:
                tool = stack.enter_context(open_tool(waiting[0]))
            for item in waiting:
                yield work(tool, item)
        return
    busy: dict[Connection, tuple[BaseProcess, Item]] = {}
    ended: list[BaseProcess] = []

    def hand_out(worker: tuple[Connection, BaseProcess] | None = None) -> None:
        if waiting:
            channel, process = worker or _start(open_tool, work)
            item = waiting.popleft()
            busy[channel] = process, item
            with contextlib.suppress(OSError):  # it died idle: heard of as the end of its channel
                channel.send(item)
        elif worker is not None:
            worker[0].close()
            ended.append(worker[1])

    try:
        for _ in range(min(jobs, len(waiting))):
            hand_out()
        while busy:
            for channel in wait(list(busy)):
                assert isinstance(channel, Connection)
                process, item = busy.pop(channel)
                try:
                    answer = channel.recv()
                except (EOFError, OSError):
                    process.join(END_S)
                    hand_out()
                    yield lost(item, f"its process ended with {process.exitcode}")
                    continue
                if isinstance(answer, ParityError):
                    channel.close()
                    ended.append(process)
                    raise answer
                hand_out((channel, process))  # it goes on while the caller looks at the answer
                yield answer
    finally:
        left = [process for process, _ in busy.values()]
        for process in left:
            process.terminate()
        until = time.monotonic() + END_S
        for process in [*ended, *left]:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()


def _start(open_tool: Any, work: Any) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # a fork would carry over threads of torch
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, open_tool, work))
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # also in the new process
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    theirs.close()
    return ours, process


def _serve(channel: Connection, open_tool: Any, work: Any) -> None:
    """Do items until the parent closes the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        tool = None
        while True:
            item = channel.recv()
            try:
                if tool is None:
                    tool = stack.enter_context(open_tool(item))
                channel.send(work(tool, item))
            except ParityError as error:
                channel.send(error)
            except Exception:  # also a result that cannot be sent
                text = f"a defect of the harness\n{traceback.format_exc()}"
                channel.send(InfrastructureError(text))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the ranks see their lifelines close
