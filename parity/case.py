"""A case: model x shape x engine x data, read from TOML and checked before any rank starts.

Owns every field a case may have, its defaults, what is refused, and the ids. Must not know torch.
Easy to get wrong: the seed is not an axis, two cases with one id are one case.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parity.errors import CaseError
from parity.layout import Layout

TIED = 3
"""Experts in a group of exact ties: one, two or four chosen experts always cut a group."""

MAX_WORLD = 4096
"""Ranks no one starts for a tiny model; sizes that divide a world are counted up to it."""
MAX_SEED = 10**9
"""Seeds are spread by factors of 1000 (draws, steps) and must still fit a generator's 64 bits."""
DAY_S = 86_400.0
"""After which collectives give up by themselves (`parity.rank.NO_TIMEOUT`)."""
SMALLEST, LARGEST = 1e-30, 1e3
"""Of factors: outside, float32 overflows or has nothing left, and a right run looks wrong."""

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0.0, le=LARGEST)]
Factor = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]


class Part(BaseModel):
    """Frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Part):
    """Sizes the user gives; dp and edp are derived by `parity.layout.Layout`."""

    world: Annotated[int, Field(ge=1, le=MAX_WORLD)]
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
    vocab: Annotated[int, Field(ge=2)] = 37
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
    lr: Factor | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Factor = 1e-8
    weight_decay: Coefficient = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9


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
    """Further sections handed to the engine's config as they are, but for keys that fields of the
    case set; of them the reference follows `folding.correction_bias_rate`."""


class Auxiliary(Part):
    """Auxiliary router losses added to each micro-batch's loss."""

    load_balance: Coefficient = 0.0
    z_loss: Coefficient = 0.0
    scope: Literal["global", "rank"] = "rank"

    @property
    def active(self) -> bool:
        """Tell whether there is any; a scope alone is none."""
        return self.load_balance > 0 or self.z_loss > 0


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
    step_scale: Factor = 1.0
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
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    deadline_s: Annotated[float, Field(gt=0.0, le=DAY_S)] = 60.0
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
IDENTITY = ("id", "suite", "file", "implementation")


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
        if key not in SECTIONS and key not in IDENTITY:
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
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


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
    eps = [
        d
        for d in _divisors(shape.world)
        if model.experts % d == 0 and shape.world % (d * shape.etp) == 0
    ]
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
        experts, top_k = case.model.experts, case.model.top_k
        if experts % 4 or experts < 8:
            problem = "the experts are chosen from 4 groups, which sigmoids rank by two of each"
            yield _Problem("model.experts", experts, problem, "multiples of 4 from 8 on")
        if 2 * top_k > experts:
            problem = f"2 of 4 groups of the {experts} experts are kept"
            yield _Problem("model.top_k", top_k, problem, f"at most {experts // 2}")
    if name != "mixtral" and case.model.layers < 2:
        problem = "the first block is dense"
        yield _Problem("model.layers", case.model.layers, problem, "2 or more")
    for key, value, only in fixed:
        if value != only:
            yield _Problem(key, value, f"model {name} has its own", [only])


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
    if 0.0 < engine.clip < SMALLEST:
        problem = "too small a limit for float32"
        yield _Problem("engine.clip", engine.clip, problem, f"0 (off), {SMALLEST:g} and more")
    for beta in case.optimizer.betas:
        if not 0.0 <= beta < 1.0:
            yield _Problem("optimizer.betas", beta, "is not a decay rate", "0 <= beta < 1")


OWNED: Mapping[str, str] = {
    "train_batch_size": "data.sequences and engine.gas",
    "train_micro_batch_size_per_gpu": "data.sequences",
    "gradient_accumulation_steps": "engine.gas",
    "gradient_clipping": "engine.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.lr",
    "tensor_parallel.autotp_size": "shape.tp",
    "tensor_parallel.preset_model": "model.name",
    "expert_parallel.enabled": "shape.ep",
    "expert_parallel.autoep_size": "shape.ep",
    "expert_parallel.expert_tensor_parallel_size": "shape.etp",
    "expert_parallel.preset_model": "model.name",
    "pipeline.stages": "shape.pp",
    "sequence_parallel_size": "engine.sequence_parallel_size",
    "zero_optimization.stage": "engine.zero",
    "bf16.enabled": "engine.dtype",
    "fp16.enabled": "engine.dtype",
    "fp16.loss_scale": "engine.dtype",
    "folding.engine": "engine.name",
    "folding.strategy": "engine.strategy",
    "folding.preset": "model",
    "folding.load_balance_coef": "auxiliary.load_balance",
    "folding.z_loss_coef": "auxiliary.z_loss",
    "folding.aux_scope": "auxiliary.scope",
}
"""Key of an engine's config that the harness writes -> the field of the case that sets it."""


def _option_problems(case: Case) -> Iterator[_Problem]:
    """Find options that would contradict what the reference computes."""
    for key, value in flatten(case.engine.options).items():
        for owned, field in OWNED.items():
            if f"{key}.".startswith(f"{owned}.") or owned.startswith(f"{key}."):
                problem = f"{owned} follows from the case"
                yield _Problem(f"{_OPTIONS}{key}", value, problem, f"leave it out, set {field}")
    rate = case.engine.options.get("folding", {}).get("correction_bias_rate", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= LARGEST:
        key = f"{_OPTIONS}folding.correction_bias_rate"
        yield _Problem(key, rate, "is no step of a bias", f"0 to {LARGEST:g}")


def _checkpoint_problems(case: Case) -> Iterator[_Problem]:
    """Find a checkpoint that cannot be taken, or a target that does not tile."""
    if case.checkpoint is None:
        return
    if case.steps < 2:
        yield _Problem("steps", case.steps, "no step is left behind the checkpoint", "2 or more")
    try:
        target = case.resumed_shape
    except ValueError:
        forms = ["resume", f"reshard:w<world>-tp<tp>-ep<ep>-etp<etp>, a world of 1 to {MAX_WORLD}"]
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
        _option_problems(case),
        _checkpoint_problems(case),
    )
    for key, value, problem, allowed in problems:
        raise CaseError(
            problem, file=case.file, case=case.id, key=key, value=value, allowed=allowed
        )


def first_complaint(problems: ValidationError) -> Mapping[str, Any]:
    """Choose the complaint to show: a mistyped key also leaves the right one missing."""
    errors = problems.errors()
    return next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])


def schema_refusal(error: Mapping[str, Any], *, file: str, case: str | None) -> CaseError:
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
    return [key for key in Case.model_fields if key not in IDENTITY]


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
    for key in IDENTITY:
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
        raise schema_refusal(first_complaint(problems), file=file, case=name) from None
    check(case)
    return case
