"""Exception tree of the harness; every class knows the exit code the command line ends with.

Owns the wording pattern "where, what, what would do". Must not know how an error is printed.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path


class ParityError(Exception):
    """Base of every error a user of the harness can cause or meet."""

    exit_code = 3


class UsageError(ParityError):
    """A command, case or configuration that cannot be run as written."""

    exit_code = 2


class CaseError(UsageError):
    """One key of one case is wrong: says file, case, key, value and what would do."""

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        case: str | None = None,
        key: str | None = None,
        value: object = None,
        allowed: Sequence[object] | str | None = None,
    ) -> None:
        self.problem, self.file, self.case, self.key = problem, file, case, key
        self.value, self.allowed = value, allowed
        where = ": ".join(part for part in (file, case and f"case {case}", key) if part)
        message = f"{where}: {problem}" if where else problem
        if value is not None:
            message += f" (got {value!r})"
        if allowed is not None:
            options = allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))
            message += f"; allowed: {options}"
        super().__init__(message)


class NothingSelectedError(ParityError):
    """No case matched the selection, or every selected case was skipped."""

    exit_code = 5


class InfrastructureError(ParityError):
    """A rank died, hung or ran out of memory: nothing is known about parity."""

    exit_code = 3


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say what could not be written.

    Raises:
        UsageError: the path given by the user will not do.
        InfrastructureError: the disk is full.
    """
    try:
        yield
    except OSError as problem:
        kind = InfrastructureError if problem.errno in _FULL else UsageError
        raise kind(f"cannot write {path}: {problem.strerror}") from None
