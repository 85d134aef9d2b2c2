"""The rules of the tree, read off the source: who may import whom, and what modules may hold.

Every module of both packages is found by walking the tree, so a new one is covered the day it
appears. Imports under `if TYPE_CHECKING:` do not count, imports inside functions count only
where a rule says so.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("parity", "fold_impl")

LEVELS = (
    ("parity.errors",),
    ("parity.layout", "parity.case"),
    ("parity.collect",),  # pure, and what is compared is what it rebuilt
    ("parity.compare", "parity.explain", "parity.store"),
    ("parity.gang",),
    ("parity.plugin", "parity.cli"),
)
"""A module reaches, directly or through others, only its own level and those before it."""

RANK_ROOTS = (
    "parity.rank",
    "parity.trial",
    "parity.threads",
    "parity.models",
    "parity.collect",
    "parity.compare",
    "parity.implementation",
    "parity.implementations",
    "fold_impl",
)
"""Modules and packages that enter a rank; what they import at module level enters with them."""
NEVER_IN_A_RANK = ("pandas", "rich", "jinja2", "click", "matplotlib", "pytest", "tabulate")

READERS_OF_ENVIRONMENT = (
    "parity.fingerprint",
    "parity.rank",
    "parity.gang",
    "parity.cli",
    "parity.plugin",
    "parity.cli_versions",  # what its child processes get is this process's
    "parity.join",  # where a launcher's RANK and WORLD_SIZE arrive
    "fold_impl.engine",  # initialize() is where a launcher's WORLD_SIZE arrives
)
WITHOUT_TORCH = (
    *("parity.errors", "parity.layout", "parity.case", "parity.store", "parity.cli"),
    *("fold_impl.layout", "fold_impl.section", "fold_impl.config"),
)
"""Modules that must not import torch or DeepSpeed themselves: rejecting a config takes no torch."""

MUTABLE_MAKERS = ("list", "dict", "set", "defaultdict", "Counter", "deque", "OrderedDict")
MUTATORS = (
    *("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem"),
    *("remove", "discard", "clear", "sort", "reverse", "appendleft"),
)

Modules = Mapping[str, ast.Module]


@functools.cache
def parse_tree(root: Path) -> dict[str, ast.Module]:
    """Parse every module below the packages: dotted name -> syntax tree."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {dotted(path.relative_to(root)): ast.parse(path.read_text()) for path in paths}


