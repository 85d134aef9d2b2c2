"""Files of cases: a matrix over axes and single cases, folders of them, and the choice by name.

Owns the TOML form, its JSON schema, and how cells of a matrix are made and found. Must not know
what a field means. Easy to get wrong: an override must match the cell as the axes made it, and a
sample must still hold every pair that the constraints allow.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from parity.case import (
    DEFAULTS,
    IDENTITY,
    SECTIONS,
    Case,
    Flat,
    Part,
    Positive,
    first_complaint,
    flatten,
    make,
    schema_refusal,
)
from parity.covering import Constraint, Coverage, coverage, covering
from parity.errors import CaseError, NothingSelectedError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

DEFAULT_SUITE = "seed"
FEWEST_LAYERS = 2
"""Of a case in a file: in one layer no gradient has passed another layer's MoE."""
ID = r"(?!.*\.toml)[A-Za-z0-9][A-Za-z0-9._+-]*"
"""Of a case that names itself; what holds `.toml` would be taken for a file."""
_DECLARATION = re.compile(
    rb"""^\s*(["']?suite["']?\s*=|\[\[\s*["']?case["']?[\s.\]]|\[\s*["']?axes["']?[\s.\]])""",
    re.MULTILINE,
)
"""A line only a case file has."""


class Override(Part):
    """Change of every case of the matrix that matches `when`."""

    when: dict[str, Any]
    set: dict[str, Any]


class Exclude(Part):
    """Drop every case of the matrix that matches `when`."""

    when: dict[str, Any]


class CaseFile(Part):
    """One TOML file: shared fields, a matrix over axes, and single further cases."""

    suite: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    implementation: str | None = None
    """What `parity run` judges on these cases where no other is named."""
    base: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Any] = Field(default_factory=dict)
    sample: Literal["product", "pairwise"] = "product"
    """Cells of the matrix: all, or so many that every possible pair of axis values occurs."""
    cells: Positive | None = None
    """Fewest cells of a pairwise sample."""
    override: list[Override] = Field(default_factory=list)
    exclude: list[Exclude] = Field(default_factory=list)
    case: list[dict[str, Any]] = Field(default_factory=list)


def is_case_file(path: Path) -> bool:
    """Say whether a file declares a suite, axes or cases, even where the rest of it is malformed.

    A file that cannot be read counts as one: nobody is to miss its cases without a word.
    """
    try:
        return _DECLARATION.search(path.read_bytes()) is not None
    except OSError:
        return path.is_file()


def load_toml(text: str) -> dict[str, Any]:
    """Parse TOML text."""
    return tomllib.loads(text)


def load_file(path: Path) -> list[Case]:
    """Read one case file and expand it.

    Raises:
        CaseError: the file cannot be read, is malformed, or a case of it is refused.
    """
    parsed, file = parse_file(path), display(path)
    about = {"suite": parsed.suite, "file": file, "implementation": parsed.implementation}
    matrix = [make(cell, **about) for cell in matrix_of(parsed, file).cells]  # type: ignore[arg-type]
    cases = [*matrix, *_singles(parsed, file)]
    if not cases:
        raise CaseError("no case: give [axes] or [[case]]", file=file)
    for case in cases:
        if case.model.layers < FEWEST_LAYERS:
            raise CaseError("no gradient passes another layer", file=file, case=case.id,
                            key="model.layers", value=case.model.layers,
                            allowed=f"{FEWEST_LAYERS} or more")  # fmt: skip
    _refuse_duplicates(cases)
    return cases


def load_matrix(path: Path) -> Matrix:
    """Read the matrix of one case file."""
    return matrix_of(parse_file(path), display(path))


