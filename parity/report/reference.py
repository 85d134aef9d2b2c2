"""The JSON schema of case files -> docs/cases.md, the page a writer of cases reads.

Owns the layout of that page, and words for the fields whose names say nearly all. Everything else
comes from the schema and the docstrings in `parity/case.py`. Easy to get wrong: what has a
docstring there is not said again here.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from parity import case
from parity.case import SECTIONS, Case
from parity.case_files import CaseFile, file_schema

HEAD = """# Case files

<!-- Written by `parity schema --format md`; a test compares the two. -->

A case file is TOML in a folder `cases/`. It names its suite and gives a matrix over `[axes]`,
single cases as `[[case]]`, or both; `[base]` holds what they share. Dotted keys and tables are the
same thing: `model.top_k = 1`, `[model]` with `top_k = 1`.

```toml
suite = "example"

[base]
engine.dtype = "float32"

[axes]
shape = [{ world = 4, tp = 2, ep = 4 }, { world = 8, tp = 4, ep = 2 }]
optimizer.name = ["sgd", "adam"]

[[override]]
when = { "shape.world" = 8 }
set = { "engine.gas" = 2 }

[[case]]
id = "one-of-its-own"
shape = { world = 6, tp = 3, ep = 2 }
```

Only `world`, `tp`, `ep`, `etp` (and `pp`) are given; `dp` and `edp` follow from them. An unknown
key or a value that cannot work is refused before any rank starts, with the values that would do.
The id of a case says its shape and whatever differs from the defaults below; the seed is no part
of it.

`parity show CASE` prints one case with every default; `parity schema` the JSON schema for editors.
"""


def page() -> str:
    """Write the whole page."""
    schema = file_schema()
    parts = [HEAD, "## The file\n", _table(_file_lines(schema)), "## A case\n"]
    own = {key: value for key, value in Case.model_fields.items() if key not in SECTIONS}
    fields = schema["$defs"]["Fields"]["properties"]
    parts.append(_table(_lines("", {k: fields[k] for k in own if k in fields}, _said(Case))))
    for name, section in SECTIONS.items():
        keys = {key: fields[f"{name}.{key}"] for key in section.model_fields}
        parts += [f"## `{name}`\n", f"{inspect.getdoc(section)}\n"]
        parts.append(_table(_lines(f"{name}.", keys, _said(section), _required(section))))
    return "\n".join(parts)


def _table(lines: Iterator[tuple[str, str, str, str]]) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{key}` | {kind} | {default} | {said} |" for key, kind, default, said in lines]
    return "\n".join(rows) + "\n"


def _lines(
    prefix: str, fields: Mapping[str, Any], said: Mapping[str, str],
    required: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, str, str, str]]:  # fmt: skip
    for key, field in fields.items():
        default = "required" if key in required else _default(field.get("default"))
        yield (
            f"{prefix}{key}",
            _values(field),
            default,
            said.get(key) or _PLAIN.get(f"{prefix}{key}") or _PLAIN.get(key, ""),
        )


def _required(section: type[case.Part]) -> frozenset[str]:
    return frozenset(k for k, field in section.model_fields.items() if field.is_required())


_FILE = {
    "suite": "Suite of every case in the file.",
    "description": "For the reader.",
    "base": "Fields of every case.",
    "axes": "Key -> list of values; the matrix is their product. A table in a list sets several.",
    "override": "`{when, set}`: changes the cases of the matrix that match.",
    "exclude": "`{when}`: drops the cases of the matrix that match.",
    "case": "Single cases on top of `base`; one may name its own `id`.",
}


def _file_lines(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    said = {**_said(CaseFile), **_FILE}
    kinds = {"array": "list of tables", "object": "table"}
    for key, field in schema["properties"].items():
        kind = kinds.get(field.get("type", "object")) or _values(field)
        default = "required" if key in schema["required"] else _default(field.get("default"))
        yield key, kind, default, said.get(key, "")


_PLAIN = {
    "steps": "Optimizer steps, each compared.",
    "seed": "Of weights and tokens; another is drawn where a token is too near a tie.",
    "deadline_s": "Seconds after which a run of the ranks counts as hung.",
    "world": "Ranks of the folded run.",
    "tp": "Tensor parallel size; `dp = world / tp`.",
    "ep": "Expert parallel size.",
    "etp": "Expert tensor parallel size; `edp = world / (ep etp)`.",
    "pp": "Pipeline stages; only 1 so far.",
    "model.name": "The tiny model of this package, or a Hugging Face architecture.",
    "engine.name": "Whose engine steps: the implementation's own, or DeepSpeed's.",
    "optimizer.name": "SGD shows a constant factor exactly, Adam hides it: run both.",
    "layers": "Blocks of attention, dense MLP and MoE.",
    "hidden": "Width of the residual stream.",
    "heads": "Attention heads, divisible by tp.",
    "mlp_width": "Width of the dense MLP.",
    "vocab": "Tokens of the vocabulary.",
    "experts": "Routed experts, divisible by ep.",
    "expert_width": "Inner width of an expert, divisible by etp.",
    "top_k": "Experts a token goes to.",
    "score": "What turns logits into routing weights.",
    "biases": "Linear layers have biases.",
    "strategy": "How lanes share the MoE layer's tokens.",
    "backend": "What ranks talk through; `threads`: ranks are threads of one process.",
    "dtype": "Of weights and activations.",
    "zero": "ZeRO stage of DeepSpeed's engine.",
    "gas": "Micro-batches per step.",
    "sequence_parallel_size": "Ulysses size.",
    "lr": "Learning rate; left out: chosen so that a step can be seen.",
    "betas": "Decay rates of Adam and Lion.",
    "eps": "Of Adam.",
    "weight_decay": "Of every optimizer.",
    "momentum": "Of momentum SGD.",
    "load_balance": "Coefficient of the load-balance loss.",
    "z_loss": "Coefficient of the router z-loss.",
    "scope": "Tokens an auxiliary loss counts: of all ranks, or of each alone.",
    "sequences": "Sequences of a micro-batch.",
    "uneven": "Every (dp rank, micro-batch) has another number of tokens.",
}


def _default(value: Any) -> str:
    return "-" if value is None else f"`{json.dumps(value)}`"


def _values(field: Mapping[str, Any]) -> str:
    """Say which values a field takes."""
    if "anyOf" in field:
        options = [option for option in field["anyOf"] if option != {"type": "null"}]
        return " or ".join(map(_values, options))
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: {_values(field['prefixItems'][0])}"
    kinds = {"integer": "integer", "number": "number", "boolean": "`true`, `false`",
             "string": "text", "object": "table", "array": "list"}  # fmt: skip
    kind = kinds[field["type"]]
    for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="),
                      ("exclusiveMaximum", "<")):  # fmt: skip
        if key in field:
            kind += f" {sign} {field[key]:g}"
    return kind


def _said(section: type[case.Part]) -> dict[str, str]:
    """Read the docstrings under the fields of a class; Python itself does not keep them."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    said = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            text = below.value.value  # type: ignore[attr-defined]
            said[field.target.id] = " ".join(str(text).split()).replace("|", "\\|")
    return said
