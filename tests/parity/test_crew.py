"""Several judges at once: every item is done once, and a process that dies costs its own alone."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity import cli, crew
from parity.errors import InfrastructureError, UsageError
from parity.store import RunDirectory

LIMIT_S = 20.0


@contextlib.contextmanager
def opened(folder: Path, first: str) -> Iterator[Path]:
    """Note that a process began and that it ended in order."""
    (folder / f"begun-{os.getpid()}-{first}").touch()
    try:
        yield folder
    finally:
        (folder / f"ended-{os.getpid()}").touch()


def work(folder: Path, item: str) -> tuple[str, int]:
    """Do what the item says, and say who did it."""
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "refuse":
        raise UsageError("no such thing")
    if item == "defect":
        raise ZeroDivisionError("of ours")
    if item == "unspeakable":
        return item, threading.Lock()  # type: ignore[return-value]
    if item == "hang":
        (folder / f"hangs-{os.getpid()}").touch()
        time.sleep(600)
    if item.startswith("both"):  # until two processes are at it
        until = time.monotonic() + LIMIT_S
        (folder / f"at-{item}").touch()
        while len(list(folder.glob("at-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    return item, os.getpid()


def lost(item: str, how: str) -> tuple[str, int]:
    """Answer for a process that died."""
    return f"{item}: {how}", 0


def spread(folder: Path, items: list[str], jobs: int = 2) -> list[tuple[str, int]]:
    """Do the items."""
    return list(crew.spread(items, jobs, functools.partial(opened, folder), work, lost))


def alive(pid: int) -> bool:
    """Tell whether the process is there, and not just not yet waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Wait for something to become true."""
    until = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def test_two_processes_share_the_items(tmp_path: Path) -> None:
    """Each item is done once, by both processes, and each ends in order."""
    done = spread(tmp_path, ["both 1", "both 2", "a", "b"])
    assert sorted(item for item, _ in done) == ["a", "b", "both 1", "both 2"]
    assert len({pid for _, pid in done}) == 2
    assert os.getpid() not in {pid for _, pid in done}
    assert len(list(tmp_path.glob("ended-*"))) == len(list(tmp_path.glob("begun-*"))) == 2


def test_one_job_needs_no_process(tmp_path: Path) -> None:
    """In order, in this process; nothing is opened for nothing."""
    assert spread(tmp_path, ["a", "b"], jobs=1) == [("a", os.getpid()), ("b", os.getpid())]
    assert [f.name for f in tmp_path.glob("begun-*")] == [f"begun-{os.getpid()}-a"]
    assert spread(tmp_path, [], jobs=1) == spread(tmp_path, [], jobs=2) == []


def test_a_process_that_dies_costs_its_item_alone(tmp_path: Path) -> None:
    """Another takes its place."""
    done = {item for item, _ in spread(tmp_path, ["die", "a", "b", "c"])}
    assert done == {"die: its process ended with -9", "a", "b", "c"}


def test_what_a_process_raises_is_raised_here(tmp_path: Path) -> None:
    """Errors of use as they are, defects as such, with the lines they came from."""
    begin = time.monotonic()
    with pytest.raises(UsageError, match="no such thing"):
        spread(tmp_path, ["refuse", "a"])
    with pytest.raises(InfrastructureError, match="ZeroDivisionError: of ours"):
        spread(tmp_path, ["defect", "a"])
    with pytest.raises(InfrastructureError, match=r"[Cc]an't pickle|cannot pickle"):
        spread(tmp_path, ["unspeakable", "a"])
    assert time.monotonic() - begin < crew.END_S
    assert len(list(tmp_path.glob("ended-*"))) == len(list(tmp_path.glob("begun-*")))


def test_no_process_stays_when_the_caller_stops(tmp_path: Path) -> None:
    """A caller that wants no more, as after Ctrl-C, ends what is being done."""
    items = crew.spread(["a", "hang"], 2, functools.partial(opened, tmp_path), work, lost)
    next(items)
    wait_until(lambda: list(tmp_path.glob("hangs-*")), "nothing hangs")
    items.close()
    pids = {int(path.name.split("-")[1]) for path in tmp_path.glob("begun-*")}
    assert not any(alive(pid) for pid in pids)
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("ended-*")} == pids


def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Not even one that is busy."""
    code = (
        "from pathlib import Path; from tests.parity.test_crew import spread\n"
        f"if __name__ == '__main__': spread(Path({str(tmp_path)!r}), ['hang', 'hang'])"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], env=paths)
    try:
        wait_until(lambda: len(list(tmp_path.glob("hangs-*"))) == 2, "they do not hang")
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("hangs-*")]
    wait_until(lambda: not any(alive(pid) for pid in pids), "a process outlived its parent")


def test_parity_run_finds_the_same_with_two_judges(tmp_path: Path) -> None:
    """Same rows but for the times."""
    (tmp_path / "few.toml").write_text(
        'suite = "few"\n[base]\nengine = { backend = "threads", dtype = "float64" }\n'
        "[axes]\nfolding = [{ shape = { world = 2, tp = 2, ep = 2 } }, "
        "{ shape = { world = 3, tp = 3 } }]\n"
    )
    rows = {}
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        command = ["run", str(tmp_path / "few.toml"), "--jobs", jobs, "--out", str(out)]
        result = CliRunner().invoke(cli.main, command)
        assert result.exit_code == 0, result.output
        found = RunDirectory.open(out).rows()
        rows[jobs] = sorted(
            (r.case, r.against, r.quantity, r.tensor or "", r.step or 0, r.error or 0.0)
            for r in found
        )
    assert rows["1"] == rows["2"]
    assert len({row[0] for row in rows["1"]}) == 2


def test_gpus_are_for_one_case_at_a_time(tmp_path: Path) -> None:
    """Two judges would wait for one another's devices."""
    out = str(tmp_path / "out")
    command = ["run", "--suite", "seed", "--device", "cuda", "--jobs", "2", "--out", out]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 2
    assert "--jobs" in result.output
    assert not Path(out).exists()
