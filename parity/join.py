"""One rank of a world that something else started: torchrun, Slurm, Kubernetes.

Owns joining by the env:// variables and handing tasks to ranks of other machines over the
rendezvous store. Must not know verdicts. Easy to get wrong: the baseline's world is smaller than
the folded one, so groups are made anew on the first ranks, and *every* rank drops its old one.

A rank that fails may leave others inside a collective: nothing more can run then, every further
case is an error, and the exit code is 3. For hangs that are named to the line, see `parity.gang`.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import registry
from parity.errors import InfrastructureError
from parity.failure import RankFailure, Refused, all_refused, explain_stop
from parity.rank import RankRuntime, find, report

if TYPE_CHECKING:
    from parity.case import Case
    from parity.judge import Later
    from parity.session import Selection

_IDLE = timedelta(days=1)
"""Longest wait for the next task: the launcher's own time limit is the real one."""
_LEAVE_S = 30.0
"""Longest wait for the others to leave, before the process that holds the store ends."""
_GRACE_S = 5.0
"""Time beyond a deadline in which the backend itself gives up and its error arrives."""


@dataclass
class Joined:
    """This process's place in the job, and the store all of its processes reach."""

    store: Any
    rank: int
    world_size: int
    device: str = "cpu"
    local_rank: int = 0
    _number: int = 0
    _runtime: RankRuntime | None = None
    _broken: str = ""

    @classmethod
    def from_environment(cls, device: str) -> Joined:
        """Meet the others at MASTER_ADDR and MASTER_PORT as RANK of WORLD_SIZE.

        Raises:
            InfrastructureError: a variable is missing, or the others did not come.
        """
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                   if key not in os.environ]  # fmt: skip
        if missing:
            raise InfrastructureError(
                f"{', '.join(missing)} not set: start every rank with torchrun, as in "
                "torchrun --nnodes 2 --nproc-per-node 4 ... -m parity rank CASE"
            )
        import torch
        from torch.distributed.rendezvous import rendezvous

        torch.set_num_threads(1)
        try:
            store, rank, world_size = next(iter(rendezvous("env://")))
        except (RuntimeError, ValueError) as problem:
            raise InfrastructureError(f"no rendezvous: {problem}") from None
        store.set_timeout(_IDLE)
        return cls(store, rank, world_size, device, int(os.environ.get("LOCAL_RANK", "0")))

    # rank 0

    def start(
        self, world: int, task: str, payloads: Sequence[Any], deadline_s: float,
        backend: str | None = None,
    ) -> Later:  # fmt: skip
        """Put off `run`: rank 0 is one of the ranks, nothing runs beside it."""
        from parity.judge import Later

        return Later(partial(self.run, world, task, payloads, deadline_s, backend))

    def run(
        self, world: int, task: str, payloads: Sequence[Any], deadline_s: float,
        backend: str | None = None,
    ) -> list[Any]:  # fmt: skip
        """Run `module:function` in the first `world` ranks; one result per rank, in order.

        Raises:
            RankFailure: a rank raised, or did not answer in time.
            Refused: every rank refused alike.
            InfrastructureError: the job is too small, or an earlier failure broke it.
        """
        if self._broken:
            raise InfrastructureError(f"the job cannot go on: {self._broken}")
        if world > self.world_size:
            raise InfrastructureError(f"needs {world} ranks, the job has {self.world_size}")
        self._number += 1
        order = (world, task, list(payloads), deadline_s, backend or "gloo")
        self.store.set(self._key("order"), pickle.dumps(order))
        answers = [self._perform(*order)]
        until = time.monotonic() + deadline_s + _GRACE_S
        answers += [self._answer(rank, until, deadline_s) for rank in range(1, world)]
        reports = [value for kind, value in answers if kind == "raised"]
        if reports and all_refused(reports, world):
            raise Refused(reports[0].chain[0][1])
        if reports:
            failure = RankFailure(explain_stop(reports, (), world))
            self._broken = str(failure).partition("\n")[0]
            raise failure
        return [value for _, value in answers]

    def _answer(self, rank: int, until: float, deadline_s: float) -> tuple[str, Any]:
        """Wait for the answer of another rank; silence is one too."""
        key = self._key(f"result/{rank}")
        try:
            self.store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
        except RuntimeError as problem:  # a timeout of the store, or the store is gone
            silence = TimeoutError(f"no answer in {deadline_s:g} s")
            silence.__cause__ = problem
            return "raised", replace(report(rank, silence), time_s=time.time())
        answer: tuple[str, Any] = pickle.loads(self.store.get(key))
        return answer

    def end(self) -> None:
        """Let every rank go; the store stays until they have."""
        self._number += 1
        self.store.set(self._key("order"), b"")
        if not self._broken:
            keys = [self._key(f"left/{rank}") for rank in range(1, self.world_size)]
            try:
                self.store.wait(keys, timedelta(seconds=_LEAVE_S))
            except RuntimeError:
                return
            self._drop()

    # the other ranks

    def serve(self) -> int:
        """Run tasks until rank 0 ends the job.

        Returns:
            The exit code.
        """
        while True:
            self._number += 1
            try:
                order = self.store.get(self._key("order"))
            except RuntimeError:  # rank 0 is gone, and its store with it
                return InfrastructureError.exit_code
            if not order:
                self._drop()
                self.store.set(self._key(f"left/{self.rank}"), b"1")
                return 0
            world, task, payloads, deadline_s, backend = pickle.loads(order)
            answer = self._perform(world, task, payloads, deadline_s, backend)
            if self.rank < world:
                self.store.set(self._key(f"result/{self.rank}"), pickle.dumps(answer))

    # every rank

    def _key(self, name: str) -> str:
        return f"parity/{self._number}/{name}"

    def _perform(
        self, world: int, task: str, payloads: Sequence[Any], deadline_s: float, backend: str
    ) -> tuple[str, Any]:
        """Do this rank's part, if it has one; ("done", result) or ("raised", report)."""
        try:
            runtime = self._joined(world, backend, deadline_s)
            if runtime is None:
                return "done", None
            return "done", find(task)(runtime, payloads[self.rank])
        except Exception as error:
            # monotonic clocks of two machines have nothing in common, their wall clocks nearly
            return "raised", replace(report(self.rank, error), time_s=time.time())

    def _joined(self, world: int, backend: str, deadline_s: float) -> RankRuntime | None:
        """Give this rank's place among the first `world`; None where it has none.

        init_process_group: world group over a prefix of the job's store; every one of the first
        `world` ranks must call.
        """
        known = self._runtime
        if known is not None and (known.world_size, known.backend) == (world, backend):
            return known
        self._drop()
        if self.rank >= world or backend == "threads":
            return RankRuntime(0, 1, backend, self._place("gloo")) if self.rank == 0 else None
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(world))
        dist.init_process_group(
            backend, store=PrefixStore(f"world/{self._number}", self.store),
            rank=self.rank, world_size=world, timeout=timedelta(seconds=deadline_s),
        )  # fmt: skip
        self._runtime = RankRuntime(self.rank, world, backend, self._place(backend), "joined")
        return self._runtime

    def _place(self, backend: str) -> Any:
        import torch

        if backend != "nccl":
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def _drop(self) -> None:
        import torch.distributed as dist

        if self._runtime is not None and dist.is_initialized():
            dist.destroy_process_group()
        self._runtime = None


