"""`python -m tests.mutation`: judge every mutant of fold_impl's core by exact cells, then by tests.

Owns the run and its report. Must not know how a mutant is made or judged. Easy to get wrong: a
mutant once explained as equivalent may be told by a later cell; then the explanation was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tomllib

from tests.mutation.judging import HERE, MODULES, ROOT, Verdict, judge, start
from tests.mutation.operators import mutants

LEAST = 0.95
"""Smallest share of the mutants that are not equivalent to be killed."""


def equivalents() -> list[dict[str, str]]:
    """Read the mutants that are explained as equivalent: `id` and `why`."""
    table = tomllib.loads((HERE / "equivalent.toml").read_text())
    return list(table.get("mutant", []))


def report(verdicts: Sequence[Verdict], known: Iterable[dict[str, str]], seconds: float) -> str:
    """Write the table of modules and the survivors, each with its explanation where it has one."""
    why = {entry["id"]: entry["why"] for entry in known}
    lines = [
        "# Mutants of fold_impl",
        "",
        "`make mutation`: every mutant is judged by the exact cells of tests/mutation/cells.toml,",
        "what these leave alive by the unit tests. Equivalent: explained in",
        "tests/mutation/equivalent.toml. Score: killed / (all - equivalent).",
        "",
        f"{len(verdicts)} mutants in {seconds:.0f} s.",
        "",
        "| module | mutants | killed by cells | by tests | equivalent | alive | score |",
        "|---|---|---|---|---|---|---|",
    ]
    names = [*dict.fromkeys(v.mutant.module for v in verdicts), "all"]
    for name in names:
        lines.append(_line(name, [v for v in verdicts if name in ("all", v.mutant.module)], why))
    alive = [v.mutant for v in verdicts if not v.killed_by]
    lines += [
        "",
        "## Survivors",
        "",
        "| where | kind | before | after | why |",
        "|---|---|---|---|---|",
    ]
    for m in alive:
        cells = (f"{m.module}.py:{m.line}", m.kind, f"`{m.before}`", f"`{m.after}`")
        text = " | ".join(c.replace("|", "\\|") for c in (*cells, why.get(m.id, "**alive**")))
        lines.append(f"| {text} |")
    return "\n".join(lines) + "\n"


def _line(name: str, verdicts: Sequence[Verdict], why: dict[str, str]) -> str:
    found = Counter(
        ("tests" if v.killed_by == "tests" else "cells")
        if v.killed_by
        else ("equivalent" if v.mutant.id in why else "alive")
        for v in verdicts
    )
    cells, by_tests = found["cells"], found["tests"]
    equal, alive = found["equivalent"], found["alive"]
    score = f"{_score(cells + by_tests, len(verdicts) - equal):.1%}"
    return f"| {name} | {len(verdicts)} | {cells} | {by_tests} | {equal} | {alive} | {score} |"


def _score(killed: int, of: int) -> float:
    return killed / of if of else 1.0


def main() -> int:
    """Run and write the report; 1 where too many live, or an explained one is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression over the mutants' ids")
    parser.add_argument("--out", type=Path, help="file of the report: standard output")
    given = parser.parse_args()
    chosen = [
        mutant
        for name in MODULES
        for mutant in mutants(name, (ROOT / f"fold_impl/{name}.py").read_text())
        if re.search(given.only, mutant.id)
    ]
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    verdicts = []
    with ProcessPoolExecutor(os.cpu_count(), context, start) as workers:
        for number, verdict in enumerate(workers.map(judge, chosen), start=1):
            verdicts.append(verdict)
            state = verdict.killed_by or "ALIVE"
            words = f"{number}/{len(chosen)} {verdict.seconds:.1f} s {verdict.mutant.id}: {state}"
            print(words, file=sys.stderr, flush=True)
    known = equivalents()
    text = report(verdicts, known, time.perf_counter() - begin)
    print(text) if given.out is None else given.out.write_text(text)
    ids = {entry["id"] for entry in known}
    killed = [v for v in verdicts if v.killed_by]
    wrong = [v.mutant.id for v in killed if v.mutant.id in ids]
    if wrong:
        print(f"explained as equivalent, and killed: {', '.join(wrong)}", file=sys.stderr)
    living = [v for v in verdicts if not v.killed_by and v.mutant.id not in ids]
    return int(bool(wrong) or _score(len(killed), len(killed) + len(living)) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
