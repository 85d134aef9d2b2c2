"""A case: model x shape x engine x data, read from TOML and checked before any rank starts.

Owns every field a case may have, its defaults, what is refused, and the ids. Must not know torch.
Easy to get wrong: the seed is not an axis, two cases with one id are one case.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parity.covering import Constraint, Coverage, coverage, covering
from parity.errors import CaseError, NothingSelectedError, UsageError
from parity.layout import Layout

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

DEFAULT_SUITE = "seed"
TIED = 3
"""Experts in a group of exact ties: one, two or four chosen experts always cut a group."""

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0.0)]


class Part(BaseModel):
    """Frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Part):
    """Sizes the user gives; dp and edp are derived by `parity.layout.Layout`."""

    world: Positive
    tp: Positive = 1
    ep: Positive = 1
    etp: Positive = 1
    pp: Positive = 1


class Model(Part):
    """A small transformer: `tiny` of `parity.models`, or a Hugging Face one from a tiny config."""

    name: Literal["tiny", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"] = "tiny"
    layers: Positive = 2
    hidden: Annotated[int, Field(ge=48)] = 48
    heads: Positive = 12
    mlp_width: Positive = 60
    vocab: Positive = 37
    experts: Annotated[int, Field(ge=4)] = 12
    expert_width: Positive = 12
    top_k: Positive = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    """Divide the chosen routing weights by their sum."""
    shared_width: Annotated[int, Field(ge=0)] = 0
    """Width of one shared expert beside the routed ones; 0: none."""
    biases: bool = False
    tied: bool = False
    """Embedding and head share one weight."""


class Optimizer(Part):
    """Optimizer and its constants; lr None: chosen so that a step is near the weights' size."""

    name: Literal["sgd", "momentum", "adam", "adamw", "lion"] = "sgd"
    lr: Annotated[float, Field(gt=0.0)] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Coefficient = 0.0
    momentum: float = 0.9


class Engine(Part):
    """How the implementation is asked to run."""

    name: Literal["native", "deepspeed"] = "native"
    strategy: Literal["route_full"] = "route_full"
    backend: Literal["gloo", "nccl", "threads"] = "gloo"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    zero: Annotated[int, Field(ge=0, le=3)] | None = None
    gas: Positive = 1
    clip: Coefficient = 0.0
    """Largest allowed global gradient norm as a fraction of the reference's own norm; 0: off."""
    sequence_parallel_size: Positive = 1
    options: dict[str, Any] = {}
    """Further sections handed to the engine's config as they are; of them the reference follows
    `folding.correction_bias_rate`."""


class Auxiliary(Part):
    """Auxiliary router losses added to each micro-batch's loss."""

    load_balance: Coefficient = 0.0
    z_loss: Coefficient = 0.0
    scope: Literal["global", "rank"] = "rank"


class Data(Part):
    """Tokens of the case; by default every (dp rank, micro-batch) has another number of them."""

    sequences: Positive = 1
    length: Positive = 5
    """Shortest sequence; the n-th (dp rank, micro-batch) is n tokens longer when uneven."""
    uneven: bool = True
    idle_expert: bool = True
    """Make the last expert of every layer one that no token chooses."""
    lane_varying: bool = False
    """Add to each lane's loss its own linear probe of every MoE output."""
    ties: bool = False
    """Tie experts exactly, in threes: their logits are one and the same entry of the input."""
    step_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor on the token losses of each step over those of the one before."""


class Case(Part):
    """One cell: everything that fixes what is computed, except the seed's redraws."""

    id: str
    suite: str
    file: str
    shape: Shape
    model: Model = Model()
    engine: Engine = Engine()
    optimizer: Optimizer = Optimizer()
    auxiliary: Auxiliary = Auxiliary()
    data: Data = Data()
    steps: Positive = 1
    seed: int = 0
    deadline_s: Annotated[float, Field(gt=0.0)] = 60.0
    implementation: str | None = None
    """What its file is about; None: whatever the run judges."""
    checkpoint: str | None = None
    """Save after half of the steps and run the rest again from there: `resume` at the same
    layout, or at another one: `reshard:w4-tp2-ep2-etp1` (sizes of 1 may be left out)."""

    @property
    def layout(self) -> Layout:
        """Give the rank algebra of the folded run."""
        return Layout(**self.shape.model_dump())

    @property
    def correction_bias_rate(self) -> float:
        """Give the step of the routers' correction biases that the engine is asked for; 0: none."""
        return float(self.engine.options.get("folding", {}).get("correction_bias_rate", 0.0))

    @property
    def saved_after(self) -> int:
        """Give the step after which a case with a checkpoint saves."""
        return self.steps // 2

    @property
    def resumed_shape(self) -> Shape:
        """Give the shape the steps after the checkpoint are run at a second time.

        Raises:
            ValueError: the target of a reshard cannot be read.
        """
        if self.checkpoint in (None, "resume"):
            return self.shape
        sizes = _RESHARD.fullmatch(str(self.checkpoint))
        if sizes is None:
            raise ValueError(self.checkpoint)
        given = {key: int(size) for key, size in sizes.groupdict().items() if size is not None}
        return Shape(**given)


_RESHARD = re.compile(
    r"reshard:w(?P<world>[1-9]\d*)(?:-tp(?P<tp>[1-9]\d*))?(?:-ep(?P<ep>[1-9]\d*))?"
    r"(?:-etp(?P<etp>[1-9]\d*))?"
)


# --- the flat form: dotted key -> value -------------------------------------------------------
#
# TOML may write `model.top_k = 1`, `"model.top_k" = 1` or `[model] top_k = 1`; all three become
# {"model.top_k": 1}, so that merging base, axes and overrides is a plain dict update.

Flat = dict[str, Any]
SECTIONS: dict[str, type[Part]] = {
    "shape": Shape,
    "model": Model,
    "engine": Engine,
    "optimizer": Optimizer,
    "auxiliary": Auxiliary,
    "data": Data,
}
_IDENTITY = ("id", "suite", "file", "implementation")


def flatten(table: Mapping[str, Any], prefix: str = "") -> Flat:
    """Turn nested tables into dotted keys."""
    flat: Flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested tables; a scalar where a table is needed stays a scalar."""
    root: dict[str, Any] = {}
    for key, value in sorted(flat.items()):
        *tables, leaf = key.split(".")
        at = root
        for name in tables:
            inner = at.setdefault(name, {})
            if not isinstance(inner, dict):
                break
            at = inner
        else:
            at[leaf] = value
    return root


def _defaults() -> Flat:
    """List every field of a case with its default; required ones map to None."""
    flat: Flat = {}
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            flat[f"{name}.{key}"] = None if field.is_required() else field.default
    for key, field in Case.model_fields.items():
        if key not in SECTIONS and key not in _IDENTITY:
            flat[key] = field.default
    return flat


DEFAULTS: Flat = _defaults()

# --- ids --------------------------------------------------------------------------------------


class Token(NamedTuple):
    """How one field shows in an id: `prefix + value`, or the prefix alone at its usual value."""

    key: str
    prefix: str
    usual: object = None


_TOKENS = (
    Token("shape.tp", "tp"),
    Token("shape.ep", "ep"),
    Token("shape.etp", "etp"),
    Token("shape.pp", "pp"),
    Token("engine.name", "ds", "deepspeed"),
    Token("engine.zero", "z"),
    Token("engine.backend", ""),
    Token("engine.strategy", ""),
    Token("engine.gas", "gas"),
    Token("engine.clip", "clip", 0.5),
    Token("auxiliary.load_balance", "aux", 0.02),
    Token("auxiliary.z_loss", "zloss", 1e-3),
    Token("data.lane_varying", "lanes", True),
    Token("data.uneven", "even", False),
    Token("data.idle_expert", "busy", False),
    Token("data.ties", "ties", True),
    Token("data.step_scale", "scaled", 0.3),
    Token("data.sequences", "B"),
    Token("data.length", "T"),
    Token("model.top_k", "k"),
    Token("model.score", ""),
    Token("model.normalize", "unnormalized", False),
    Token("model.shared_width", "shared", 24),
    Token("model.biases", "bias", True),
    Token("model.tied", "tied", True),
    Token("model.layers", "L"),
    Token("model.hidden", "H"),
    Token("model.heads", "heads"),
    Token("model.mlp_width", "mlp"),
    Token("model.experts", "E"),
    Token("model.expert_width", "F"),
    Token("model.vocab", "V"),
    Token("model.name", ""),
    Token("engine.sequence_parallel_size", "sp"),
    Token("steps", "steps"),
    Token("checkpoint", ""),
)
_OPTIONS = "engine.options."
_OPTION_TOKENS = (
    Token("zero_optimization.overlap_comm", "overlap", True),
    Token("zero_optimization.contiguous_gradients", "scattered", False),
    Token("zero_optimization.reduce_scatter", "allreduce", False),
    Token("zero_optimization.reduce_bucket_size", "bucket"),
    Token("data_types.grad_accum_dtype", "acc_"),
    Token("bf16.immediate_grad_update", "immediate", True),
    Token("adapter.reduction", ""),
    Token("adapter.partition", ""),
)
"""Options of engines that ids spell out; all others share a hash."""
_LAST = ("optimizer.name", "engine.dtype")
_UNNAMED = ("shape.world", "auxiliary.scope", "seed", "deadline_s", *_LAST)
"""Fields without a token of their own: shown in another place, or not part of what is computed."""
_DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def identify(flat: Mapping[str, Any]) -> str:
    """Name a case: the shape, whatever differs from the defaults, then optimizer and dtype.

    Works on unchecked values too, so that a refusal can say which case it is about.
    """
    given = {**DEFAULTS, **flat}
    if given["engine.name"] == "deepspeed" and given["engine.zero"] is not None:
        given["engine.name"] = DEFAULTS["engine.name"]  # -z2 says that DeepSpeed's engine runs
    named = [*_TOKENS, *_further_tokens()]
    parts = [f"w{_text(given['shape.world'])}"]
    parts += [_show(t, given) for t in named if given[t.key] != DEFAULTS[t.key]]
    parts += _options_token(flat)
    parts += [_text(given["optimizer.name"]), _DTYPES.get(str(given["engine.dtype"]), "fp?")]
    return "-".join(parts)


def _further_tokens() -> list[Token]:
    """Make tokens for fields the table above does not name, so that no field is left out."""
    known = {*_UNNAMED, "engine.options", *(t.key for t in _TOKENS)}
    return [Token(key, key.rpartition(".")[2]) for key in DEFAULTS if key not in known]


def _show(token: Token, given: Mapping[str, Any]) -> str:
    value = given[token.key]
    text = token.prefix + ("" if value == token.usual else _text(value))
    is_auxiliary = token.key.startswith("auxiliary.")
    return text + "g" if is_auxiliary and given["auxiliary.scope"] == "global" else text


def _options_token(flat: Mapping[str, Any]) -> list[str]:
    """Spell out the known options, then hash what is left."""
    options = {k.removeprefix(_OPTIONS): v for k, v in flat.items() if k.startswith(_OPTIONS)}
    parts = []
    for token in _OPTION_TOKENS:
        if token.key in options:
            value = options.pop(token.key)
            parts.append(token.prefix + ("" if value == token.usual else _text(value)))
    if options:
        named = {_OPTIONS + key: value for key, value in options.items()}
        canonical = json.dumps(named, sort_keys=True, default=str)
        parts.append(f"options{hashlib.sha256(canonical.encode()).hexdigest()[:6]}")
    return parts


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return "_".join(map(_text, value))
    plain = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._+]+", "_", plain) if value is not None else "?"


# --- what is refused --------------------------------------------------------------------------


class _Problem(NamedTuple):
    key: str
    value: object
    problem: str
    allowed: Sequence[object] | str


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _tiling_problems(shape: Shape, model: Model) -> Iterator[_Problem]:
    """Find sizes that do not tile the ranks or the model, each with the values that would do."""
    if shape.pp > 1:
        yield _Problem("shape.pp", shape.pp, "pipeline stages are not supported yet", [1])
        return
    widths = {"model.heads": model.heads, "model.mlp_width": model.mlp_width}
    if model.shared_width:
        widths["model.shared_width"] = model.shared_width
    tps = [d for d in _divisors(shape.world) if not any(w % d for w in widths.values())]
    if shape.world % shape.tp:
        yield _Problem("shape.tp", shape.tp, f"does not divide world {shape.world}", tps)
    for key, width in widths.items():
        if width % shape.tp:
            yield _Problem("shape.tp", shape.tp, f"does not divide {key} {width}", tps)
    etps = [d for d in _divisors(shape.world) if model.expert_width % d == 0]
    if model.expert_width % shape.etp:
        problem = f"does not divide model.expert_width {model.expert_width}"
        yield _Problem("shape.etp", shape.etp, problem, etps)
    eps = [d for d in _divisors(model.experts) if shape.world % (d * shape.etp) == 0]
    if shape.world % (shape.ep * shape.etp):
        problem = f"ep*etp = {shape.ep * shape.etp} does not divide world {shape.world}"
        if eps:
            yield _Problem("shape.ep", shape.ep, problem, eps)
        yield _Problem("shape.etp", shape.etp, problem, etps)
    if model.experts % shape.ep:
        yield _Problem("shape.ep", shape.ep, f"does not divide model.experts {model.experts}", eps)


def _tie_problems(case: Case) -> Iterator[_Problem]:
    """Find what would leave no tie where the last expert is chosen, or one that is not exact."""
    top_k = case.model.top_k
    if case.data.ties and top_k % TIED == 0:
        problem = f"experts tie in groups of {TIED} (data.ties): none is cut by the choice"
        yield _Problem("model.top_k", top_k, problem, f"not a multiple of {TIED}")
    if case.data.ties and case.steps > 1:
        problem = "after a step tied rows have moved: equal only up to round-off (data.ties)"
        yield _Problem("steps", case.steps, problem, [1])


def _model_problems(model: Model, idle_expert: bool) -> Iterator[_Problem]:
    """Find model sizes that contradict one another."""
    if model.hidden % model.heads:
        problem = f"model.hidden {model.hidden} is not a multiple of the heads"
        yield _Problem("model.heads", model.heads, problem, _divisors(model.hidden))
    choosable = model.experts - idle_expert
    if model.top_k > choosable:
        problem = f"only {choosable} of {model.experts} experts can be chosen"
        problem += " (data.idle_expert keeps one out)" if idle_expert else ""
        yield _Problem("model.top_k", model.top_k, problem, f"1 to {choosable}")


def _hugging_face_problems(case: Case) -> Iterator[_Problem]:
    """Find what a model of transformers does not offer."""
    name = case.model.name
    if name == "tiny":
        return
    fixed: list[tuple[str, object, object]] = [
        ("model.biases", case.model.biases, False),
        ("model.shared_width", case.model.shared_width, 0),
        ("model.score", case.model.score, "softmax"),
        ("data.lane_varying", case.data.lane_varying, False),
        ("data.ties", case.data.ties, False),
        ("auxiliary.z_loss", case.auxiliary.z_loss, 0.0),
        ("auxiliary.scope", case.auxiliary.scope, "rank"),
    ]
    if name.startswith("deepseek"):
        fixed.append(("auxiliary.load_balance", case.auxiliary.load_balance, 0.0))
        groups = [n for n in range(4, case.model.experts + 5) if n % 4 == 0]
        if case.model.experts % 4:
            problem = "the experts are chosen from 4 groups"
            yield _Problem("model.experts", case.model.experts, problem, groups)
    if name != "mixtral" and case.model.layers < 2:
        problem = "the first block is dense"
        yield _Problem("model.layers", case.model.layers, problem, "2 or more")
    for key, value, only in fixed:
        if value != only:
            yield _Problem(key, value, f"model {name} has its own", [only])
    if case.engine.dtype in ("bfloat16", "float16") and case.engine.name == "native":
        problem = f"the gate of {name} cannot replay a routing"
        yield _Problem("engine.dtype", case.engine.dtype, problem, ["float64", "float32"])


def _engine_problems(case: Case) -> Iterator[_Problem]:
    """Find engine options that cannot work together."""
    engine = case.engine
    if case.shape.tp > 1 and engine.sequence_parallel_size > 1:
        yield _Problem(
            "engine.sequence_parallel_size",
            engine.sequence_parallel_size,
            f"Ulysses cannot be combined with tensor parallelism (shape.tp = {case.shape.tp})",
            [1],
        )
    if engine.name == "native" and engine.zero is not None:
        problem = 'ZeRO belongs to DeepSpeed; leave it out or set engine.name = "deepspeed"'
        yield _Problem("engine.zero", engine.zero, problem, "leave the key out")
    if engine.name == "deepspeed" and engine.backend == "threads":
        problem = "DeepSpeed keeps module-level state and cannot run in threads"
        yield _Problem("engine.backend", engine.backend, problem, ["gloo", "nccl"])
    if engine.name == "deepspeed" and engine.dtype == "float64":
        allowed = ["float32", "bfloat16", "float16"]
        yield _Problem("engine.dtype", engine.dtype, "DeepSpeed has no float64 engine", allowed)
    for beta in case.optimizer.betas:
        if not 0.0 <= beta < 1.0:
            yield _Problem("optimizer.betas", beta, "is not a decay rate", "0 <= beta < 1")


def _checkpoint_problems(case: Case) -> Iterator[_Problem]:
    """Find a checkpoint that cannot be taken, or a target that does not tile."""
    if case.checkpoint is None:
        return
    if case.steps < 2:
        yield _Problem("steps", case.steps, "no step is left behind the checkpoint", "2 or more")
    try:
        target = case.resumed_shape
    except ValueError:
        forms = ["resume", "reshard:w<world>-tp<tp>-ep<ep>-etp<etp>"]
        yield _Problem("checkpoint", case.checkpoint, "is no checkpoint", forms)
        return
    if case.checkpoint != "resume" and target == case.shape:
        yield _Problem("checkpoint", case.checkpoint, "is the case's own shape", ["resume"])
    if target != case.shape and case.data.lane_varying:
        problem = "other lanes would have other consumers (data.lane_varying)"
        yield _Problem("checkpoint", case.checkpoint, problem, ["resume"])
    for key, value, problem, allowed in _tiling_problems(target, case.model):
        said = f"{key.removeprefix('shape.')} {value} {problem}"
        yield _Problem("checkpoint", case.checkpoint, said, allowed)


def check(case: Case) -> None:
    """Refuse a case that cannot be run as written.

    Raises:
        CaseError: names the first key at fault, its value and the values that would do.
    """
    problems = itertools.chain(
        _model_problems(case.model, case.data.idle_expert),
        _tie_problems(case),
        _hugging_face_problems(case),
        _tiling_problems(case.shape, case.model),
        _engine_problems(case),
        _checkpoint_problems(case),
    )
    for key, value, problem, allowed in problems:
        raise CaseError(
            problem, file=case.file, case=case.id, key=key, value=value, allowed=allowed
        )


def _first(problems: ValidationError) -> Mapping[str, Any]:
    """Choose the complaint to show: a mistyped key also leaves the right one missing."""
    errors = problems.errors()
    return next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])


def _schema_refusal(error: Mapping[str, Any], *, file: str, case: str | None) -> CaseError:
    """Word pydantic's first complaint as one message that names every allowed value."""
    loc = [str(part) for part in error["loc"]]
    where: dict[str, Any] = {"file": file, "case": case, "key": ".".join(loc)}
    if error["type"] == "missing":
        return CaseError("required key is missing", **where)
    where["value"] = error["input"]
    if error["type"] == "extra_forbidden":
        return CaseError("unknown key", **where, allowed=_siblings(loc))
    allowed = (error.get("ctx") or {}).get("expected") or error["msg"]
    return CaseError("value not allowed", **where, allowed=_plain(str(allowed)))


def _siblings(loc: Sequence[str]) -> list[str]:
    if len(loc) > 1 and loc[0] in SECTIONS:
        return list(SECTIONS[loc[0]].model_fields)
    return [key for key in Case.model_fields if key not in _IDENTITY]


def _plain(message: str) -> str:
    return message.removeprefix("Input should be ").replace("an object", "a table")


def make(
    flat: Mapping[str, Any],
    *,
    suite: str,
    file: str,
    id: str | None = None,
    implementation: str | None = None,
) -> Case:
    """Build one checked case out of its flat form.

    Raises:
        CaseError: a key is unknown, or a value is not allowed.
    """
    name = id if id is not None else identify(flat)
    for key in _IDENTITY:
        if key in flat:
            raise CaseError(
                "cannot be set here", file=file, case=name, key=key, value=flat[key],
                allowed=_siblings([]),
            )  # fmt: skip
    identity = {"id": name, "suite": suite, "file": file, "implementation": implementation}
    fields = {"shape": {}, **nest(flat), **identity}
    try:  # strict JSON mode: no "3" for 3, no true for 1, yet lists are good for tuples
        case = Case.model_validate_json(json.dumps(fields, default=repr), strict=True)
    except ValidationError as problems:
        raise _schema_refusal(_first(problems), file=file, case=name) from None
    check(case)
    return case


# --- files ------------------------------------------------------------------------------------


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
    base: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    sample: Literal["product", "pairwise"] = "product"
    """Cells of the matrix: all, or so many that every possible pair of axis values occurs."""
    cells: Positive | None = None
    """Fewest cells of a pairwise sample."""
    override: list[Override] = []
    exclude: list[Exclude] = []
    case: list[dict[str, Any]] = []


def is_case_file(path: Path) -> bool:
    """Say whether a file declares a suite, even where the rest of it is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"^\s*suite\s*=", text, re.MULTILINE) is not None


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
        return CaseFile.model_validate(table)
    except ValidationError as problems:
        raise _file_refusal(_first(problems), file) from None


def _file_refusal(error: Mapping[str, Any], file: str) -> CaseError:
    refusal = _schema_refusal(error, file=file, case=None)
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
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", str(name)):
            raise CaseError("not an id", file=file, key="case.id", value=name,
                            allowed="letters, digits, and . _ + - after the first")  # fmt: skip
        cell = _merge(flatten(parsed.base), fields)
        yield make(
            cell,
            suite=parsed.suite,
            file=file,
            id=name and str(name),
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
    """Load every file of a folder, in the order of the file names.

    Raises:
        CaseError: a file is refused, or one suite uses an id twice.
    """
    files = sorted(folder.glob("*.toml"))
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
    fields = {k: v for k, v in source["properties"].items() if k not in _IDENTITY}
    for name, section in SECTIONS.items():
        for key, field in definitions[section.__name__]["properties"].items():
            fields[f"{name}.{key}"] = field
    when = {"type": "object", "minProperties": 1, "description": "key -> value, or any of a list"}
    entry = {"type": "object", "properties": fields, "additionalProperties": False}
    single = {**entry, "properties": {"id": {"type": "string"}, **fields}}
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
