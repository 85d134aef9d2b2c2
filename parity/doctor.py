"""Questions to this machine and installation: can the harness run here?

Owns the checks behind `parity doctor`. Must not print. Easy to get wrong: a missing GPU or
DeepSpeed is worth saying but is no fault, since native cases on Gloo need neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from parity import fingerprint
from parity.case_files import find_folder, load_folder
from parity.errors import ParityError

MIN_PYTHON, MIN_TORCH = (3, 10), (2, 9)
_START_LIMIT_S = 60.0
"""Longest start of one rank; a cold disk needs 5-10 s to import torch."""


class Check(NamedTuple):
    """One answer; `ok` None: said for information, nothing depends on it."""

    name: str
    ok: bool | None
    text: str


def checks(folder: Path | None, reports: Path) -> Iterator[Check]:
    """Ask everything, one answer at a time, since the later ones take seconds."""
    questions: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _torch,
        _deepspeed,
        _machine,
        lambda: _cases(folder),
        lambda: _reports(reports),
        _implementations,
        _ranks,
    )
    for question in questions:
        yield from question()


def _python() -> Iterator[Check]:
    ok = sys.version_info >= MIN_PYTHON
    wanted = "" if ok else f", needed: {'.'.join(map(str, MIN_PYTHON))} or later"
    yield Check("python", ok, f"{sys.version.split()[0]} at {sys.executable}{wanted}")


def _torch() -> Iterator[Check]:
    try:
        import torch
        import torch.distributed as dist
    except Exception as problem:  # a broken installation fails in any way it likes
        yield Check("torch", False, f"cannot be imported: {problem}")
        return
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    wanted = "" if found >= MIN_TORCH else f", needed: {'.'.join(map(str, MIN_TORCH))} or later"
    yield Check("torch", found >= MIN_TORCH, f"{torch.__version__}{wanted}")
    gloo = dist.is_available() and dist.is_gloo_available()
    yield Check("gloo", gloo, "available" if gloo else "missing from this build of torch")
    nccl = dist.is_available() and dist.is_nccl_available()
    text = "available" if nccl else "missing from this build of torch: cases on NCCL are skipped"
    yield Check("nccl", True if nccl else None, text)


def _deepspeed() -> Iterator[Check]:
    version = fingerprint.versions()["deepspeed"]
    text = version or "not installed: cases with its engine cannot run"
    yield Check("deepspeed", True if version else None, text)


def _machine() -> Iterator[Check]:
    cores, gpus = fingerprint.cores(), fingerprint.gpus()
    yield Check("cores", None, str(cores))
    yield Check("gpus", None, "; ".join(gpus) or "none")


def _cases(folder: Path | None) -> Iterator[Check]:
    try:
        found = find_folder(folder)
        cases = load_folder(found)
    except ParityError as problem:
        yield Check("cases", False, str(problem))
        return
    suites = sorted({case.suite for case in cases})
    yield Check("cases", True, f"{len(cases)} in {found} (suites: {', '.join(suites)})")


def _reports(folder: Path) -> Iterator[Check]:
    probe = folder / ".parity-doctor"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if made:
            folder.rmdir()
    except OSError as problem:
        yield Check("reports", False, f"{folder}: cannot be written: {problem.strerror}")
        return
    yield Check("reports", True, f"{folder}: writable")


def _implementations() -> Iterator[Check]:
    names = sorted(e.name for e in metadata.entry_points(group="parity.implementations"))
    text = ", ".join(names) or "none registered: install the project, or give module:attr"
    yield Check("implementations", bool(names) or None, text)


def _ranks() -> Iterator[Check]:
    """Start one real rank the way a run does and ask for its number."""
    from parity.gang import GangPool

    start = time.perf_counter()
    try:
        with GangPool(start_deadline_s=_START_LIMIT_S) as pool:
            answer = pool.run(1, "builtins:getattr", ["rank"], deadline_s=_START_LIMIT_S)
    except Exception as problem:  # whatever it is, it is the finding
        yield Check("ranks", False, f"a rank did not start: {problem}")
        return
    assert answer == [0], f"a world of one rank answered {answer}"
    yield Check("ranks", True, f"forkserver and one rank in {time.perf_counter() - start:.1f} s")
