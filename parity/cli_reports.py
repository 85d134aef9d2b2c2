"""Commands about runs that have ended: compare, history, completion; and `rank`, for many nodes.

Owns parsing and printing, like `parity.cli`, which finds them here. Must not import torch or pandas
before a command needs them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parity.errors import UsageError, writing
from parity.report import tables

if TYPE_CHECKING:
    from parity.history import PastRun

_HISTORY_HEADERS = {
    "started": "started", "commit": "commit", "implementation": "implementation",
    "cells": "cells", "pass": "pass", "fail": "fail", "leak": "leak", "error": "error",
    "skipped": "skipped", "margin": "margin used", "noise": "noise", "seconds": "seconds",
}  # fmt: skip
_TURN_HEADERS = {
    "case": "failing cell", "implementation": "implementation", "finding": "finding",
    "last_good": "last good", "first_bad": "first bad", "runs": "runs",
}  # fmt: skip
_COUNTS = ("cells", "pass", "fail", "leak", "error", "skipped", "runs")
path_argument = click.Path(path_type=Path)


# --- compare ------------------------------------------------------------------------------------


@click.command()
@click.argument("base", type=path_argument, metavar="BASE")
@click.argument("head", type=path_argument, metavar="HEAD")
@click.option(
    "--format", "style", type=click.Choice(["md", "github", "json"]), default="md",
    show_default=True, help="github: with the marker of the comment that is updated in place.",
)  # fmt: skip
@click.option("--out", type=path_argument, metavar="FILE", help="Write there, not to stdout.")
@click.option(
    "--fail-on-margin", is_flag=True, help="A margin that shrank 1,000x is worse, not a note."
)
@click.pass_context
def compare(
    ctx: click.Context, /, base: Path, head: Path, style: str, out: Path | None,
    fail_on_margin: bool,
) -> None:  # fmt: skip
    """Print what got worse between two run directories; exit 1 if anything did."""
    from parity.report import compare as compared
    from parity.report.cells import cells
    from parity.session import Selection
    from parity.store import RunDirectory

    opened = [RunDirectory.open(path) for path in (base, head)]
    sides = [compared.Run(cells(one.rows()), one.run()) for one in opened]
    rerun = Selection.from_run(sides[1].about).rerun
    found = compared.compare(sides[0], sides[1], rerun)
    if style == "json":
        text = json.dumps(compared.to_dict(found), indent=2, allow_nan=False) + "\n"
    else:
        text = compared.markdown(found, github=style == "github")
    if out is None:
        click.echo(text, nl=False)
    else:
        with writing(f"--out {out}"):
            out.write_text(text, encoding="utf-8", errors="backslashreplace")
        click.echo(found.headline)
    ctx.exit(found.exit_code(fail_on_margin=fail_on_margin))


# --- history ------------------------------------------------------------------------------------


@click.command()
@click.argument("folders", nargs=-1, required=True, type=path_argument, metavar="DIR...")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N runs.")
@click.option("--plot", "picture", type=path_argument, metavar="FILE", help="PNG, SVG or PDF.")
@click.option(
    "--format", "style", type=click.Choice(["table", "md", "json", "csv"]), default="table",
    show_default=True,
)  # fmt: skip
@click.option(
    "--keep", type=click.IntRange(min=1), metavar="N",
    help="Say which runs may go if the newest N stay, and the witnesses of what fails now.",
)  # fmt: skip
@click.option("--delete", "is_deleting", is_flag=True, help="With --keep: remove them.")
def history(
    folders: tuple[Path, ...], last: int | None, picture: Path | None, style: str,
    keep: int | None, is_deleting: bool,
) -> None:  # fmt: skip
    """Show the trends of many runs: margin, noise, time, and when a cell began to fail.

    DIR is a run directory, or a folder of them at any depth; a run that is there twice counts once.
    """
    if is_deleting and keep is None:
        raise UsageError("--delete needs --keep N: how many of the newest runs stay")
    from parity import history as past

    runs = past.load(folders)
    if keep is not None:
        _retain(runs, keep, is_deleting)
        return
    shown = runs[-last:] if last else runs
    table = past.trends(shown)
    if picture is not None:
        past.plot(table, picture)
        click.echo(f"plot: {picture}", err=True)
    if style == "csv":
        click.echo(table.to_csv(index=False), nl=False)
        return
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    turned = [vars(turn) for turn in past.turns(runs)]
    if style == "json":
        click.echo(json.dumps({"runs": lines, "failing": turned}, indent=2, default=str))
        return
    _print_history(lines, turned, "github" if style == "md" else "simple")


def _print_history(
    lines: Sequence[dict[Any, Any]], turned: Sequence[dict[str, Any]], style: str
) -> None:
    told = [{**_counted(line), "started": f"{line['started']:%Y-%m-%d %H:%M}"} for line in lines]
    click.echo(tables.grid(told, _HISTORY_HEADERS, style=style))
    if not turned:
        click.echo("\nNo cell fails in its newest run.")
        return
    since = [{**_counted(turn), "last_good": turn["last_good"] or "none known"} for turn in turned]
    click.echo("\n" + tables.grid(since, _TURN_HEADERS, style=style))


def _counted(line: dict[Any, Any]) -> dict[Any, Any]:
    """Write counts as text: a number would be shown as a measured one."""
    return {key: str(value) if key in _COUNTS else value for key, value in line.items()}


def _retain(runs: Sequence[PastRun], keep: int, is_deleting: bool) -> None:
    from parity import history as past

    gone = past.superfluous(runs, keep)
    for run in gone:
        click.echo(str(run.directory))
    if is_deleting:
        with writing("what may go"):
            past.delete(gone)
    done = "removed" if is_deleting else "would be removed (--delete does it)"
    click.echo(f"{len(gone)} of {len(runs)} runs {done}", err=True)


# --- completion ---------------------------------------------------------------------------------


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print the completion script of a shell: eval "$(parity completion bash)"."""
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None, f"click knows {shell}"
    root = ctx.find_root().command
    click.echo(made(root, {}, "parity", "_PARITY_COMPLETE").source())


