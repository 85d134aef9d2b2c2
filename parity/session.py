"""One run of several cases: the judge and its ranks, what is recorded, how it ends.

Owns what the command line and the pytest plugin share. Must not parse or print. Easy to get
wrong: ranks start *before* this process imports torch, so that both imports go on at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
import statistics
import time
import traceback
import uuid
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from parity import crew
from parity.case import Case
from parity.case_files import find_folder
from parity.errors import InfrastructureError, UsageError
from parity.fingerprint import HostClock, commit, cores, fingerprint, versions, visible_gpus
from parity.known import Assessment, FailOn, KnownFindings, assess
from parity.report import ctrf, html, junit, markdown, tables
from parity.report.cells import cells
from parity.store import RUN, Row, RunDirectory, by_case, case_verdict, definition_of

DEFAULT_IMPLEMENTATION = "fold_impl"
MAX_LIVE_RANKS = 32
"""Ranks kept at once: gangs of 1, 2, 3, 4, 6 and 8 ranks, which a suite goes to and fro between."""
RUNS_ON_DEEPSPEED = 12
"""Runs after which ranks of DeepSpeed's own folding are forked afresh: each leaves its groups
behind, and forty of them cost 15 % more. On GPUs a new process costs its CUDA context."""
CASES_A_JOB = 16
"""Cases on threads that are worth a further process, which imports torch for some seconds."""
_EXTRAS = {"transformers": "models", "megatron": "megatron"}
"""Package that a case may need -> extra of this project that installs it."""


class Judging(Protocol):
    """What runs one case and compares it."""

    def rows(self, case: Case) -> Sequence[Row]:
        """Run the case on its ranks; errors of ranks and refusals come back as rows."""


class OpenJudge(Protocol):
    """How a judge and its ranks are had; tests put their own in the place of `open_judge`."""

    def __call__(
        self,
        implementation: str,
        device: str,
        first: Case,
        *,
        max_live_ranks: int,
        uses: Collection[str] = (),
    ) -> AbstractContextManager[Judging]:
        """Start the ranks of the first case and give the judge; `uses` of all cases to come."""


@contextlib.contextmanager
def open_judge(
    implementation: str,
    device: str,
    first: Case,
    *,
    max_live_ranks: int = MAX_LIVE_RANKS,
    uses: Collection[str] = (),
) -> Iterator[Judging]:
    """Start the ranks of the first case, give the judge, end every rank at the end."""
    from parity import gang, warm

    gpus = visible_gpus() if device == "cuda" else ()
    pool = gang.GangPool(
        warm.preload(implementation, {*uses_of([first]), *uses}),
        max_live_ranks=max_live_ranks,
        visible_devices=gpus,
        runs_a_gang=RUNS_ON_DEEPSPEED if (implementation, device) == ("deepspeed", "cpu") else None,
    )
    try:
        if device == "cpu" and first.engine.backend != "nccl":
            pool.warm(processes_of(first))
        import torch  # while the ranks do the same

        from parity.judge import Judge

        torch.set_num_threads(1)  # the judge's tensors are small, and ranks want the other cores
        yield Judge(implementation=implementation, pool=pool, device=device)
    finally:
        pool.close()


@dataclass(frozen=True)
class Finished:
    """One case that has been judged."""

    case: str
    rows: tuple[Row, ...]
    seconds: float
    definition: str | None = None
    """Hash of everything the case fixes, see `store.definition_of`."""
    absent: tuple[str, ...] = ()
    """Optional members that its implementation does not offer."""

    @property
    def verdict(self) -> str:
        """Give the verdict of the whole case."""
        return case_verdict(self.rows)


def implementation_of(cases: Iterable[Case]) -> str:
    """Name what the files of the cases are about.

    Raises:
        UsageError: they are about different ones.
    """
    named = sorted({case.implementation or DEFAULT_IMPLEMENTATION for case in cases})
    if len(named) > 1:
        text = f"the cases are about {' and '.join(named)}: give --implementation or --suite"
        raise UsageError(text)
    return named[0] if named else DEFAULT_IMPLEMENTATION


def judged(
    cases: Sequence[Case], implementation: str, device: str, jobs: int, opener: OpenJudge
) -> Generator[Finished, None, None]:
    """Judge the cases in one or several processes and give each when it is done.

    Several take worlds of threads first: the large ones, seconds on one core each, would leave the
    other cores idle at the end.

    Raises:
        UsageError: the run as a whole cannot work as asked for.
    """
    if jobs > 1:
        cases = sorted(cases, key=lambda case: case.engine.backend != "threads")
    ranks = max(MAX_LIVE_RANKS // jobs, *map(processes_of, cases), 1)
    uses = uses_of(cases)
    return crew.spread(
        cases,
        jobs,
        functools.partial(opener, implementation, device, max_live_ranks=ranks, uses=uses),
        functools.partial(judge_case, implementation=implementation),
        functools.partial(_lost, implementation=implementation),
    )


def _lost(case: Case, how: str, implementation: str) -> Finished:
    row = _error(case, implementation, f"the judge of the case died: {how}", {"kind": "harness"})
    return Finished(case.id, (row,), 0.0, definition_of(case))


def uses_of(cases: Iterable[Case]) -> set[str]:
    """Name the engines and models of the cases, which ranks inherit."""
    return {name for case in cases for name in (case.engine.name, case.model.name)}


def processes_of(case: Case) -> int:
    """Count the processes that a case's ranks are."""
    return 1 if case.engine.backend == "threads" else case.shape.world


