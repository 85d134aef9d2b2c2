"""The command `parity`: commands, options, exit codes.

Owns parsing and printing only; results go to stdout, progress and logs to stderr. Must not import
torch, pandas or rich before a command needs them. Easy to get wrong: the exit code of a run is
that of everything in its directory, the rows of a resumed run included.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import click

from parity import __version__, cli_reports, registry
from parity.case import MAX_SEED, Case, flatten
from parity.case_files import (
    DEFAULT_SUITE,
    file_schema,
    find_folder,
    load_folder,
    run_order,
    select,
)
from parity.errors import (
    InfrastructureError,
    NothingSelectedError,
    ParityError,
    UsageError,
    writing,
)
from parity.fingerprint import commit
from parity.known import Assessment, FailOn, KnownFindings, assess
from parity.known import load as load_known
from parity.report import github, tables
from parity.session import (
    DEFAULT_IMPLEMENTATION,
    Finished,
    OpenJudge,
    Recorder,
    Selection,
    check_resumable,
    default_jobs,
    exit_code_of,
    judged,
    open_judge,
    write_report,
)
from parity.store import FAILING, Row, RunDirectory, definition_of

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: nothing is known about the cases that did not run."""
REPORTS = Path("reports")
_COLOURS = {"pass": "green", "fail": "red", "leak": "red", "error": "magenta", "skipped": "yellow"}


_ELSEWHERE = MappingProxyType({
    "calibrate": "parity.cli_suite", "compare": "parity.cli_reports",
    "completion": "parity.cli_reports", "explain": "parity.cli_explain",
    "faults": "parity.faults.commands", "history": "parity.cli_reports",
    "rank": "parity.cli_reports", "versions": "parity.cli_versions",
})  # fmt: skip
"""Command -> module that has it under its own name; imported when it is asked for."""


class _Commands(click.Group):
    """Group that ends with the exit code of our own errors, and with their message alone.

    Whatever else is raised says nothing about parity: it is 3, with a traceback if it is a defect.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(_ELSEWHERE[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a message may hold what is no text
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        pressed: list[int] = []
        try:
            with _noting_interrupts(pressed):
                return super().invoke(ctx)
        except ParityError as error:
            click.echo(f"parity: {error}", err=True)
            code = error.exit_code
        except KeyboardInterrupt:
            click.echo("parity: interrupted", err=True)
            code = INTERRUPTED
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except OSError as error:
            click.echo(f"parity: {error}", err=True)
            code = InfrastructureError.exit_code
        except Exception:  # whatever it is, 1 would say that something does not hold
            if pressed:
                click.echo("parity: interrupted", err=True)
                ctx.exit(INTERRUPTED)
            click.echo(f"parity: a defect of the harness\n{traceback.format_exc()}", err=True)
            code = InfrastructureError.exit_code
        ctx.exit(code)


@contextlib.contextmanager
def _noting_interrupts(pressed: list[int]) -> Iterator[None]:
    """Note every Ctrl-C: some imports swallow it, and what fails later for that is no defect."""

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    with _handling(signal.SIGINT, note):
        yield


@contextlib.contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal in another way for a block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


folder_option = click.option(
    "--cases", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of case files; default: ./cases, else the one that came with the package.",
)  # fmt: skip
suite_option = click.option(
    "--suite", metavar="NAME", help="Keep the cases of one suite.",
    shell_complete=cli_reports.complete_suites,
)  # fmt: skip

known_option = click.option(
    "--known", "known_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="List of known findings; default: the one of this project.",
)  # fmt: skip


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="parity")
def main() -> None:
    """Judge the gradients of folded mixture-of-experts training.

    Exit codes: 0 parity holds; 1 mismatch or precision leak; 2 usage, bad case or config;
    3 infrastructure (a rank died or hung; wins over 1); 5 nothing selected or all skipped.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # where a `module:attr` that is not installed is looked for, too


# --- run ----------------------------------------------------------------------------------------