def dotted(path: Path) -> str:
    """Give the module name of a path below the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    """Tell `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Give the import statements that run, on import of the module or ever."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif is_type_checking(node) or (isinstance(node, functions) and not inside_functions):
            continue
        else:
            yield from import_nodes(node, inside_functions=inside_functions)


def imported(tree: ast.AST, *, inside_functions: bool = False) -> set[str]:
    """Give the dotted names a module imports; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in import_nodes(tree, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            names |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def tops(names: Iterable[str]) -> set[str]:
    """Give the packages of dotted names."""
    return {name.partition(".")[0] for name in names}


def with_parents(name: str) -> list[str]:
    """Give a module and the packages importing it runs first: a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def reached(start: str, modules: Modules) -> set[str]:
    """Give every module of ours that importing one runs."""
    found: set[str] = set()
    pending = with_parents(start)
    while pending:
        name = pending.pop()
        if name in modules and name not in found:
            found.add(name)
            pending += [part for n in imported(modules[name]) for part in with_parents(n)]
    return found


def broken_independence(modules: Modules) -> list[str]:
    """The two halves do not import each other, not even inside a function."""
    other = {"parity": "fold_impl", "fold_impl": "parity"}
    return [
        f"{name} imports {other[name.partition('.')[0]]}"
        for name, tree in modules.items()
        if other[name.partition(".")[0]] in tops(imported(tree, inside_functions=True))
    ]


def broken_levels(modules: Modules) -> list[str]:
    """Dependencies go down the levels."""
    level = {name: index for index, names in enumerate(LEVELS) for name in names}
    return [
        f"{name} reaches {other}, which stands above it"
        for name in level
        for other in sorted(reached(name, modules) if name in modules else ())
        if level.get(other, 0) > level[name]
    ]


def broken_cycles(modules: Modules) -> list[str]:
    """No module reaches itself through what it imports at module level.

    A package that lifts names out of its modules is no cycle, so steps up to it do not count.
    """
    edges = {
        name: (imported(tree) & set(modules)) - set(with_parents(name))
        for name, tree in modules.items()
    }
    found = []
    for start in edges:
        seen: set[str] = set()
        pending = [*edges[start]]
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += edges[name]
        found += [f"{start} imports itself through {sorted(seen)}"] if start in seen else []
    return found


def broken_ranks(modules: Modules) -> list[str]:
    """What enters a rank brings no library of the view or of the command line."""
    roots = [m for m in modules if any(r in RANK_ROOTS for r in with_parents(m))]
    entering = {name for root in roots for name in reached(root, modules)}
    return [
        f"{name} enters a rank and imports {library}"
        for name in sorted(entering)
        for library in sorted(tops(imported(modules[name])) & set(NEVER_IN_A_RANK))
    ]


def broken_lightness(modules: Modules) -> list[str]:
    """Cases and configs are refused without torch."""
    return [
        f"{name} imports {library}"
        for name in WITHOUT_TORCH
        if name in modules
        for library in sorted(tops(imported(modules[name])) & {"torch", "deepspeed"})
    ]


def broken_environment(modules: Modules) -> list[str]:
    """The environment is read at the borders only."""
    doors = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    return [
        f"{name}:{node.lineno} touches the environment"
        for name, tree in modules.items()
        if name not in READERS_OF_ENVIRONMENT
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in doors
            and ast.unparse(node.value) == "os"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and doors & {alias.name for alias in node.names}
        )
    ]


def is_mutable(value: ast.AST | None) -> bool:
    """Tell an expression that makes a list, dict or set."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_MAKERS
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays)


def module_containers(tree: ast.Module) -> dict[str, int]:
    """Give the names bound to a mutable container at module level, with their lines."""
    found: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and is_mutable(node.value):
            found |= {t.id: node.lineno for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and is_mutable(node.value):
            found[ast.unparse(node.target)] = node.lineno
    return found


def mutated_names(tree: ast.Module) -> set[str]:
    """Give the names whose container is changed in place anywhere in the module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.add(ast.unparse(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in MUTATORS:
                found.add(ast.unparse(node.func.value))
        elif isinstance(node, ast.AugAssign):
            found.add(ast.unparse(node.target))
    return found


def broken_state(modules: Modules) -> list[str]:
    """A module holds constants: no `global`, no container that is changed or named like one."""
    found = []
    for name, tree in modules.items():
        containers = module_containers(tree)
        changed = mutated_names(tree) & set(containers)
        lower = {c for c in containers if not c.isupper() and not c.startswith("__")}
        found += [f"{name}:{containers[c]} holds state in {c}" for c in sorted(changed | lower)]
        found += [f"{name}:{n.lineno} global" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    return found


def broken_quiet(modules: Modules) -> list[str]:
    """Importing a module does nothing: no call stands alone at module level."""
    return [
        f"{name}:{node.lineno} works at import: {ast.unparse(node)}"
        for name, tree in modules.items()
        if not name.endswith("__main__")
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]


RULES: dict[str, tuple[Callable[[Modules], list[str]], dict[str, str], dict[str, str]]] = {
    "independence": (
        broken_independence,
        {"parity.x": "def f():\n    import fold_impl.layout"},
        {"parity.x": "import parity.layout  # not fold_impl"},
    ),
    "levels": (
        broken_levels,
        {"parity.compare": "import parity.x", "parity.x": "import parity.cli", "parity.cli": ""},
        {"parity.compare": "import parity.case", "parity.case": "import parity.layout"},
    ),
    "cycles": (
        broken_cycles,
        {"parity.a": "from parity import b", "parity.b": "import parity.a"},
        {"parity.a": "from parity import b", "parity.b": "def f():\n    import parity.a"},
    ),
    "ranks": (
        broken_ranks,
        {"parity.rank": "import parity.x", "parity.x": "try:\n    import pandas\nfinally:\n    2"},
        {"parity.rank": "def f():\n    import pandas", "parity.cli": "import click"},
    ),
    "lightness": (
        broken_lightness,
        {"fold_impl.config": "from torch import nn"},
        {"fold_impl.config": "import typing\nif typing.TYPE_CHECKING:\n    import torch"},
    ),
    "environment": (
        broken_environment,
        {"parity.x": "import os\ndef f():\n    return os.environ.get('A')"},
        {"parity.rank": "import os\nos.environ", "parity.x": "def f(environ): return environ"},
    ),
    "environment by name": (
        broken_environment,
        {"fold_impl.x": "from os import getenv"},
        {"fold_impl.x": "from os import path"},
    ),
    "changed container": (
        broken_state,
        {"parity.x": "KNOWN = {}\ndef f():\n    KNOWN['a'] = 1"},
        {"parity.x": "KNOWN = {'a': 1}\ndef f():\n    return KNOWN['a']"},
    ),
    "appended container": (
        broken_state,
        {"parity.x": "SEEN: list[int] = []\ndef f():\n    SEEN.append(1)"},
        {"parity.x": "SEEN = []\ndef f(seen):\n    seen.append(1)"},
    ),
    "variable container": (
        broken_state,
        {"parity.x": "import collections\ngroups = collections.defaultdict(list)"},
        {"parity.x": "GROUPS = ()\n__all__ = ['f']"},
    ),
    "global": (
        broken_state,
        {"parity.x": "count = 0\ndef f():\n    global count"},
        {"parity.x": "def f():\n    count = 0\n    def g():\n        nonlocal count"},
    ),
    "quiet": (
        broken_quiet,
        {"parity.x": "import torch\ntorch.manual_seed(0)"},
        {"parity.x": "import re\nPATTERN = re.compile('a')", "parity.__main__": "main()"},
    ),
}
"""Rule -> its check, a planted breach, and a near miss."""


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: str) -> None:
    """No module of either package breaks it."""
    check, _, _ = RULES[rule]
    assert check(parse_tree(ROOT)) == []


@pytest.mark.parametrize("rule", RULES)
def test_the_check_sees_a_planted_breach_and_passes_a_near_miss(rule: str) -> None:
    """One finding for the breach, none for code that only looks like it."""
    check, breach, near_miss = RULES[rule]
    assert len(check({name: ast.parse(text) for name, text in breach.items()})) >= 1
    assert check({name: ast.parse(text) for name, text in near_miss.items()}) == []


def test_every_module_of_both_packages_is_looked_at() -> None:
    """The walk finds what is known to be there, packages by their own name."""
    modules = parse_tree(ROOT)
    assert {"parity", "parity.errors", "parity.report", "fold_impl.layout"} <= set(modules)
