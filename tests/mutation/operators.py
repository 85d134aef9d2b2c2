"""Small wrong programs made out of a right one: one changed node of its syntax tree each.

Owns what is changed. Must not know how a mutant is judged. Easy to get wrong: an annotation, a
docstring or the words of an error change nothing that runs, and a mutant of them lives for ever.

Why not a mutation tool: mutmut 3 leaves decorated functions alone, and every forward and backward
of an autograd function is a `staticmethod`; cosmic-ray starts an interpreter, and torch, for each
mutant; neither knows that the likely slip here is one parallel axis in the place of another.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

AXES = {"tp": "dp", "dp": "tp", "ep": "etp", "etp": "ep", "edp": "dp", "stage": "dp"}
"""Parallel axis -> the one written in its place."""
NAMES = {
    **AXES,
    **{f"{axis}_size": f"{other}_size" for axis, other in AXES.items()},
    **{"index": "size", "size": "index", "world_size": "stage_size", "stage_size": "world_size"},
    **{"send": "receive", "receive": "send", "by_expert": "by_arrival", "by_arrival": "by_expert"},
}
"""Attribute or name -> the one written in its place."""
_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
_COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_POINTS = ("points", "_point", "point", "table")
"""Calls past which a value goes to where a fault may be planted: what else they are given is read
by planted faults alone."""

_MODULES = ("self", "torch", "dist", "nn", "math", "dispatch", "rows")
"""What a function is looked up in: leaving the call out would leave a module."""


@dataclass(frozen=True)
class Mutant:
    """One changed program."""

    module: str
    line: int
    column: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def id(self) -> str:
        """Name it so that it can be run alone."""
        return f"{self.module}:{self.line}:{self.column}:{self.kind}:{self.after}"


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Give every mutant of a module once, in the order of its lines."""
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for path, node in _running(tree, ()):
        for kind, change in _changes(node, path):
            mutated = copy.deepcopy(tree)
            parent = _at(mutated, path[:-1])
            before = ast.unparse(node)
            after = change(_at(mutated, path))
            _put(parent, path[-1], after)
            text = ast.unparse(ast.fix_missing_locations(mutated))
            if text in seen:
                continue
            seen.add(text)
            shown = "(removed)" if isinstance(after, ast.Pass) else ast.unparse(after)
            yield Mutant(
                module, node.lineno, node.col_offset, kind, _short(before), _short(shown), text
            )


Step = tuple[str, int | None]
Path = tuple[Step, ...]
Change = Callable[[ast.AST], ast.AST]


def _running(node: ast.AST, path: Path) -> Iterator[tuple[Path, ast.stmt | ast.expr]]:
    """Walk the nodes that run: no annotation, docstring, decorator, error message or context."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        if isinstance(node, (ast.Raise, ast.Assert)) and field != "test":
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, ast.AST) or _is_silent(node, field, index, child):
                continue
            here = (*path, (field, index if isinstance(value, list) else None))
            if isinstance(child, (ast.stmt, ast.expr)):
                yield here, child
            yield from _running(child, here)


def _is_silent(node: ast.AST, field: str, index: int, child: ast.AST) -> bool:
    """Tell whether a child has no effect on what is computed."""
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if isinstance(child, (ast.Import, ast.ImportFrom)):
        return True
    if isinstance(child, ast.Subscript) and ast.unparse(child.value) == "Literal":
        return True  # a type
    if isinstance(node, ast.Call) and _called(node) in _POINTS:
        return field == "keywords" or (field == "args" and index == 0)
    return False


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _changes(node: ast.AST, path: Path) -> Iterator[tuple[str, Change]]:
    """List what can be done to one node."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _BINARY:
        yield "arithmetic", _with("op", _BINARY[type(node.op)]())
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in _COMPARED[type(node.ops[0])]:
            yield "comparison", _with("ops", [operator()])
    if isinstance(node, ast.BoolOp):
        yield "logic", _with("op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition", _with("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield "sign", lambda n: n.operand  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant):
        yield from _constants(node)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in NAMES:
        yield "axis", _with("attr", NAMES[node.attr])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in NAMES:
        yield "axis", _with("id", NAMES[node.id])
    if isinstance(node, ast.Call):
        yield from _calls(node)
    if path[-1][0] in ("body", "orelse") and isinstance(node, (ast.Expr, ast.If, ast.AugAssign)):
        yield "statement", lambda _: ast.Pass()


def _constants(node: ast.Constant) -> Iterator[tuple[str, Change]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", _with("value", not value)
    elif isinstance(value, (int, float)):
        yield "constant", _with("value", value + 1)
        if value:
            yield "constant", _with("value", value - 1)
    elif value in AXES:
        yield "axis", _with("value", AXES[value])


def _calls(node: ast.Call) -> Iterator[tuple[str, Change]]:
    """A method left out, two arguments exchanged, a keyword forgotten."""
    if isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
        yield "method", lambda n: n.func.value  # type: ignore[attr-defined]
    if len(node.args) == 2 and _called(node) not in _POINTS:
        yield "exchange", _with("args", node.args[::-1])
    if _called(node) not in _POINTS:
        for keyword in node.keywords:
            rest = [k for k in node.keywords if k is not keyword]
            yield "keyword", _with("keywords", rest)


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in _MODULES


def _with(field: str, value: object) -> Change:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, field, copy.deepcopy(value))
        return node

    return change


def _at(node: ast.AST, path: Path) -> ast.AST:
    for field, index in path:
        value = getattr(node, field)
        node = value if index is None else value[index]
    return node


def _put(parent: ast.AST, step: Step, node: ast.AST) -> None:
    field, index = step
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