@main.command()
@click.argument(
    "selectors", nargs=-1, metavar="[SELECTOR]...", shell_complete=cli_reports.complete_cases
)
@click.option(
    "--suite", metavar="NAME", help=f"Suite to run; default: {DEFAULT_SUITE}.",
    shell_complete=cli_reports.complete_suites,
)  # fmt: skip
@folder_option
@click.option(
    "--implementation", metavar="NAME|module:attr",
    help=f"What is judged; default: what the case file names, else {DEFAULT_IMPLEMENTATION}.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cpu.")
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), metavar="N",
    help="Draw weights and data from this seed, not from the cases' own.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Run directory; default: reports/<timestamp>-<commit>, linked from reports/latest.",
)  # fmt: skip
@click.option(
    "--format", "style", type=click.Choice(["table", "md", "json", "github"]), default="table",
    show_default=True, help="How the result is printed.",
)  # fmt: skip
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR",
    help="Finish a run that was cut off: its own selection, errored cases again.",
)  # fmt: skip
@click.option(
    "--fail-on", type=click.Choice(["any", "new"]), default="any", show_default=True,
    help="new: failures that are known findings do not count for the exit code.",
)  # fmt: skip
@known_option
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N",
    help="Cases judged at once; default: one, and one a core where ranks are threads.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress, nor remarks, on stderr.")