def main(
    joined: Joined, selectors: Sequence[str], suite: str | None, folder: Path | None,
    implementation: str | None, out: Path | None,
) -> int:  # fmt: skip
    """Be one rank of the job; rank 0 chooses cases, judges, writes the run directory and prints.

    Returns:
        The exit code: that of the run on rank 0, else 0 if this rank did what it was told.
    """
    if joined.rank:
        return joined.serve()
    from parity.case_files import run_order, select
    from parity.session import Selection

    try:
        cases = run_order(select(selectors, suite=suite, folder=folder))
        selection = Selection.of(
            cases, selectors=selectors, suite=suite, folder=folder,
            implementation=implementation, device=joined.device,
        )  # fmt: skip
        registry.check(selection.implementation)
        return _judge(cases, selection, out, joined)
    finally:
        joined.end()


def _judge(cases: Sequence[Case], selection: Selection, out: Path | None, joined: Joined) -> int:
    import click

    from parity.fingerprint import commit
    from parity.judge import Judge
    from parity.known import load
    from parity.report import tables
    from parity.session import Recorder, judge_case
    from parity.store import RunDirectory

    root = Path("reports")
    directory = RunDirectory.create(out, root=root, commit=commit())
    command = f"parity rank {' '.join(selection.selectors)}, {joined.world_size} ranks"
    recorder = Recorder(
        directory, selection, command, is_default=out is None, cases=cases, listed=load()
    )
    judge = Judge(
        implementation=selection.implementation, pool=joined, device=selection.device,
        num_gpus=joined.world_size,
    )  # fmt: skip
    state = "failed"
    try:
        for case in cases:
            finished = judge_case(judge, case, selection.implementation)
            recorder.add(finished)
            click.echo(f"{finished.verdict:7} {case.id} {finished.seconds:.2f} s", err=True)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
    finally:
        recorder.close(state)
    click.echo(tables.terminal(recorder.rows, selection.rerun, known=recorder.known))
    click.echo(f"report: {directory.path / 'report.md'}")
    return recorder.exit_code()
