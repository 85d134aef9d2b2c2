"""Many run directories -> trends: margin, noise, time, and the first bad commit of a cell.

Owns reading run directories from several places as one history, and which of them may go. Must not
judge: it keeps what runs said. Easy to get wrong: the same run may be there twice (an artifact
downloaded and a folder copied), and a copy may be shorter than its original; a run is known by the
`id` in its run.json, not by its path.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.errors import UsageError
from parity.report.cells import Cell, cells
from parity.store import FAILING, RESULTS, RunDirectory

if TYPE_CHECKING:
    import pandas as pd

NOISE_QUANTILE = 0.5
"""Noise is the median share of the threshold that passing gradients use."""
_TREND_COLUMNS = ("started", "commit", "implementation", "cells", "pass", "fail", "leak", "error",
                  "skipped", "margin", "noise", "seconds", "cold", "directory")  # fmt: skip


@dataclass(frozen=True)
class PastRun:
    """One run of the past."""

    id: str
    directory: Path
    commit: str
    started: datetime
    state: str
    about: dict[str, Any]
    cells: tuple[Cell, ...]
    num_rows: int


@dataclass(frozen=True)
class Turn:
    """A cell that fails in its newest run: where it still passed, and where it first did not."""

    case: str
    implementation: str
    last_good: str | None
    first_bad: str
    since: datetime
    verdict: str
    finding: str
    runs: int
    """Runs in a row in which it failed."""


# --- reading ------------------------------------------------------------------------------------


def find(folders: Sequence[Path]) -> list[Path]:
    """Find run directories: each folder itself, or those in it at any depth; links are left out.

    Raises:
        UsageError: a folder does not exist, or there is no run at all.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        results = [folder / RESULTS, *sorted(folder.rglob(RESULTS))]
        for path in results:
            inside = path.relative_to(folder).parts[:-1]
            linked = any(folder.joinpath(*inside[: n + 1]).is_symlink() for n in range(len(inside)))
            if path.is_file() and not linked:
                found[path.parent.resolve()] = None
    if not found:
        raise UsageError(f"no run directory in {', '.join(map(str, folders))}")
    return list(found)


def load(folders: Sequence[Path]) -> list[PastRun]:
    """Read every run once, oldest first; of two copies the one with more rows.

    Raises:
        UsageError: there is no run, or its results are no results.
    """
    runs: dict[str, PastRun] = {}
    for path in find(folders):
        run = _read(path)
        known = runs.get(run.id)
        if known is None or run.num_rows > known.num_rows:
            runs[run.id] = run
    return sorted(runs.values(), key=lambda run: (run.started, run.id))


def _read(path: Path) -> PastRun:
    directory = RunDirectory.open(path)
    rows, about = directory.rows(), directory.run()
    return PastRun(
        id=str(about.get("id") or _fallback_id(path)), directory=path,
        commit=str(about.get("commit") or "unknown"), started=_started(path, about),
        state=str(about.get("state") or "unknown"), about=about, cells=tuple(cells(rows)),
        num_rows=len(rows),
    )  # fmt: skip


def _fallback_id(path: Path) -> str:
    """Know a run without an id by its first row, which a shorter copy has too."""
    with (path / RESULTS).open("rb") as file:
        return hashlib.sha256(path.name.encode() + file.readline()).hexdigest()[:16]


def _started(path: Path, about: dict[str, Any]) -> datetime:
    """Give the start: what the run says, else its name, else the age of its file."""
    stamps = (str(about.get("started") or ""), path.name.partition("-")[0])
    for stamp, form in zip(stamps, ("", "%Y%m%dT%H%M%SZ"), strict=True):
        try:
            read = datetime.strptime(stamp, form) if form else datetime.fromisoformat(stamp)
        except ValueError:
            continue
        return read if read.tzinfo else read.replace(tzinfo=timezone.utc)
    return datetime.fromtimestamp((path / RESULTS).stat().st_mtime, timezone.utc)


# --- trends -------------------------------------------------------------------------------------


def trends(runs: Sequence[PastRun]) -> pd.DataFrame:
    """Give one line a run, oldest first.

    Returns:
        Columns `started, commit, implementation, cells, pass, fail, leak, error, skipped, margin,
        noise, seconds, cold, directory`: margin is the largest share of a threshold that a passing
        entry uses, noise the median share of passing gradients, seconds the median of a cell.
    """
    import pandas as pd

    entries, per_cell = _entry_frame(runs), _cell_frame(runs)
    passing = entries[entries["verdict"] == "pass"]
    gradients = passing[passing["quantity"] == "gradient"]
    table = pd.DataFrame(
        [
            {"id": run.id, "started": run.started, "commit": run.commit,
             "directory": str(run.directory), "cold": (run.about.get("seconds") or {}).get("cold"),
             "implementation": ", ".join(sorted({cell.implementation for cell in run.cells}))}
            for run in runs
        ]
    ).set_index("id")  # fmt: skip
    verdicts = pd.crosstab(per_cell["id"], per_cell["verdict"])
    for verdict in ("pass", "fail", "leak", "error", "skipped"):
        found = verdicts.get(verdict, 0)
        table[verdict] = pd.Series(found, index=table.index).fillna(0).astype(int)
    table["cells"] = per_cell.groupby("id").size().reindex(table.index, fill_value=0)
    table["margin"] = passing.groupby("id")["used"].max()
    table["noise"] = gradients.groupby("id")["used"].quantile(NOISE_QUANTILE)
    table["seconds"] = per_cell.groupby("id")["seconds"].median()
    return table.reset_index()[list(_TREND_COLUMNS)]


