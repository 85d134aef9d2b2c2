"""The commands `parity faults list` and `parity faults run`.

Owns their options, what they print and their exit codes. Must not import torch before a command
needs it. Easy to get wrong: exit code 0 promises that *every* fault was killed and diagnosed.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.case_files import select
from parity.errors import InfrastructureError, UsageError, writing
from parity.fingerprint import cores

if TYPE_CHECKING:
    from parity.faults.catalogue import Fault
    from parity.faults.runs import Entry

SUITE = "faults"
FAULTS_A_JOB = 4
"""Faults that are worth a further process, which imports torch for some seconds."""


@click.group()
def faults() -> None:
    """Plant faults in the implementation and see that the comparison catches them."""


@faults.command(name="list")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
def list_faults(style: str) -> None:
    """List the faults: where they act, where they must show, what causes them."""
    from parity.faults.catalogue import FAULTS
    from parity.faults.runs import described, listing

    if style == "json":
        click.echo(json.dumps([described(fault) for fault in FAULTS], indent=2))
        return
    click.echo(listing(FAULTS))
    variants = sum(len(fault.variants) for fault in FAULTS)
    click.echo(f"\n{len(FAULTS)} faults, {variants} further amounts")


@faults.command(name="run")
@click.option("--fault", "ids", multiple=True, metavar="ID", help="This fault only; repeatable.")
@click.option(
    "--suite", default=SUITE, metavar="NAME", show_default=True, help="Cases to choose from."
)
@click.option(
    "--cases",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of case files.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where faults.json and faults.md go.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Faults at once; default: one a core."
)
@click.pass_context
def run(
    ctx: click.Context, /, ids: tuple[str, ...], suite: str, folder: Path | None, out: Path,
    jobs: int | None,
) -> None:  # fmt: skip
    """Run faults on the smallest sets of cases that must show them, and write the kill matrix.

    Exit code 0: every fault was killed and its true cause is in the printed set; 3 where a case
    ended in an error, which tells nothing; 1 otherwise.
    """
    chosen = _chosen(ids)
    cases = select((), suite=suite, folder=folder)
    with writing(f"--out {out}"):  # before hours of faults, not after
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    from parity.faults import runs

    jobs = jobs or min(cores(), -(-len(chosen) // FAULTS_A_JOB))
    start = time.perf_counter()
    entries = runs.run_faults(chosen, cases, jobs=jobs, done=_progress)
    runs.write(entries, chosen, out)
    for entry in entries:
        if not (entry.killed and entry.diagnosed):
            click.echo(_complaint(entry))
    click.echo(f"{runs.headline(entries)}; {time.perf_counter() - start:.0f} s in all")
    click.echo(f"report: {out / 'faults.md'}")
    held = all(entry.killed and entry.diagnosed for entry in entries)
    errored = any(entry.errored for entry in entries)
    ctx.exit(InfrastructureError.exit_code if errored else 0 if held else 1)


def _chosen(ids: tuple[str, ...]) -> list[Fault]:
    from parity.faults.catalogue import BY_ID, FAULTS

    unknown = [name for name in ids if name not in BY_ID]
    if unknown:
        raise UsageError(f"unknown fault {unknown[0]!r}; see `parity faults list`")
    return [BY_ID[name] for name in dict.fromkeys(ids)] or list(FAULTS)


def _progress(entry: Entry) -> None:
    said = "killed" if entry.killed else "ERROR" if entry.errored else "SURVIVED"
    told = "diagnosed" if entry.diagnosed else "not diagnosed"
    click.echo(f"{said:8} {told:13} {entry.id} {entry.seconds:.1f} s", err=True)


def _complaint(entry: Entry) -> str:
    if entry.errored:
        return f"{entry.id}: nothing is known: {', '.join(entry.errored)}"
    if not entry.killed:
        where = ", ".join(entry.survived) or "no case of the suite can show it"
        return f"{entry.id} survived: {where}"
    found = {c for e in entry.variants or (entry,) if not e.diagnosed for c in e.causes}
    printed = ", ".join(sorted(found)) or "none"
    return f"{entry.id}: true cause {entry.true_cause} is not among the printed ones: {printed}"