@click.pass_context
def run(
    ctx: click.Context, /, selectors: tuple[str, ...], suite: str | None, folder: Path | None,
    implementation: str | None, device: str | None, seed: int | None, out: Path | None, style: str,
    resume: Path | None, fail_on: FailOn, known_file: Path | None, jobs: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Run cases folded and not folded, compare them, and write a report.

    SELECTOR is a case id, a glob over ids, or a case file (FILE.toml or FILE.toml::GLOB). Ids and
    globs are looked up in every suite unless --suite names one.
    """
    started = time.perf_counter()
    kept: list[Row] = []
    listed = load_known(known_file)
    if resume is not None:
        if selectors or suite or folder or implementation or device or out or seed is not None:
            raise UsageError("--resume takes selection, implementation and device from its run")
        directory = RunDirectory.open(resume)
        directory.hold()
        selection, cases, kept = _resumed(directory, listed)
        _check_jobs(jobs, selection.device)
    else:
        suite = suite if selectors else suite or DEFAULT_SUITE
        cases = select(selectors, suite=suite, folder=folder)
        selection = Selection.of(
            cases, selectors=selectors, suite=suite, folder=folder,
            implementation=implementation, device=device or "cpu", seed=seed,
        )  # fmt: skip
        cases = selection.seeded(cases)
        registry.check(selection.implementation)
        _check_jobs(jobs, selection.device)
        directory = RunDirectory.create(out, root=REPORTS, commit=commit())
    done = {row.case for row in kept}
    recorder = Recorder(
        directory, selection, _command(), kept=kept, started=started,
        is_default=directory.path.parent.resolve() == REPORTS.resolve(), cases=cases, listed=listed,
    )  # fmt: skip
    opener: OpenJudge = ctx.obj or open_judge
    left = [case for case in run_order(cases) if case.id not in done]
    jobs = jobs or default_jobs(left, selection.device)
    progress = _Progress(len(cases), len(done), quiet)
    state = _run_cases(
        judged(left, selection.implementation, selection.device, jobs, opener), recorder, progress
    )
    code = recorder.exit_code(fail_on)
    print_run(recorder.rows, recorder.selection, directory, style, code, recorder.known)
    if not quiet and (stolen := recorder.host.note()):
        click.echo(f"parity: {stolen} during this run: times and deadlines mean little", err=True)
    ctx.exit(INTERRUPTED if state == "interrupted" else code)


def _check_jobs(jobs: int | None, device: str) -> None:
    if (jobs or 1) > 1 and device == "cuda":
        raise UsageError("--jobs: on GPUs one case runs at a time, as it takes every device")


def _resumed(
    directory: RunDirectory, listed: KnownFindings
) -> tuple[Selection, list[Case], list[Row]]:
    """Give what a run was about, and its rows that stay; a case that changed is done again."""
    run = directory.run()
    check_resumable(run, directory.path, listed.packages)
    selection = Selection.from_run(run)
    folder = None if selection.cases is None else Path(selection.cases)
    cases = selection.seeded(select(selection.selectors, suite=selection.suite, folder=folder))
    registry.check(selection.implementation)
    now, then = {case.id: definition_of(case) for case in cases}, run.get("definitions") or {}
    changed = [case for case, hashed in now.items() if then.get(case, hashed) != hashed]
    if changed:
        click.echo(f"parity: changed since, done again: {', '.join(changed)}", err=True)
    return selection, cases, directory.keep_finished(now)


def _command() -> str:
    return shlex.join(["parity", *sys.argv[1:]])


def _run_cases(
    results: Generator[Finished, None, None], recorder: Recorder, progress: _Progress
) -> str:
    """Record the cases one by one; the record is closed however this ends.

    Returns:
        "finished" or "interrupted".
    """
    state = "failed"
    try:
        with terminate_as_interrupt(), contextlib.closing(results), progress:
            for finished in results:
                recorder.add(finished)
                progress.show(finished)
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        click.echo("parity: interrupted, writing the report of what has finished", err=True)
    except UsageError:
        state = "refused"
        raise
    finally:
        recorder.close(state)
    return state


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that a job's time limit leaves a report behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(signal.SIGTERM, interrupt):
        yield


class _Progress:
    """Progress on stderr: a bar on a terminal, a line a case elsewhere, nothing if quiet."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("starting ranks", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, finished: Finished) -> None:
        """Say that one more case is done."""
        self._done += 1
        if self._quiet:
            return
        line = f"{finished.verdict:7} {finished.case} {finished.seconds:.2f} s"
        if self._bar is None:
            click.echo(f"[{self._done}/{self._total}] {line}", err=True)
            return
        self._bar.update(self._task, completed=self._done, description=finished.case)
        if finished.verdict in FAILING:
            self._bar.console.print(line, markup=False, highlight=False)


# --- printing a run -----------------------------------------------------------------------------


def print_run(
    rows: Sequence[Row], selection: Selection, directory: RunDirectory, style: str, code: int,
    known: Assessment,
) -> None:  # fmt: skip
    """Print the result of a run in one of the formats."""
    if style == "md":
        click.echo((directory.path / "report.md").read_text(encoding="utf-8"), nl=False)
    elif style == "json":
        click.echo(json.dumps(_summary(rows, selection, directory, code, known), indent=2))
    elif style == "github":
        _print_github(rows, selection, directory, known)
    else:
        click.echo(tables.terminal(rows, selection.rerun, paint=_painter(), known=known))
        if absent := directory.run().get("absent"):
            click.echo(f"not offered by {selection.implementation}: {', '.join(absent)}")
        click.echo(f"report: {directory.path / 'report.md'}")
        click.echo(f"page: {directory.path / 'report.html'}")


def _painter() -> Callable[[str], str]:
    """Colour verdicts; click strips colours where stdout is no terminal."""
    if os.environ.get("NO_COLOR"):
        return str
    return lambda text: click.style(text, fg=_COLOURS.get(text), bold=text in FAILING)


def _summary(
    rows: Sequence[Row], selection: Selection, directory: RunDirectory, code: int,
    known: Assessment,
) -> dict[str, Any]:  # fmt: skip
    """Sum a run up for another program; every row is in results.jsonl."""
    return {
        "schema": 1,
        "headline": tables.headline(rows, known),
        "exit_code": code,
        "directory": str(directory.path),
        "counts": tables.counts(rows),
        "known": known.to_dict(),
        "families": tables.family_lines(rows, known),
        "model": tables.model_lines(rows, known),
        "failures": [
            {"case": f.case, "verdict": f.verdict, "causes": list(f.causes), "rerun": f.rerun,
             "known": f.is_known, "rows": [row.to_dict() for row in f.rows]}
            for f in tables.failures(rows, selection.rerun, known=known)
        ],
    }  # fmt: skip


def _print_github(
    rows: Sequence[Row], selection: Selection, directory: RunDirectory, known: Assessment
) -> None:
    """Print annotations, and add the report to the step summary."""
    for line in github.annotation_lines(tables.failures(rows, selection.rerun, known=known)):
        click.echo(line)
    click.echo(tables.headline(rows, known))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        report = (directory.path / "report.md").read_text(encoding="utf-8")
        name = f"GITHUB_STEP_SUMMARY={summary}"
        with writing(name), open(summary, "a", encoding="utf-8") as file:
            file.write(github.summary(report))


# --- the other commands -------------------------------------------------------------------------


@main.command(name="list")
@click.argument(
    "selectors", nargs=-1, metavar="[SELECTOR]...", shell_complete=cli_reports.complete_cases
)
@suite_option
@folder_option
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
def list_cases(
    selectors: tuple[str, ...], suite: str | None, folder: Path | None, style: str
) -> None:
    """List cases; without a selector or a suite, all of them."""
    if selectors or suite:
        cases = select(selectors, suite=suite, folder=folder)
    else:
        cases = load_folder(find_folder(folder))
    if not cases:
        raise NothingSelectedError("no case in the folder")
    if style == "json":
        click.echo(json.dumps([_resolved(case) for case in cases], indent=2))
        return
    headers = ["case", "suite", "world", "tp", "dp", "ep", "etp", "edp", "engine", "optimizer",
               "dtype"]  # fmt: skip
    lines = [_flat_line(case) for case in cases]
    click.echo(tables.grid(lines, dict(zip(headers, headers, strict=True))))


def _flat_line(case: Case) -> dict[str, str]:
    layout = case.layout
    sizes = {axis: str(getattr(layout, axis)) for axis in ("world", "tp", "dp", "ep", "etp", "edp")}
    engine = {"engine": case.engine.name, "optimizer": case.optimizer.name}
    return {"case": case.id, "suite": case.suite, **sizes, **engine, "dtype": case.engine.dtype}


def _resolved(case: Case) -> dict[str, Any]:
    layout = case.layout
    derived = {"stage_size": layout.stage_size, "dp": layout.dp, "edp": layout.edp}
    return {**case.model_dump(mode="json"), "derived": derived}


@main.command()
@click.argument(
    "selector", metavar="CASE", required=False, shell_complete=cli_reports.complete_cases
)
@suite_option
@folder_option
@click.option("--matrix", is_flag=True, help="Show a suite's axes, cells and coverage instead.")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
def show(
    selector: str | None, suite: str | None, folder: Path | None, matrix: bool, style: str
) -> None:
    """Show one case with every default, the derived sizes and both rank tables."""
    if matrix == (selector is not None):
        raise UsageError("show takes either a case or --matrix (with --suite)")
    if selector is None:
        from parity import cli_suite

        cli_suite.print_matrix(suite, folder, style)
        return
    cases = select([selector], suite=suite, folder=folder)
    if len(cases) > 1:
        some = ", ".join(case.id for case in cases[:3])
        raise UsageError(f"{selector!r} names {len(cases)} cases, show takes one: {some}, ...")
    case = cases[0]
    groups = _rank_tables(case)
    if style == "json":
        click.echo(json.dumps({**_resolved(case), "groups": groups}, indent=2))
        return
    settings = {k: v for k, v in flatten(case.model_dump(mode="json")).items() if k != "id"}
    click.echo(f"{case.id}\n")
    click.echo("\n".join(f"  {key} = {json.dumps(value)}" for key, value in settings.items()))
    layout = case.layout
    click.echo(f"\n  derived: dp = {layout.dp}, edp = {layout.edp}")
    for view, axes in groups.items():
        click.echo(f"\n  {view} ranks")
        for axis, table in axes.items():
            rows = " | ".join(" ".join(map(str, group)) for group in table)
            click.echo(f"    {axis:3} {rows}")


def _rank_tables(case: Case) -> dict[str, dict[str, tuple[tuple[int, ...], ...]]]:
    layout = case.layout
    dense = {"tp": layout.groups("tp"), "dp": layout.groups("dp")}
    expert = {"ep": layout.groups("ep"), "etp": layout.groups("etp"), "edp": layout.groups("edp")}
    return {"dense": dense, "expert": expert}


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--format", "style", type=click.Choice(["table", "md", "json", "github"]), default="table",
    show_default=True,
)  # fmt: skip
@known_option
def report(folder: Path, style: str, known_file: Path | None) -> None:
    """Rebuild every report of a run directory from its results.jsonl, and print one."""
    directory = RunDirectory.open(folder)
    rows, about = directory.rows(), directory.run()
    known = assess(rows, load_known(known_file), about.get("versions") or {})
    write_report(directory, rows, known)
    print_run(rows, Selection.from_run(about), directory, style, exit_code_of(rows), known)


@main.command()
@click.option("--format", "style", type=click.Choice(["json", "md"]), default="json")
def schema(style: str) -> None:
    """Print the JSON schema of a case file, or the reference page made of it."""
    if style == "md":
        from parity.report.reference import page

        click.echo(page(), nl=False)
        return
    click.echo(json.dumps(file_schema(), indent=2))


@main.command()
@folder_option
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
@click.pass_context
def doctor(ctx: click.Context, /, folder: Path | None, style: str) -> None:
    """Say whether the harness can run here; exit 3 if it cannot."""
    from parity.doctor import Check, checks

    marks: Mapping[bool | None, str] = {True: "ok", False: "NO", None: "--"}
    found: list[Check] = []
    for check in checks(folder, REPORTS):
        found.append(check)
        if style == "table":
            click.echo(f"{marks[check.ok]:3} {check.name:16} {check.text}")
    healthy = all(check.ok is not False for check in found)
    if style == "json":
        listed = [check._asdict() for check in found]
        click.echo(json.dumps({"ok": healthy, "checks": listed}, indent=2))
    ctx.exit(0 if healthy else 3)
