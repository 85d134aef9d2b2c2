"""Many runs: found once each, trends, first bad commit, what may go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parity import cli, history
from parity.errors import UsageError
from parity.store import Row
from tests.parity.example_rows import passing, row, scaled
from tests.parity.example_runs import case_of, directory, skipped

FOUR, EIGHT = case_of(4, 2, 4), case_of(8, 2, 4)
GOOD = [*passing(FOUR), *passing(EIGHT)]
BAD = [*scaled(FOUR), *passing(EIGHT)]


def run(folder: Path, day: int, rows: Sequence[Row], **about: Any) -> Path:
    """Write the run of one day of March."""
    given = {"id": f"run-{day}", "started": f"2026-03-{day:02}T02:00:00+00:00",
             "commit": f"commit{day:03}", **about}  # fmt: skip
    return directory(folder / f"202603{day:02}T020000Z-commit{day:03}", rows, **given)


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """Give six nights: two good, one that did not run FOUR, one that skipped it, two bad."""
    folder = tmp_path / "nights"
    folder.mkdir()
    for day, rows in enumerate(
        [GOOD, GOOD, passing(EIGHT), [*skipped(FOUR), *passing(EIGHT)], BAD, BAD], start=1
    ):
        run(folder, day, rows)
    (folder / "latest").symlink_to("20260306T020000Z-commit006")
    return folder


def test_runs_are_read_oldest_first(nights: Path) -> None:
    """A folder of runs is a history; the link `latest` is no run of its own."""
    runs = history.load([nights])
    assert [r.commit for r in runs] == [f"commit{day:03}" for day in range(1, 7)]


def test_a_run_may_be_given_itself(nights: Path) -> None:
    """DIR may be a run directory, and a folder may be given twice."""
    one = nights / "20260301T020000Z-commit001"
    assert [r.commit for r in history.load([one])] == ["commit001"]
    assert len(history.load([one, nights, nights])) == 6


def test_a_copy_counts_once_and_the_longer_one_wins(nights: Path, tmp_path: Path) -> None:
    """An artifact and a copied folder are merged, whatever they are called."""
    copied = tmp_path / "artifacts" / "1234" / "parity"
    shutil.copytree(nights / "20260301T020000Z-commit001", copied)
    with (copied / "results.jsonl").open("a") as file:
        file.writelines(r.to_json() + "\n" for r in passing(case_of(2)))
    (run_again,) = [r for r in history.load([nights, tmp_path]) if r.commit == "commit001"]
    assert run_again.directory == copied.resolve()
    assert len(run_again.cells) == 3


def test_two_runs_of_one_name_are_two(nights: Path, tmp_path: Path) -> None:
    """Two machines may start in the same second at the same commit."""
    other = tmp_path / "other"
    other.mkdir()
    run(other, 1, GOOD, id="another")
    assert len(history.load([nights, other])) == 7


def test_a_run_without_run_json_is_still_a_run(nights: Path) -> None:
    """A crash leaves rows; the start is in the name, and its copy counts once."""
    first = nights / "20260301T020000Z-commit001"
    (first / "run.json").unlink()
    shutil.copytree(first, nights / "copies" / first.name)
    runs = history.load([nights])
    assert len(runs) == 6
    assert runs[0].started.isoformat() == "2026-03-01T02:00:00+00:00"


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_no_run_is_a_usage_error(tmp_path: Path, folder: str) -> None:
    """A folder that is missing or holds no run is said."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no such folder|no run directory"):
        history.load([tmp_path / folder])


def test_trends_hold_margin_noise_and_time(tmp_path: Path) -> None:
    """Margin is the largest passing share, noise the median of passing gradients."""
    near = row(FOUR, "update", "dense", error=1.9e-6)  # half of 3.8e-6
    run(tmp_path, 1, [*passing(FOUR), near])
    run(tmp_path, 2, BAD)
    table = history.trends(history.load([tmp_path]))
    assert list(table["margin"]) == pytest.approx([0.5, 1e-7 / 3.8e-6])
    assert list(table["noise"]) == pytest.approx([1e-7 / 3.8e-6] * 2)
    assert list(table["seconds"]) == [0.05, 0.05]
    assert [list(table[v]) for v in ("cells", "pass", "fail")] == [[1, 2], [1, 1], [0, 1]]


