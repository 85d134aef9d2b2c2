"""The command `parity versions`: one suite on several versions of the judged package.

Owns parsing and printing, like `parity.cli`, which finds it here. Must not import torch: it judges
nothing itself.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import click
from packaging.requirements import Requirement

from parity import versions as matrix
from parity.case_files import DEFAULT_SUITE, select
from parity.cli import INTERRUPTED, terminate_as_interrupt
from parity.cli_reports import complete_suites
from parity.environments import InstallationError, pinned, prepare, versions_of
from parity.errors import writing
from parity.known import FailOn, KnownFindings, load
from parity.session import Selection

_INTERRUPTED = "interrupted"


@click.command()
@click.argument("requirements", nargs=-1, required=True, metavar="PACKAGE==VERSION...")
@click.option(
    "--suite", metavar="NAME", help=f"Suite to run; default: {DEFAULT_SUITE}.",
    shell_complete=complete_suites,
)  # fmt: skip
@click.option("--select", "selectors", multiple=True, metavar="SELECTOR", help="Only these cells.")
@click.option("--cases", "folder", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of case files.")  # fmt: skip
@click.option("--implementation", metavar="NAME|module:attr", help="What is judged.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Folder of a run directory per version; one that finished before is not run again. "
    "Default: reports/<timestamp>-versions.",
)  # fmt: skip
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where the environments stay; default: the user's cache folder.",
)  # fmt: skip
@click.option("--fail-on", type=click.Choice(["any", "new"]), default="any", show_default=True)
@click.option("--known", "known_file", type=click.Path(path_type=Path), metavar="FILE",
              help="List of known findings; default: the one of this project.")  # fmt: skip
@click.option("--format", "style", type=click.Choice(["md", "json"]), default="md")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def versions(
    ctx: click.Context, /, requirements: tuple[str, ...], suite: str | None,
    selectors: tuple[str, ...], folder: Path | None, implementation: str | None, device: str,
    out: Path | None, cache: Path | None, fail_on: FailOn, known_file: Path | None, style: str,
    quiet: bool,
) -> None:  # fmt: skip
    """Run the same cases on several versions of a package, each in an environment of its own.

    An environment holds the one version and takes everything else from the running one. Prints one
    table: versions across, cells down. Exit codes are those of `run`; 3 if a version could not be
    installed, after the others have run.
    """
    wanted = versions_of(requirements)
    listed = load(known_file)
    suite = suite if selectors else suite or DEFAULT_SUITE
    cases = select(selectors, suite=suite, folder=folder)
    selection = Selection.of(
        cases, selectors=selectors, suite=suite, folder=folder,
        implementation=implementation, device=device,
    )  # fmt: skip
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    asked = _Asked(
        selection=selection, out=out or Path("reports") / f"{stamp}-versions",
        cache=cache or _cache(), fail_on=fail_on,
        known_file=known_file, listed=listed, is_quiet=quiet,
    )  # fmt: skip
    with writing(f"--out {asked.out}"):  # before hours of runs, not after
        asked.out.mkdir(parents=True, exist_ok=True)
    columns: list[matrix.Column] = []
    with terminate_as_interrupt():
        for requirement in wanted:
            columns.append(asked.column(requirement))
            if columns[-1].problem == _INTERRUPTED:
                break
    code = matrix.exit_code(columns)
    command = shlex.join(["parity", *sys.argv[1:]])
    about = (wanted[0].name, command)
    table = matrix.markdown(columns, *about)
    document = json.dumps(matrix.to_dict(columns, *about, code), indent=1) + "\n"
    (asked.out / "versions.md").write_text(table, encoding="utf-8")
    (asked.out / "versions.json").write_text(document, encoding="utf-8")
    click.echo(document if style == "json" else table, nl=False)
    click.echo(f"table: {asked.out / 'versions.md'}", err=True)
    ctx.exit(INTERRUPTED if columns[-1].problem == _INTERRUPTED else code)


def _cache() -> Path:
    """Give the user's cache folder, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "foldparity" / "versions"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is wanted of every version."""

    selection: Selection
    out: Path
    cache: Path
    fail_on: FailOn
    known_file: Path | None
    listed: KnownFindings
    is_quiet: bool

    def column(self, requirement: Requirement) -> matrix.Column:
        """Run one version; whatever goes wrong with it is told in its column."""
        version = str(pinned(requirement))
        directory = self.out / f"{requirement.name}-{version}"

        def say(line: str) -> None:
            if not self.is_quiet:
                click.echo(f"{version} {line}", err=True)

        problem = None
        try:
            if not matrix.is_finished(directory, self.selection):
                say("is looked for, or installed")
                problem = self._run(requirement, directory, say)
        except InstallationError as failure:
            problem = str(failure)
            say(problem)
        except KeyboardInterrupt:
            problem = _INTERRUPTED
        return matrix.column_of(version, directory, self.listed, self.fail_on, problem)

    def _run(
        self, requirement: Requirement, directory: Path, say: Callable[[str], None]
    ) -> str | None:
        made = prepare(requirement, self.cache, os.environ)
        options = [] if self.known_file is None else ["--known", str(self.known_file)]
        variables = made.variables(os.environ)
        return matrix.run_version(made.python, variables, directory, self.selection, options, say)