def complete_cases(_ctx: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    """Offer the ids of cases that begin with what was typed; nothing where cases are unreadable."""
    from parity.case_files import find_folder, load_folder
    from parity.errors import ParityError

    try:
        return [case.id for case in load_folder(find_folder()) if case.id.startswith(typed)]
    except ParityError:
        return []


def complete_suites(_ctx: click.Context, _parameter: click.Parameter, typed: str) -> list[str]:
    """Offer the suites of ./cases that begin with what was typed."""
    from parity.case_files import find_folder, load_folder
    from parity.errors import ParityError

    try:
        suites = sorted({case.suite for case in load_folder(find_folder())})
    except ParityError:
        return []
    return [suite for suite in suites if suite.startswith(typed)]


# --- rank ---------------------------------------------------------------------------------------


@click.command()
@click.argument(
    "selectors", nargs=-1, required=True, metavar="SELECTOR...", shell_complete=complete_cases
)
@click.option("--suite", metavar="NAME", help="Look ids and globs up in one suite.")
@click.option("--cases", "folder", type=path_argument, metavar="DIR", help="Folder of case files.")
@click.option(
    "--implementation", metavar="NAME|module:attr",
    help="What is judged; default: what the case file names, else fold_impl.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--out", type=path_argument, metavar="DIR", help="Run directory, written by rank 0.")
@click.pass_context
def rank(
    ctx: click.Context, /, selectors: tuple[str, ...], suite: str | None, folder: Path | None,
    implementation: str | None, device: str, out: Path | None,
) -> None:  # fmt: skip
    """Be one rank of a world that torchrun (or Slurm, Kubernetes) has started on many nodes.

    Every process runs the same command; rank 0 judges, writes and prints. A case whose world is
    larger than the job is an error, a smaller one runs on the first ranks.
    """
    from parity.join import Joined, main

    joined = Joined.from_environment(device)
    ctx.exit(main(joined, selectors, suite, folder, implementation, out))