def test_the_first_bad_commit_is_found(nights: Path) -> None:
    """Nights in which the cell did not run say nothing: good at 2, bad since 5."""
    (turn,) = history.turns(history.load([nights]))
    assert (turn.case, turn.last_good, turn.first_bad) == (FOUR.id, "commit002", "commit005")
    assert (turn.runs, turn.finding) == (2, "expert gradient x2.000 = tp")


def test_a_cell_that_was_fixed_is_not_failing(tmp_path: Path) -> None:
    """Only the newest run decides; one that always failed has no last good commit."""
    for day, rows in enumerate([BAD, GOOD], start=1):
        run(tmp_path / "fixed", day, rows)
        run(tmp_path / "never", day, BAD)
    assert history.turns(history.load([tmp_path / "fixed"])) == []
    (turn,) = history.turns(history.load([tmp_path / "never"]))
    assert (turn.last_good, turn.first_bad, turn.runs) == (None, "commit001", 2)


def test_witnesses_of_a_failure_stay(nights: Path) -> None:
    """With the newest one kept, the last good and the first bad run stay too."""
    gone = history.superfluous(history.load([nights]), keep=1)
    assert [r.commit for r in gone] == ["commit001", "commit003", "commit004"]


def test_a_run_that_goes_on_stays(tmp_path: Path) -> None:
    """Retention never takes the directory away from under a run."""
    run(tmp_path, 1, GOOD, state="running")
    run(tmp_path, 2, GOOD)
    assert history.superfluous(history.load([tmp_path]), keep=1) == []


# --- the command --------------------------------------------------------------------------------


def parity(*arguments: object) -> Any:
    """Run a command."""
    return CliRunner().invoke(cli.main, ["history", *map(str, arguments)])


def test_the_table_shows_runs_and_turns(nights: Path) -> None:
    """One line a run, and one for each cell that fails now."""
    done = parity(nights)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert sum("commit" in line and "2026-03-" in line for line in lines) == 6
    turn = next(line for line in lines if line.startswith(FOUR.id))
    assert turn.split()[-3:] == ["commit002", "commit005", "2"]


def test_json_and_csv_are_for_programs(nights: Path) -> None:
    """Both hold every run; --last keeps the newest."""
    found = json.loads(parity(nights, "--format", "json").stdout)
    assert len(found["runs"]) == 6
    assert found["failing"][0]["first_bad"] == "commit005"
    assert len(parity(nights, "--format", "csv", "--last", "2").stdout.splitlines()) == 3


def test_the_plot_is_a_picture(nights: Path, tmp_path: Path) -> None:
    """--plot draws the trends; an ending that names no format is a usage error."""
    pytest.importorskip("matplotlib")
    done = parity(nights, "--plot", tmp_path / "trend.svg")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "trend.svg").read_text()
    assert "<svg" in text
    assert parity(nights, "--plot", tmp_path / "trend.txt2").exit_code == 2


def test_nothing_is_deleted_unless_asked_twice(nights: Path) -> None:
    """--keep names what may go; --delete removes exactly that."""
    before = sorted(nights.iterdir())
    named = parity(nights, "--keep", "1")
    assert sorted(nights.iterdir()) == before
    done = parity(nights, "--keep", "1", "--delete")
    assert done.stdout == named.stdout
    assert [Path(line).name[-3:] for line in done.stdout.splitlines()] == ["001", "003", "004"]
    assert sorted(p.name[-3:] for p in nights.iterdir()) == ["002", "005", "006", "est"]
    assert parity(nights, "--delete").exit_code == 2
