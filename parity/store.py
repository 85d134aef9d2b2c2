"""Results as JSON Lines: one `Row` a line, appended and flushed case by case; reading runs back.

Owns the row, the verdict of a case, and the run directory. Must not know torch or how a report
looks. Easy to get wrong: a number that is not finite is never written and never passes, and a
line cut off by a crash makes its case unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from parity.errors import UsageError, writing

if TYPE_CHECKING:
    from parity.case import Case

SCHEMA = 1
VERDICTS = ("error", "fail", "leak", "pass", "skipped")
"""Every verdict, the one that decides a case first; `skipped` decides only where all rows are."""
FAILING = ("error", "fail", "leak")
RESULTS, RUN, LATEST, LOCK = "results.jsonl", "run.json", "latest", ".lock"
_SHAPE = ("world", "pp", "tp", "dp", "ep", "etp", "edp")
_METRICS = ("ratio", "scale", "residual", "error", "threshold")
_OPTIONAL = ("reason", "detail")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison of one tensor (or of the whole model), or one errored or skipped case.

    A metric that is not finite becomes None, and a row that would have passed with it fails.
    """

    case: str
    implementation: str
    shape: dict[str, int]
    engine: dict[str, Any]
    against: str | None
    quantity: str | None
    family: str | None
    tensor: str | None
    step: int | None
    ratio: float | None
    scale: float | None
    residual: float | None
    error: float | None
    threshold: float | None
    verdict: str
    causes: Sequence[str]
    worst: dict[str, Any] | None
    seconds: float | None
    reason: str | None = None
    detail: dict[str, Any] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, f"verdict {self.verdict!r} is not one of {VERDICTS}"
        lost = [name for name in _METRICS if not _is_finite(getattr(self, name))]
        for name in lost:
            object.__setattr__(self, name, None)
        if lost and self.verdict in ("pass", "leak"):
            object.__setattr__(self, "verdict", "fail")
        if lost and self.reason is None:
            object.__setattr__(self, "reason", f"not finite: {', '.join(lost)}")
        object.__setattr__(self, "causes", tuple(self.causes))

    @classmethod
    def of_case(
        cls, case: Case, implementation: str, *, verdict: str, reason: str,
        detail: dict[str, Any] | None = None, seconds: float | None = None,
    ) -> Row:  # fmt: skip
        """Make the one row of a case that was skipped or errored as a whole."""
        return cls(
            case=case.id, implementation=implementation,
            shape=shape_of(case), engine=engine_of(case),
            against=None, quantity=None, family=None, tensor=None, step=None,
            ratio=None, scale=None, residual=None, error=None, threshold=None,
            verdict=verdict, causes=(), worst=None, seconds=seconds, reason=reason, detail=detail,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Give the keys of SPEC section 4 in their order; optional ones only where they speak."""
        strict: dict[str, Any] = _strict(self._named())
        return strict

    def _named(self) -> dict[str, Any]:
        row = {"schema": self.schema, **dict(zip(self.__slots__, _values(self), strict=True))}
        for name in _OPTIONAL:
            if row[name] is None:
                del row[name]
        return row

    def to_json(self) -> str:
        """Write the row as one line of strict JSON, without the line end."""
        try:
            return _STRICT.encode(self._named())
        except (TypeError, ValueError):  # a detail is not finite or no plain value: the slow way
            return _STRICT.encode(self.to_dict())

    def __reduce__(self) -> tuple[Callable[..., Row], tuple[Any, ...]]:
        return _of_values, _values(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Row:
        """Read a row back; keys of a later writer are left out.

        Raises:
            UsageError: the row is of another schema, or a key is missing or holds what is none.
        """
        if row.get("schema") != SCHEMA:
            raise UsageError(f"row of schema {row.get('schema')!r}; allowed: {SCHEMA}")
        if row.get("verdict") not in VERDICTS:
            allowed = ", ".join(VERDICTS)
            raise UsageError(
                f"verdict: no verdict (got {row.get('verdict')!r}); allowed: {allowed}"
            )
        try:
            read = _row_reader().validate_python(dict(row))
        except ValidationError as problem:
            raise UsageError(f"not a row of results: {_first(problem)}") from None
        if missing := [axis for axis in _SHAPE if axis not in read.shape]:
            raise UsageError(f"not a row of results: shape: lacks {', '.join(missing)}")
        return read

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read one line back."""
        row = json.loads(line)
        if not isinstance(row, dict):
            raise UsageError(f"not a row of results: {line[:80]!r}")
        return cls.from_dict(row)


_values = operator.attrgetter(*Row.__slots__)
_STRICT = json.JSONEncoder(allow_nan=False)


def _of_values(*values: Any) -> Row:
    """Make a row of what a row held; dataclasses' own way takes twice as long, for 10^5 of them."""
    row = object.__new__(Row)
    for name, value in zip(Row.__slots__, values, strict=True):
        object.__setattr__(row, name, value)
    return row


def _sharing(row: Row, shared: dict[Any, Any]) -> Row:
    """Let rows that say the same hold one object: a case has hundreds, a run 10^5 of them."""
    for name in ("shape", "engine"):
        value = getattr(row, name)
        object.__setattr__(row, name, shared.setdefault(json.dumps(value), value))
    for name in ("case", "implementation", "against", "quantity", "family", "tensor", "verdict"):
        value = getattr(row, name)
        object.__setattr__(row, name, shared.setdefault(value, value))
    return row


@functools.cache
def _row_reader() -> TypeAdapter[Row]:
    return TypeAdapter(Row)


def _first(problem: ValidationError) -> str:
    """Say the first thing that is wrong: key and what is the matter with it."""
    error = problem.errors(include_url=False)[0]
    key = ".".join(map(str, error["loc"]))
    return f"{key}: {error['msg']} (got {str(error['input'])[:80]!r})"


def shape_of(case: Case) -> dict[str, int]:
    """Give the `shape` of a case's rows, derived sizes included."""
    layout = case.layout
    return {key: getattr(layout, key) for key in _SHAPE}


def engine_of(case: Case) -> dict[str, Any]:
    """Give the `engine` of a case's rows; an engine without ZeRO stages counts as stage 0."""
    engine = case.engine
    return {
        "name": engine.name, "zero": engine.zero or 0, "gas": engine.gas, "clip": engine.clip,
        "dtype": engine.dtype, "optimizer": case.optimizer.name, "backend": engine.backend,
        "strategy": engine.strategy,
    }  # fmt: skip


_NO_PART_OF_A_CASE = {"id", "suite", "file", "deadline_s", "implementation"}


def definition_of(case: Case) -> str:
    """Hash everything that fixes what a case computes, defaults included.

    Two runs may use one id for different things: an id does not name the seed, nor a default that
    was changed since.
    """
    parts = case.model_dump_json(exclude=_NO_PART_OF_A_CASE)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _strict(value: Any) -> Any:
    """Make a value strict JSON: numbers that are not finite become text, they are no metrics."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(item) for item in value]
    if hasattr(value, "item"):  # a numpy or torch scalar
        return _strict(value.item())
    return str(value)


def case_verdict(rows: Iterable[Row]) -> str:
    """Decide one case: the first of `VERDICTS` among its rows; no row at all is an error."""
    found = {row.verdict for row in rows}
    return next((verdict for verdict in VERDICTS if verdict in found), "error")


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by case id, in the order of their first row."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    return dict(cases)


class _Selected(BaseModel):
    """What readers of `selection` in run.json rely on."""

    selectors: tuple[str, ...] = ()
    suite: str | None = None
    cases: str | None = None
    implementation: str | None = None
    device: str | None = None
    files: dict[str, str] | None = None
    is_given: bool = False


class _About(BaseModel):
    """What readers of run.json rely on; a key that is missing has its default there."""

    id: str | None = None
    commit: str | None = None
    command: str | None = None
    state: str | None = None
    started: datetime | None = None
    selection: _Selected | None = None
    versions: dict[str, str | None] | None = None
    definitions: dict[str, str] | None = None
    absent: list[str] | None = None
    seconds: dict[str, Any] | None = None
    devices: dict[str, Any] | None = None
    environment: dict[str, str] | None = None


class RunDirectory:
    """One run on disk: results.jsonl and run.json, and the reports made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, thread_local=False)

    @classmethod
    def create(cls, out: Path | None = None, *, root: Path, commit: str) -> RunDirectory:
        """Make a run directory, `out`, else `<root>/<timestamp>-<commit>`, and hold it.

        Raises:
            UsageError: it holds results already, cannot be written, or another process writes it.
        """
        with writing(out or root):
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
            made = cls(_fresh(root, commit) if out is None else out)
            made.hold()
            try:
                cls.check_free(made.path)
            except UsageError:
                made.release()
                raise
            made.results.touch()
        return made

    @staticmethod
    def check_free(out: Path) -> None:
        """Refuse, without making anything, a directory that no new run can be written to.

        Raises:
            UsageError: it holds results, or cannot be made or written.
        """
        with writing(out):
            there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            taken = (out / RESULTS).exists()
        if taken:
            text = f"holds results already, go on with parity run --resume {out}"
            raise UsageError(f"run directory {out}: {text}")

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory; a link is followed once, for it may move on.

        Raises:
            UsageError: there are no results in it.
        """
        if not (path / RESULTS).is_file():
            raise UsageError(f"{path}: no run directory, it has no {RESULTS}")
        return cls(path.resolve() if path.is_symlink() else path)

    def hold(self) -> None:
        """Keep every other process from writing here, until `release` or the end of this one.

        Raises:
            UsageError: another process does already, or nobody can.
        """
        with writing(self.path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                text = "is being written by another run: wait for it, or write elsewhere (--out)"
                raise UsageError(f"{self.path} {text}") from None

    def release(self) -> None:
        """Let others write here; the lock leaves no file, whoever waits for it sees that."""
        if self._lock.is_locked:
            (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()

    def discard(self) -> None:
        """Remove a directory in which nothing was recorded; anything else in it stays."""
        if self.results.stat().st_size == 0:
            for name in (RESULTS, RUN):
                (self.path / name).unlink(missing_ok=True)
            self.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()

    @property
    def results(self) -> Path:
        """Path of results.jsonl."""
        return self.path / RESULTS

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of one finished case in a single write, on disk when this returns."""
        text = "".join(f"{row.to_json()}\n" for row in rows)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()

    def rows(self) -> list[Row]:
        """Read every whole line; a last line without its end was cut off and is left out.

        Raises:
            UsageError: a whole line is not a row.
        """
        rows: list[Row] = []
        shared: dict[Any, Any] = {}
        with open(self.results, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    rows.append(_sharing(Row.from_json(line.decode()), shared))
                except (ValueError, UsageError) as problem:
                    raise UsageError(f"{self.results}:{number}: {problem}") from None
        return rows

    def keep_finished(self, definitions: Mapping[str, str] | None = None) -> list[Row]:
        """Drop what a resumed run does again: errored cases, and the case a crash cut off.

        Args:
            definitions: case id -> hash of what it is now; a case that was another when it ran,
                as run.json has it, is done again too.

        Returns:
            The rows that stay.
        """
        whole = self.results.read_bytes().endswith(b"\n")
        cases = by_case(self.rows())
        if not whole and cases:  # the cut line may belong to the case of the line before it
            cases.popitem()
        ran, now = self.run().get("definitions") or {}, definitions or {}
        for case in [*cases]:
            hashed = ran.get(case, now.get(case))
            if hashed != now.get(case, hashed) or case_verdict(cases[case]) == "error":
                del cases[case]
        kept = [row for rows in cases.values() for row in rows]
        _replace(self.results, "".join(f"{row.to_json()}\n" for row in kept))
        return kept

    def write(self, name: str, text: str) -> None:
        """Write one form of the report, whole or not at all."""
        _replace(self.path / name, text)

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        _replace(self.path / RUN, json.dumps(_strict(run), indent=2, allow_nan=False) + "\n")

    def run(self) -> dict[str, Any]:
        """Read run.json; empty where a crash or another tool left none.

        Raises:
            UsageError: what is there is no record of a run.
        """
        path = self.path / RUN
        try:
            run = json.loads(path.read_bytes())
            _About.model_validate(run)
        except FileNotFoundError:
            return {}
        except ValidationError as problem:
            raise UsageError(f"{path}: no record of a run: {_first(problem)}") from None
        except (OSError, ValueError) as problem:
            raise UsageError(f"{path}: cannot be read: {problem}") from None
        record: dict[str, Any] = run
        return record

    def link_latest(self) -> None:
        """Point `latest` beside this directory at it; a real file of that name is left alone."""
        link = self.path.parent / LATEST
        if link.exists() and not link.is_symlink():
            return
        fresh = link.with_name(f".{LATEST}-{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(self.path.name)
        fresh.replace(link)


def _fresh(root: Path, commit: str) -> Path:
    """Make `<root>/<timestamp>-<commit>`, with a number behind it where two runs start at once."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (f"{stamp}-{commit}" if number == 1 else f"{stamp}-{commit}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def _replace(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate, too
    fresh.replace(path)