def default_jobs(cases: Iterable[Case], device: str) -> int:
    """Give the number of judges at once that the cases keep the cores busy with.

    Ranks that are threads take turns on one core; ranks that are processes take all there are.
    """
    if device != "cpu":
        return 1
    on_one_core = sum(case.engine.backend == "threads" for case in cases)
    return max(1, min(cores(), on_one_core // CASES_A_JOB))


def judge_case(judge: Judging, case: Case, implementation: str) -> Finished:
    """Run one case; whatever goes wrong with it becomes its own row, and the run goes on.

    Raises:
        UsageError: the run as a whole cannot work as asked for.
    """
    start = time.perf_counter()
    try:
        rows = tuple(judge.rows(case))
        if not rows:
            rows = (_error(case, implementation, "the judge compared nothing", {}),)
    except UsageError:
        raise
    except InfrastructureError as failure:
        rows = (_error(case, implementation, str(failure), vars(failure)),)
    except Exception as failure:  # a defect of ours must not end the other cases
        where = {"kind": "harness", "traceback": traceback.format_exc()}
        reason = f"the harness failed: {type(failure).__name__}: {failure}"
        rows = (_error(case, implementation, reason, where),)
    absent = getattr(judge, "absent", ())  # known once ranks have answered
    return Finished(case.id, rows, time.perf_counter() - start, definition_of(case), absent)


def _error(case: Case, implementation: str, reason: str, about: Mapping[str, Any]) -> Row:
    if missing := re.search(r"No module named '(\w+)", reason):
        package, extra = missing[1], _EXTRAS.get(missing[1])
        wanted = f"'foldparity[{extra}]'" if extra else package
        reason = f"the case needs the package {package}: pip install {wanted}\n{reason}"
    known = ("kind", "rank", "traceback", "location", "collective")
    detail = {key: about[key] for key in known if about.get(key) is not None}
    return Row.of_case(case, implementation, verdict="error", reason=reason, detail=detail)


def exit_code(verdicts: Iterable[str]) -> int:
    """Give the exit code of SPEC section 4: 3 wins over 1, and nothing but skips is 5."""
    found = set(verdicts)
    if "error" in found:
        return 3
    if found & {"fail", "leak"}:
        return 1
    return 0 if "pass" in found else 5


def exit_code_of(
    rows: Iterable[Row], known: Assessment | None = None, fail_on: FailOn = "any"
) -> int:
    """Give the exit code for a set of rows; with `new`, known failures count as passes."""
    verdicts = {case: case_verdict(of_case) for case, of_case in by_case(rows).items()}
    if known is not None and fail_on == "new":
        verdicts |= {case: "pass" for case in known.marks if known.is_known(case)}
    return exit_code(verdicts.values())


@dataclass(frozen=True)
class Selection:
    """What was asked for; kept in run.json, so that a run can be resumed and a case rerun."""

    selectors: tuple[str, ...] = ()
    suite: str | None = None
    cases: str | None = None
    """Folder given by the user; None: found by the usual rule."""
    implementation: str = DEFAULT_IMPLEMENTATION
    device: str = "cpu"
    files: Mapping[str, str] | None = None
    """case id -> file, for cases that are in no folder of cases."""
    is_given: bool = False
    """Whether the user named the implementation, so that a command must, too; else the case files
    are about it."""
    seed: int | None = None
    """Drawn from in the place of the cases' own."""

    @classmethod
    def of(
        cls, cases: Sequence[Case], *, selectors: Sequence[str] = (), suite: str | None = None,
        folder: Path | None = None, implementation: str | None = None, device: str = "cpu",
        seed: int | None = None,
    ) -> Selection:  # fmt: skip
        """Note what was asked for and the cases that it chose; without a name theirs is judged.

        Raises:
            UsageError: the cases are about different implementations.
        """
        name = implementation or implementation_of(cases)
        return cls(
            tuple(selectors), suite, None if folder is None else str(folder), name, device,
            outside_files(cases, folder), is_given=implementation is not None, seed=seed,
        )  # fmt: skip

    @classmethod
    def from_run(cls, run: Mapping[str, Any]) -> Selection:
        """Read it back from run.json; what is missing has its default."""
        stored = run.get("selection") or {}
        known = {k: stored[k] for k in cls.__dataclass_fields__ if stored.get(k) not in (None, "")}
        other = known.get("implementation", DEFAULT_IMPLEMENTATION) != DEFAULT_IMPLEMENTATION
        is_given = stored.get("is_given", other)  # older runs do not say
        return cls(
            **{**known, "selectors": tuple(known.get("selectors", ())), "is_given": is_given}
        )

    def to_dict(self) -> dict[str, Any]:
        """Give it as a part of run.json."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def rerun(self, case: str) -> str:
        """Write the command that runs just one case again."""
        file = (self.files or {}).get(case)
        words = ["parity", "run", f"{file}::{case}" if file else case]
        if self.cases and not file:
            words += ["--cases", self.cases]
        if self.is_given:
            words += ["--implementation", self.implementation]
        if self.device != "cpu":
            words += ["--device", self.device]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        return shlex.join(words)

    def seeded(self, cases: Iterable[Case]) -> list[Case]:
        """Give the cases the seed that was asked for."""
        if self.seed is None:
            return list(cases)
        return [case.model_copy(update={"seed": self.seed}) for case in cases]


def outside_files(cases: Iterable[Case], folder: Path | None = None) -> dict[str, str]:
    """Map the cases that an id alone does not find to their files: those outside the folder."""
    try:
        found: Path | None = find_folder(folder).resolve()
    except UsageError:  # only files were chosen, and there is no folder
        found = None
    return {c.id: c.file for c in cases if Path(c.file).resolve().parent != found}


def check_resumable(run: Mapping[str, Any], path: Path, packages: Iterable[str] = ()) -> None:
    """Refuse to put rows of another program beside those of a run.

    Args:
        run: its run.json.
        path: its directory.
        packages: further packages whose versions count.

    Raises:
        UsageError: there is no run.json, or the commit or a version is another one now.
    """
    if not run:
        raise UsageError(f"{path / RUN}: missing, so what was asked for is lost: start a new run")
    then = {"commit": run.get("commit"), **(run.get("versions") or {})}
    now = {"commit": commit(), **versions(packages)}
    changed = [
        f"{name} {then[name]} then, {now[name]} now"
        for name in now if name in then and then[name] != now[name]
    ]  # fmt: skip
    if changed:
        text = "its rows and further ones would be of two programs: start a new run"
        raise UsageError(f"{path} cannot be resumed: {'; '.join(changed)}; {text}")


class Recorder:
    """The record of a run while it goes on: rows at once, report and run.json at the end."""

    def __init__(
        self, directory: RunDirectory, selection: Selection, command: str, *,
        kept: Sequence[Row] = (), started: float | None = None, is_default: bool = True,
        cases: Iterable[Case] = (), listed: KnownFindings | None = None,
    ) -> None:  # fmt: skip
        """Begin a record.

        Args:
            directory: where it goes.
            selection: what was asked for.
            command: the command line, for the reader of the report.
            kept: rows of a resumed run.
            started: `time.perf_counter()` at the start of the program.
            is_default: whether the directory is a default one, which `latest` points to.
            cases: what will be run, where that is known: a killed run still says what it meant.
            listed: the known findings.
        """
        self.directory, self.selection, self.command = directory, selection, command
        self.rows: list[Row] = list(kept)
        self._started = time.perf_counter() if started is None else started
        self.host = HostClock()
        self._seconds: dict[str, float] = {}
        self._cold_s: float | None = None
        self._is_default = is_default
        self._listed = listed or KnownFindings()
        self.known = Assessment()  # until it is closed
        self._fingerprint = fingerprint(self._listed.packages)
        before = directory.run()
        self._identity = {
            "id": before.get("id") or str(uuid.uuid4()),
            "started": before.get("started") or _now(),
        }
        self._definitions: dict[str, str] = dict(before.get("definitions") or {})
        self._absent: set[str] = set(before.get("absent") or ())
        self._definitions |= {case.id: definition_of(case) for case in cases}
        self._write_run("running")

    def add(self, finished: Finished) -> None:
        """Put the rows of a finished case on disk."""
        self.directory.append(finished.rows)
        self.rows += finished.rows
        self._absent |= {*finished.absent}
        if finished.verdict != "skipped":
            self._seconds[finished.case] = finished.seconds
        if finished.definition:
            self._definitions[finished.case] = finished.definition
        if self._cold_s is None:
            self._cold_s = time.perf_counter() - self._started

    def close(self, state: str) -> None:
        """Write report and run.json, and point `latest` here.

        Args:
            state: how the run ended; one that was "refused" before its first case leaves nothing.
        """
        try:
            if state == "refused" and not self.rows:
                self.directory.discard()
                return
            self.known = assess(self.rows, self._listed, self._fingerprint["versions"])
            self._write_run(state)
            write_report(self.directory, self.rows, self.known)
            if self._is_default:
                self.directory.link_latest()
        finally:
            self.directory.release()

    def exit_code(self, fail_on: FailOn = "any") -> int:
        """Give the exit code for everything recorded."""
        return exit_code_of(self.rows, self.known, fail_on)

    def _write_run(self, state: str) -> None:
        self.directory.write_run({
            "schema": 1,
            **self._identity,
            "state": state,
            **({} if state == "running" else {"ended": _now()}),
            "command": self.command,
            "selection": self.selection.to_dict(),
            "absent": sorted(self._absent),
            "counts": tables.counts(self.rows),
            "known": self.known.to_dict(),
            "seconds": self._times(),
            **self._fingerprint,
            "definitions": self._definitions,
        })  # fmt: skip

    def _times(self) -> dict[str, Any]:
        """Give the time to the first result (cold), and medians of the cases after it (warm).

        stolen_share: part of the cores' time that a virtual machine's host kept meanwhile.
        """
        warm = list(self._seconds.values())[1:]
        worlds: dict[str, list[float]] = {}
        for case, rows in by_case(self.rows).items():
            if case in self._seconds:
                world = str(max(row.shape["world"] for row in rows))
                worlds.setdefault(world, []).append(self._seconds[case])
        return {
            "total": time.perf_counter() - self._started,
            "stolen_share": self.host.share(),
            "cold": self._cold_s,
            "warm_median": statistics.median(warm) if warm else None,
            "median_by_world": {w: statistics.median(s) for w, s in sorted(worlds.items())},
        }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def write_report(
    directory: RunDirectory, rows: Sequence[Row], known: Assessment | None = None
) -> None:
    """Write every form of the report out of rows, run.json and what is known of the failures."""
    run = directory.run()
    rerun = Selection.from_run(run).rerun
    found = cells(rows)
    directory.write("report.md", markdown.render(rows, run, rerun, known))
    headline = tables.headline(rows, known)
    directory.write("report.html", html.render(found, run, rerun, headline, known))
    directory.write("junit.xml", junit.render(found, run, rerun))
    document = json.dumps(ctrf.document(found, run, rerun), indent=1, allow_nan=False)
    directory.write("ctrf.json", document + "\n")
