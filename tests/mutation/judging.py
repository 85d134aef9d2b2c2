"""One mutant judged: exact cells until one fails, then the unit tests.

Owns a worker's judge. Must not know how a mutant is made, nor what is reported. Easy to get wrong:
a mutant that never ends is killed by the cells' deadline, and a rank that has imported the right
module would judge that one: every mutant gets ranks of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from parity import gang
from parity.case import Case
from parity.case_files import load_file
from parity.errors import InfrastructureError
from parity.failure import Refused
from parity.judge import Judge
from parity.store import FAILING, Row
from tests.mutation.operators import Mutant

MODULES = ("families", "dispatch", "reduce", "router", "moe", "layout")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS_DEADLINE_S = 120.0
_PYTEST = (
    "import sys, pytest; from tests.mutation import ranks; "
    "ranks.replace(None, (sys.argv[1], open(sys.argv[2]).read())); "
    "sys.exit(pytest.main(['-qx', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-k', "
    "'not megatron and not deepspeed', *sys.argv[3:]]))"  # other tables' oracles take long
)


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant; killed_by: id of a cell, `tests`, or empty."""

    mutant: Mutant
    killed_by: str
    seconds: float


class Worker:
    """A judge with the truths and baselines of the right program; one per process."""

    def __init__(self) -> None:
        """Prove that the right program passes every cell."""
        self.pool = gang.GangPool((*gang.PRELOAD, "torch._dynamo", "parity.threads"))
        self.judge = Judge(implementation="fold_impl", pool=self.pool)
        self.cells = load_file(HERE / "cells.toml")
        for case in self.cells:
            wrong = [row for row in self.judge.rows(case) if _tells(row)]
            assert not wrong, f"{case.id} fails without a mutant: {wrong[0]}"
        self.pool.end()

    def killed_by(self, name: str, source: str) -> str:
        """Give the id of the first cell that tells the mutant, or an empty string."""
        try:
            self.pool.run(1, "tests.mutation.ranks:replace", [(name, source)], 10.0)
        except InfrastructureError:
            return "import"
        try:
            return next((case.id for case in self.cells if self._fails(case)), "")
        finally:
            self.pool.end()

    def _fails(self, case: Case) -> bool:
        try:
            return any(_tells(row) for row in self.judge.rows(case))
        except (InfrastructureError, Refused):  # a rank raised, died, hung or refused
            return True


def _tells(row: Row) -> bool:
    return row.verdict in FAILING or (row.verdict == "skipped" and row.quantity is None)


_worker: list[Worker] = []


def start() -> None:
    """Make this process's worker."""
    _worker[:] = [Worker()]


def judge(mutant: Mutant) -> Verdict:
    """Run cell after cell until one fails, then the tests."""
    begin = time.perf_counter()
    name = f"fold_impl.{mutant.module}"
    killed_by = _worker[0].killed_by(name, mutant.source)
    if not killed_by and _tests_fail(name, mutant.source):
        killed_by = "tests"
    return Verdict(mutant, killed_by, time.perf_counter() - begin)


def _tests_fail(name: str, source: str) -> bool:
    """Run the module's own unit tests: refusals and tables that no cell reads."""
    tests = f"tests/fold_impl/test_{name.rpartition('.')[2]}.py"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        words = [sys.executable, "-c", _PYTEST, name, file.name, tests]
        try:
            done = subprocess.run(
                words, cwd=ROOT, capture_output=True, timeout=TESTS_DEADLINE_S, check=False
            )
        except subprocess.TimeoutExpired:
            return True
    return done.returncode != 0