def parse_file(path: Path) -> CaseFile:
    """Read one case file without expanding it.

    Raises:
        CaseError: the file cannot be read or is malformed.
    """
    file = display(path)
    try:
        table = load_toml(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise CaseError(f"malformed TOML: {problem}", file=file) from None
    except OSError as problem:
        raise CaseError(f"cannot be read: {problem.strerror}", file=file) from None
    try:
        return CaseFile.model_validate(table, strict=True)
    except ValidationError as problems:
        raise _file_refusal(first_complaint(problems), file) from None


def _file_refusal(error: Mapping[str, Any], file: str) -> CaseError:
    refusal = schema_refusal(error, file=file, case=None)
    if error["type"] != "extra_forbidden":
        return refusal
    parts: dict[str, type[Part]] = {"override": Override, "exclude": Exclude}
    part = parts.get(str(error["loc"][0]), CaseFile)
    return CaseError("unknown key", file=file, key=refusal.key, value=refusal.value,
                     allowed=list(part.model_fields))  # fmt: skip


def display(path: Path) -> str:
    """Show a path as the user would type it: relative where it lies under the working folder."""
    here = Path.cwd()
    full = path.resolve()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def _axis_entries(file: str, axis: str, entries: object) -> list[Flat]:
    """Give what each entry of one axis sets.

    A table under a section's name is relative to it; under any other name it is a bundle of
    fields, the name being a label.
    """
    if not isinstance(entries, list) or not entries:
        raise CaseError("an axis is a list with at least one entry", file=file,
                        key=f"axes.{axis}", value=entries)  # fmt: skip
    prefix = f"{axis}." if axis in SECTIONS or axis.startswith("engine.options") else ""
    return [flatten(e, prefix) if isinstance(e, dict) else {axis: e} for e in entries]


@dataclass(frozen=True)
class Matrix:
    """The axes of a file and what was chosen of them.

    axes: name -> what each entry sets; choices: one entry number per axis; cells: fields of each.
    """

    axes: dict[str, list[Flat]]
    constraints: list[Constraint]
    choices: list[tuple[int, ...]]
    cells: list[Flat]

    @property
    def coverage(self) -> Coverage:
        """Count pairs of entries that occur, that could occur and that are excluded."""
        sizes = [len(entries) for entries in self.axes.values()]
        return coverage(sizes, self.choices, self.constraints)


def matrix_of(parsed: CaseFile, file: str) -> Matrix:
    """Expand the axes: the product or a pairwise sample, then overrides in order, then exclusions.

    Raises:
        CaseError: an axis, an override or an exclusion is wrong, or matches nothing.
    """
    axes = {axis: _axis_entries(file, axis, e) for axis, e in flatten(parsed.axes).items()}
    if not axes and (parsed.override or parsed.exclude):
        problem = "there is no matrix to change"
        raise CaseError(problem, file=file, key="override, exclude", allowed="give [axes]")
    if parsed.sample == "product" and parsed.cells is not None:
        raise CaseError("the product has as many cells as it has", file=file, key="cells",
                        value=parsed.cells, allowed='sample = "pairwise"')  # fmt: skip
    constraints, fired = _constraints(parsed, list(axes.values()), file)
    sizes = [len(entries) for entries in axes.values()]
    if parsed.sample == "product":
        choices = list(itertools.product(*map(range, sizes))) if axes else []
    elif len(axes) < 2:
        raise CaseError("has no pairs", file=file, key="axes", value=list(axes), allowed="two axes")
    else:
        choices = covering(sizes, constraints, parsed.cells or 0)
    base = flatten(parsed.base)
    cells = [_cell(base, list(axes.values()), choice) for choice in choices]
    for index, override in enumerate(parsed.override):
        where = f"override[{index}]"
        matched = _matching(cells, flatten(override.when), file, f"{where}.when")
        cells = [_merge(c, flatten(override.set)) if m else c
                 for c, m in zip(cells, matched, strict=True)]  # fmt: skip
    for index, exclude in enumerate(parsed.exclude):
        when = flatten(exclude.when)
        avoided = index in fired  # a sample does not hold what it was told to avoid
        matched = _matching(cells, when, file, f"exclude[{index}].when", may_miss=avoided)
        choices = [c for c, m in zip(choices, matched, strict=True) if not m]
        cells = [c for c, m in zip(cells, matched, strict=True) if not m]
    return Matrix(axes, constraints, choices, cells)


def _cell(base: Flat, axes: Sequence[Sequence[Flat]], choice: Sequence[int]) -> Flat:
    return _merge(base, *(entries[at] for entries, at in zip(axes, choice, strict=True)))


def _constraints(
    parsed: CaseFile, axes: Sequence[Sequence[Flat]], file: str
) -> tuple[list[Constraint], set[int]]:
    """Turn exclusions into constraints on the choice of entries.

    Returns:
        The constraints, and a set that fills with the numbers of the exclusions that applied.
    """
    base, fired, constraints = flatten(parsed.base), set[int](), []
    overridden = {key for override in parsed.override for key in flatten(override.set)}
    for index, exclude in enumerate(parsed.exclude):
        when = flatten(exclude.when)
        _refuse_unknown(when, file, f"exclude[{index}].when")
        if overridden & set(when):
            continue  # only the finished cell tells
        needs = [i for i, entries in enumerate(axes) if any(k in e for e in entries for k in when)]

        @functools.cache
        def forbids(values: tuple[int, ...], when: Flat = when, needs: list[int] = needs,
                    index: int = index) -> bool:  # fmt: skip
            chosen = [axes[axis][value] for axis, value in zip(needs, values, strict=True)]
            hit = _matches_when(_merge(base, *chosen), when)
            fired.update({index} if hit else ())
            return hit

        constraints.append(Constraint(tuple(needs), forbids))
    return constraints, fired


def _merge(*parts: Flat) -> Flat:
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def _matching(
    cells: Sequence[Flat], when: Flat, file: str, where: str, *, may_miss: bool = False
) -> list[bool]:
    """Say which cells have the given values (a list: any of them); refuse what matches none."""
    _refuse_unknown(when, file, where)
    matched = [_matches_when(cell, when) for cell in cells]
    if not (may_miss or any(matched)):
        raise CaseError("matches no case of the matrix", file=file, key=where, value=when)
    return matched


def _refuse_unknown(when: Flat, file: str, where: str) -> None:
    for key in when:
        if key not in DEFAULTS and not key.startswith("engine.options."):
            raise CaseError("unknown key", file=file, key=f"{where}.{key}", value=when[key],
                            allowed=list(DEFAULTS))  # fmt: skip


def _matches_when(cell: Flat, when: Flat) -> bool:
    full = {**DEFAULTS, **cell}
    return all(
        full.get(key) in (value if isinstance(value, list) else [value])
        for key, value in when.items()
    )


def _singles(parsed: CaseFile, file: str) -> Iterator[Case]:
    """Make the cases written one by one, each on top of [base]; they may name their own id."""
    for entry in parsed.case:
        fields = flatten(entry)
        name = fields.pop("id", None)
        if name is not None and not (isinstance(name, str) and re.fullmatch(ID, name)):
            raise CaseError("not an id", file=file, key="case.id", value=name,
                            allowed="a text of letters, digits, and . _ + - after the first; "
                                    "not .toml, which means a file")  # fmt: skip
        cell = _merge(flatten(parsed.base), fields)
        yield make(
            cell,
            suite=parsed.suite,
            file=file,
            id=name,
            implementation=parsed.implementation,
        )


def _refuse_duplicates(cases: Iterable[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        other = seen.setdefault(case.id, case)
        if other is not case and (other.suite == case.suite or not _same(other, case)):
            raise _taken(case, other)


def _taken(case: Case, other: Case) -> CaseError:
    problem = f"the id is taken by another case of {other.file} (suite {other.suite})"
    allowed = "any id not in use; seed and deadline_s alone make no case"
    return CaseError(
        problem, file=case.file, case=case.id, key="id", value=case.id, allowed=allowed
    )


def _same(one: Case, other: Case) -> bool:
    """Say whether two suites hold the same cell, whatever file and deadline they name."""
    ignored = {"suite", "file", "deadline_s", "implementation"}
    return one.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def find_folder(given: Path | None = None) -> Path:
    """Find the folder of case files: the given one, ./cases, or the one the package came with.

    Raises:
        UsageError: there is none, or the given one is not a folder.
    """
    if given is not None:
        if not given.is_dir():
            raise UsageError(f"--cases {given}: no such folder")
        return given
    package = Path(__file__).resolve().parent
    for folder in (Path("cases"), package.parent / "cases", package / "cases"):
        if any(is_case_file(path) for path in folder.glob("*.toml")):
            return folder
    raise UsageError("no folder of case files: give --cases DIR, or run where ./cases is")


def load_folder(folder: Path) -> list[Case]:
    """Load every case file of a folder, in the order of the file names.

    Other TOML files may lie beside them.

    Raises:
        CaseError: a file is refused, or one suite uses an id twice.
    """
    files = [path for path in sorted(folder.glob("*.toml")) if is_case_file(path)]
    cases = [case for path in files for case in load_file(path)]
    _refuse_duplicates(cases)
    return cases


def select(
    selectors: Sequence[str] = (), *, suite: str | None = None, folder: Path | None = None
) -> list[Case]:
    """Choose cases by id, glob or file (`FILE` or `FILE::GLOB`); without any, by suite.

    Args:
        selectors: without a suite, ids and globs are looked up in every suite.
        suite: keep only its cases; None without selectors means the default suite.
        folder: where the case files are, see `find_folder`.

    Raises:
        UsageError: unknown suite or file, or a refused case.
        NothingSelectedError: a selector matches nothing.
    """
    if not selectors:
        return _of_suite(load_folder(find_folder(folder)), suite or DEFAULT_SUITE)
    named = any(".toml" not in selector for selector in selectors)
    pool = load_folder(find_folder(folder)) if named else []
    if suite is not None and named:
        pool = _of_suite(pool, suite)
    return _distinct(case for s in selectors for case in _matches(s, pool, suite))


def _distinct(cases: Iterable[Case]) -> list[Case]:
    """Keep each cell once; refuse one id that stands for two different cells."""
    chosen: dict[str, Case] = {}
    for case in cases:
        other = chosen.setdefault(case.id, case)
        if not _same(other, case):
            raise _taken(case, other)
    return list(chosen.values())


def _of_suite(cases: Sequence[Case], suite: str) -> list[Case]:
    chosen = [case for case in cases if case.suite == suite]
    if not chosen:
        suites = ", ".join(sorted({case.suite for case in cases})) or "none"
        raise UsageError(f"unknown suite {suite!r}; allowed: {suites}")
    return chosen


def _matches(selector: str, pool: Sequence[Case], suite: str | None) -> list[Case]:
    path, _, pattern = selector.partition("::")
    if path.endswith(".toml"):
        pool = [c for c in load_file(Path(path)) if suite in (None, c.suite)]
    else:
        pattern = selector
    found = [case for case in pool if fnmatch.fnmatchcase(case.id, pattern or "*")]
    if not found:
        raise NothingSelectedError(_nothing(selector, pattern, pool))
    return found


def _nothing(selector: str, pattern: str, pool: Sequence[Case]) -> str:
    import difflib

    close = difflib.get_close_matches(pattern, [case.id for case in pool], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see `parity list`"
    return f"no case matches {selector!r}{hint}"


def run_order(cases: Iterable[Case]) -> list[Case]:
    """Sort cases so that one gang and one reference serve as many in a row as possible."""

    def key(case: Case) -> tuple[Any, ...]:
        parts = (case.shape, case.model, case.data, case.auxiliary, case.engine)
        return (case.shape.world, *(part.model_dump_json() for part in parts), case.id)

    return sorted(cases, key=key)


# --- JSON schema of a case file ---------------------------------------------------------------


def file_schema() -> dict[str, Any]:
    """Build the JSON schema of a case file; every field is optional until cases are expanded."""
    source = Case.model_json_schema()
    definitions: dict[str, Any] = source.pop("$defs")
    for definition in definitions.values():
        definition.pop("required", None)
    definitions["Model"]["properties"]["layers"]["minimum"] = FEWEST_LAYERS
    fields = {k: v for k, v in source["properties"].items() if k not in IDENTITY}
    for name, section in SECTIONS.items():
        for key, field in definitions[section.__name__]["properties"].items():
            fields[f"{name}.{key}"] = field
    when = {"type": "object", "minProperties": 1, "description": "key -> value, or any of a list"}
    entry = {"type": "object", "properties": fields, "additionalProperties": False}
    named = {"type": "string", "pattern": f"^{ID}$"}
    single = {**entry, "properties": {"id": named, **fields}}
    axis = {"anyOf": [{"type": "array", "minItems": 1}, {"type": "object"}]}
    changes = {"when": when, "set": {"$ref": "#/$defs/Fields"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "parity case file",
        "type": "object",
        "required": ["suite"],
        "additionalProperties": False,
        "properties": {
            "suite": CaseFile.model_json_schema()["properties"]["suite"],
            "description": {"type": "string"},
            "implementation": {"type": "string"},
            "sample": CaseFile.model_json_schema()["properties"]["sample"],
            "cells": {"type": "integer", "minimum": 1},
            "base": {"$ref": "#/$defs/Fields"},
            "axes": {"type": "object", "additionalProperties": axis},
            "override": _list_of(changes),
            "exclude": _list_of({"when": when}),
            "case": {"type": "array", "items": single},
        },
        "$defs": {**definitions, "Fields": entry},
    }


def _list_of(properties: dict[str, Any]) -> dict[str, Any]:
    item = {"type": "object", "required": list(properties), "additionalProperties": False,
            "properties": properties}  # fmt: skip
    return {"type": "array", "items": item}
