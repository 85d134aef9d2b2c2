"""How an implementation is found by name: the entry-point group, or `module:attr`.

Owns names and their loading. Must not import torch, nor know what an implementation offers. Easy to
get wrong: a name of the group is looked up without importing what it stands for, so that a command
can refuse an unknown one before any rank starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from parity.errors import UsageError

ENTRY_POINT_GROUP = "parity.implementations"


@functools.cache
def registered() -> dict[str, EntryPoint]:
    """Read the metadata of all installed packages once: 10 ms, in every rank of every case."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def load(name: str) -> Any:
    """Import what a name stands for.

    Raises:
        UsageError: no such name, module or attribute, or its module cannot be imported.
    """
    if name in registered():
        return registered()[name].load()
    module, colon, attribute = name.partition(":")
    if not colon:
        allowed = ", ".join([*sorted(registered()), "module:attr"])
        cure = "" if registered() else "; foldparity is not installed here: pip install -e ."
        raise UsageError(f"unknown implementation {name!r}; allowed: {allowed}{cure}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module is named
        raise UsageError(f"implementation {name!r}: {error}") from error


def check(name: str) -> None:
    """Refuse a name that no rank could find; one of the entry-point group costs no import.

    Raises:
        UsageError: as `load`, or a member of the Protocol is missing.
    """
    if name in registered():
        return
    if ":" not in name:
        load(name)
    from parity.implementation import find

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, whatever an import says
        find(name)
