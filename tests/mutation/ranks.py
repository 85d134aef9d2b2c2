"""What runs in a rank before a case: one module of fold_impl is replaced by a mutant of it.

Owns the import. Must not know mutants' kinds. Easy to get wrong: the package imports its modules,
so the mutant must stand ready before the package is imported, or the others keep the right one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads one module: the given source under the given name."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=f"<mutant of {fullname}>")

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, f"<mutant of {self.name}>", "exec"), module.__dict__)


def replace(_runtime: Any, module: tuple[str, str]) -> None:
    """Have `module` = (name, source) imported under its name from now on.

    Raises:
        RuntimeError: the module is here already.
    """
    name, source = module
    if name in sys.modules:
        raise RuntimeError(f"{name} is imported already: a mutant of it would judge nothing")
    sys.meta_path.insert(0, _Mutant(name, source))
