"""A package's own worded exceptions as refusals of the implementation that adapts it.

Owns whose words count: those of the frame that raised. Must not know any package. Easy to get
wrong: an exception without words, or one raised in our own code, is a defect and no refusal.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path

from parity.implementation import Refusal


@contextlib.contextmanager
def refusals_of(packages: Collection[str], *kinds: type[Exception]) -> Iterator[None]:
    """Turn worded exceptions of these kinds, raised in a file of these packages, into refusals.

    Args:
        packages: names of their folders, for instance "deepspeed".
        kinds: exceptions that may be meant as a refusal.

    Raises:
        Refusal: with the type and words of the exception.
    """
    try:
        yield
    except kinds as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not str(error) or set(packages).isdisjoint(raised_in.parts):
            raise
        raise Refusal(f"{type(error).__name__}: {error}") from error