def _entry_frame(runs: Iterable[PastRun]) -> pd.DataFrame:
    import pandas as pd

    lines = [
        (run.id, entry.quantity, entry.verdict, entry.used)
        for run in runs for cell in run.cells for entry in cell.entries
    ]  # fmt: skip
    frame = pd.DataFrame(lines, columns=["id", "quantity", "verdict", "used"])
    return frame.astype({"used": "float64"})


def _cell_frame(runs: Iterable[PastRun]) -> pd.DataFrame:
    import pandas as pd

    lines = [(run.id, cell.verdict, cell.seconds) for run in runs for cell in run.cells]
    frame = pd.DataFrame(lines, columns=["id", "verdict", "seconds"])
    return frame.astype({"seconds": "float64"})


def turns(runs: Sequence[PastRun]) -> list[Turn]:
    """Find the cells that fail now, and the commit at which each began to.

    A run in which a cell was skipped or not selected says nothing about it.
    """
    from parity.report.tables import finding_of

    seen: dict[tuple[str, str], list[tuple[PastRun, Cell]]] = {}
    for run in runs:
        for cell in run.cells:
            if cell.verdict != "skipped":
                seen.setdefault((cell.case, cell.implementation), []).append((run, cell))
    found = []
    for (case, implementation), past in seen.items():
        streak = 0
        while streak < len(past) and past[-1 - streak][1].verdict in FAILING:
            streak += 1
        if streak:
            good = past[-1 - streak][0].commit if streak < len(past) else None
            first, now = past[-streak][0], past[-1][1]
            found.append(Turn(case, implementation, good, first.commit, first.started,
                              now.verdict, finding_of(now.bad), streak))  # fmt: skip
    return sorted(found, key=lambda turn: (turn.since, turn.case))


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw margin, noise, time and verdicts over the runs.

    Raises:
        UsageError: matplotlib is not installed, or the ending names no format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'foldparity[plot]'") from None

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    at = range(len(table))
    top.set_yscale("log")
    top.plot(at, table["margin"], marker="o", label="margin: largest share of a threshold")
    top.plot(at, table["noise"], marker=".", label="noise: median share, gradients")
    top.axhline(1.0, linestyle="--", color="tab:red", linewidth=1)
    middle.plot(at, table["seconds"], marker="o", label="median seconds of a cell")
    base = [0] * len(table)
    colours = {"pass": "tab:blue", "skipped": "tab:gray", "leak": "tab:orange", "fail": "tab:red",
               "error": "tab:purple"}  # fmt: skip
    for verdict, colour in colours.items():
        bottom.bar(at, table[verdict], bottom=base, color=colour, label=verdict)
        base = [low + int(count) for low, count in zip(base, table[verdict], strict=True)]
    bottom.set_xticks(list(at), [c[:9] for c in table["commit"]], rotation=60, fontsize=8)
    for axes in (top, middle, bottom):
        axes.legend(loc="best", fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as problem:
        raise UsageError(f"--plot {path}: {problem}") from None


# --- retention ----------------------------------------------------------------------------------


def superfluous(runs: Sequence[PastRun], keep: int) -> list[PastRun]:
    """Choose what may go: all but the newest `keep`, and but the witnesses of what fails now.

    A witness is the last good and the first bad run of a cell that fails in its newest run. A run
    still going on is never chosen.

    Args:
        runs: oldest first.
        keep: how many of the newest stay.
    """
    kept = {run.id for run in runs[len(runs) - min(keep, len(runs)) :]}
    for turn in turns(runs):
        past = [run for run in runs if any(_is_of(turn, cell) for cell in run.cells)]
        bad = next(index for index, run in enumerate(past) if run.started == turn.since)
        kept |= {run.id for run in past[max(0, bad - 1) : bad + 1]}
    return [run for run in runs if run.id not in kept and run.state != "running"]


def _is_of(turn: Turn, cell: Cell) -> bool:
    named = (cell.case, cell.implementation) == (turn.case, turn.implementation)
    return named and cell.verdict != "skipped"


def delete(runs: Iterable[PastRun]) -> None:
    """Remove run directories; anything that is none is left alone."""
    for run in runs:
        assert (run.directory / RESULTS).is_file(), f"{run.directory} is no run directory"
        shutil.rmtree(run.directory)
