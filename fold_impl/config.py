"""The DeepSpeed-style config of folding, and every refusal.

Owns which keys are read, their defaults, and how they agree with one another. Must not know
torch; DeepSpeed is asked for the keys it knows only where a config uses keys this file does not
read itself. Easy to get wrong: a check that depends on the rank would hang the others, so nothing
here looks at a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fold_impl.layout import FoldLayout, LayoutError, divisors
from fold_impl.section import (
    BETAS,
    BOOLEAN,
    COEFFICIENT,
    NAME,
    POSITIVE,
    TABLE,
    Check,
    ConfigError,
    Section,
    Unsupported,
    deepspeed_keys,
    one_of,
    optional,
    section_keys,
    unknown_key,
)

__all__ = ["ConfigError", "FoldConfig", "OptimizerConfig", "SchedulerConfig", "Unsupported"]

Engine = Literal["native", "deepspeed"]
AuxScope = Literal["rank", "global"]
STRATEGIES = ("route_full",)
BUCKET_NUMEL = 1 << 26
"""Elements of one flat collective: 256 MiB in float32, above which NCCL no longer gains."""
PRESET_MODELS = ("mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3")

LAYOUT_KEYS = {
    "world_size": "world_size",
    "pp_size": "pipeline.stages",
    "tp_size": "tensor_parallel.autotp_size",
    "ep_size": "expert_parallel.autoep_size",
    "etp_size": "expert_parallel.expert_tensor_parallel_size",
}
"""Argument of `FoldLayout` -> config key that sets it."""

NATIVE_KEYS = (
    "tensor_parallel",
    "expert_parallel",
    "folding",
    "pipeline",
    "sequence_parallel_size",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "steps_per_print",
    "zero_optimization",
    "bf16",
    "fp16",
    "compile",
)
"""Top-level keys both engines read; the last four only to be switched off natively."""

NOT_KEYS = {
    "data_parallel_size": "derived from the other sizes, cannot be set",
    "expert_data_parallel_size": "derived from the other sizes, cannot be set",
    "bfloat16": "an old spelling of bf16",
}
"""Top-level keys DeepSpeed or a user might take for ones -> why they are refused."""

OFF: Mapping[str, tuple[object, ...]] = {
    "compile.deepcompile": (False,),
    "zero_optimization.offload_optimizer": (None, {"device": "none"}),
    "zero_optimization.offload_param": (None, {"device": "none"}),
    "zero_optimization.cpu_offload": (None, False),
    "zero_optimization.cpu_offload_param": (None, False),
    "zero_optimization.zenflow": (None,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "use_data_before_expert_parallelism": (False,),
    "hybrid_engine.enabled": (False,),
    "torch_autocast.enabled": (False,),
    "data_efficiency.enabled": (False,),
    "autotuning.enabled": (False,),
    "elasticity.enabled": (False,),
    "moe.enabled": (False,),
    "weight_quantization": (None,),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1.0,),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "zero_optimization.reduce_scatter": (True,),
    "zero_optimization.round_robin_gradients": (False,),
    "zero_optimization.compute_grad_norm": (True,),
    "sparse_gradients": (False,),
    "amp.enabled": (False,),
}
"""Dotted key that folding does not support yet -> the values that leave it off."""

PRECISIONS = {None: "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Precision of the model -> how DeepSpeed's `data_types` spells it."""
PRECISION_SPELLINGS = {
    **dict.fromkeys(("fp32", "float32", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "torch.float16"), "fp16"),
}

ADAM_PARAMS: Mapping[str, Check] = {
    "lr": COEFFICIENT,
    "betas": BETAS,
    "eps": COEFFICIENT,
    "weight_decay": COEFFICIENT,
    "adam_w_mode": BOOLEAN,
    "torch_adam": BOOLEAN,
}
OPTIMIZERS: Mapping[str, Mapping[str, Check]] = {
    "SGD": {
        "lr": COEFFICIENT,
        "momentum": COEFFICIENT,
        "dampening": COEFFICIENT,
        "weight_decay": COEFFICIENT,
        "nesterov": BOOLEAN,
    },
    "Adam": ADAM_PARAMS,
    "AdamW": ADAM_PARAMS,
    "Lion": {"lr": COEFFICIENT, "betas": BETAS, "weight_decay": COEFFICIENT},
}
"""Optimizer, as DeepSpeed and torch spell it -> its parameters."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer by its exact name, with checked parameters."""

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decoupled_weight_decay(self) -> bool:
        """Whether decay bypasses the moments: in DeepSpeed also "Adam", unless told not to."""
        by_default = self.type == "Adam" and self.params.get("adam_w_mode", True)
        return self.type in ("AdamW", "Lion") or bool(by_default)


@dataclass(frozen=True)
class SchedulerConfig:
    """Learning-rate schedule, built by DeepSpeed."""

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldConfig:
    """What folding reads from a config; made by `from_dict`, which refuses what cannot be done."""

    layout: FoldLayout
    engine: Engine = "native"
    strategy: str = "route_full"
    preset_model: str | None = None
    preset: Mapping[str, Any] | None = None
    """Inline description of a model's MoE blocks, for models without a preset name."""
    load_balance_coef: float = 0.0
    z_loss_coef: float = 0.0
    coalesce_grad_reduction: bool = False
    """ZeRO-1/2: keep gradients local until the last micro-batch, then reduce them once."""
    bucket_numel: int = BUCKET_NUMEL
    """Elements of one flat gradient collective of the native engine."""
    correction_bias_rate: float = 0.0
    """Step of the routers' correction bias towards an even load; 0 is off."""
    aux_scope: AuxScope = "rank"
    """Tokens an auxiliary loss is a function of, per micro-batch: this dp rank's, or all."""
    train_batch_size: int = 1
    train_micro_batch_size_per_gpu: int = 1
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 0.0
    """Largest global norm; 0 is off, and unlike in DeepSpeed the default."""
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    zero_stage: int = 0
    dtype: Literal["bfloat16", "float16"] | None = None
    """Mixed precision of the DeepSpeed engine; None: the model's own dtype."""
    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The config as it was given."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], world_size: int) -> FoldConfig:
        """Read a DeepSpeed-style config for a world of ranks.

        Raises:
            ConfigError: a key, a value, or two values that disagree; names key, value, allowed.
            Unsupported: a valid wish that folding does not fulfil yet.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("not a table", "config", config, "a DeepSpeed-style dict")
        top = Section("", config)
        sizes, fields = _read_parallel(top)
        layout = _layout(world_size, sizes)
        _refuse_combinations(top, layout)
        fields |= _read_folding(top.section("folding"), fields["preset_model"])
        fields |= _read_precision(top)
        fields |= _read_batch(top, layout.dp_size)
        fields |= _read_training(top)
        fields["engine"] = _engine(fields.pop("engine"), fields)
        _refuse_not_yet(config)
        if fields["engine"] == "deepspeed":
            _refuse_paths(config, layout, fields, _read_accumulation(top))
        fields |= _read_rest(top, fields["engine"])
        return cls(layout=layout, source=copy.deepcopy(dict(config)), **fields)

    def check_model(
        self,
        *,
        num_experts: int | None = None,
        expert_width: int | None = None,
        num_heads: int | None = None,
        **dense_sizes: int | None,
    ) -> None:
        """Refuse sizes of a model that the layout cannot cut evenly.

        Args:
            num_experts: Routed experts of a MoE layer, cut over ep.
            expert_width: Inner width of a routed expert, cut over etp.
            num_heads: Attention heads, cut over tp.
            **dense_sizes: Further sizes cut over tp, such as num_kv_heads, mlp_width or vocab_size.

        Raises:
            ConfigError: a size is not a multiple of its axis.
        """
        cuts = [("ep_size", "num_experts", num_experts), ("etp_size", "expert_width", expert_width)]
        cuts += [("tp_size", key, n) for key, n in {"num_heads": num_heads, **dense_sizes}.items()]
        beside = {"ep_size": self.layout.etp_size, "etp_size": self.layout.ep_size}
        for axis, what, size in cuts:
            count, whole = getattr(self.layout, axis), self.layout.stage_size // beside.get(axis, 1)
            if size is not None and size % count:
                fitting = [d for d in divisors(size) if whole % d == 0]
                problem = f"does not divide {what} {size}"
                raise ConfigError(problem, LAYOUT_KEYS[axis], count, fitting)

    def for_deepspeed(self) -> dict[str, Any]:
        """Give the config DeepSpeed's own engine is started with.

        Without the sections folding fulfils itself; batch sizes and clipping are always written
        out, because their defaults differ between releases.
        """
        ours = ("folding", "tensor_parallel", "expert_parallel", "pipeline", "moe", "elasticity")
        passed = {k: v for k, v in copy.deepcopy(dict(self.source)).items() if k not in ours}
        passed.pop("sequence_parallel_size", None)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"):
            passed[key] = getattr(self, key)
        passed["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        if self.optimizer is not None:
            params = copy.deepcopy(dict(self.optimizer.params))
            passed["optimizer"] = {"type": self.optimizer.type, "params": params}
        return passed


def _read_parallel(top: Section) -> tuple[dict[str, int], dict[str, Any]]:
    """Read the two sections folding is made of, and the number of pipeline stages."""
    tensor, expert = top.section("tensor_parallel"), top.section("expert_parallel")
    pipeline = top.section("pipeline")
    tp_preset = tensor.take("preset_model", optional(one_of(*PRESET_MODELS)), None)
    ep_preset = expert.take("preset_model", optional(one_of(*PRESET_MODELS)), None)
    if None not in (tp_preset, ep_preset) and tp_preset != ep_preset:
        key = tensor.at("preset_model")
        raise ConfigError("differs from expert_parallel.preset_model", key, tp_preset, [ep_preset])
    sizes = {
        "pp_size": pipeline.take("stages", POSITIVE, 1),
        "tp_size": tensor.take("autotp_size", POSITIVE, 1),
        **_expert_sizes(expert),
    }
    if (given := tensor.take("partition_config", optional(TABLE), None)) is not None:
        allowed = "a preset, or folding.preset with column and row"
        raise Unsupported("not supported", tensor.at("partition_config"), given, allowed)
    for section in (tensor, expert, pipeline):
        section.close()
    return sizes, {"preset_model": ep_preset or tp_preset}


def _expert_sizes(expert: Section) -> dict[str, int]:
    """Read ep and etp; DeepSpeed would ignore sizes without `enabled`, so they are refused."""
    enabled = expert.take("enabled", BOOLEAN, None)
    ep = expert.take("autoep_size", POSITIVE, 1)
    etp = expert.take("expert_tensor_parallel_size", POSITIVE, 1)
    if enabled is None and ep * etp > 1:
        problem = f"missing beside autoep_size {ep} and expert_tensor_parallel_size {etp}"
        raise ConfigError(problem, expert.at("enabled"), None, BOOLEAN.allowed)
    return {"ep_size": ep, "etp_size": etp} if enabled else {"ep_size": 1, "etp_size": 1}


def _layout(world_size: int, sizes: Mapping[str, int]) -> FoldLayout:
    """Make the layout, its refusals in terms of config keys."""
    try:
        return FoldLayout(world_size, **sizes)
    except LayoutError as error:
        key = LAYOUT_KEYS[error.key]
        raise ConfigError(error.problem, key, error.value, error.allowed) from None


def _refuse_combinations(top: Section, layout: FoldLayout) -> None:
    """Refuse pipeline stages and Ulysses; Ulysses beside tp is a mistake, alone it is to come."""
    if layout.pp_size > 1:
        raise Unsupported("pipeline not supported yet", "pipeline.stages", layout.pp_size, [1])
    key = "sequence_parallel_size"
    ulysses = top.take(key, POSITIVE, 1)
    if ulysses > 1 and layout.tp_size > 1:
        problem = f"Ulysses excludes tensor_parallel.autotp_size {layout.tp_size} (> 1)"
        raise ConfigError(problem, key, ulysses, [1])
    if ulysses > 1:
        raise Unsupported("Ulysses not supported yet", key, ulysses, [1])
    for key, problem in NOT_KEYS.items():
        if key in top.table:
            raise ConfigError(problem, key, top.table[key], "leave it out")


def _read_folding(folding: Section, preset_model: str | None) -> dict[str, Any]:
    """Read the only section with keys of ours."""
    fields: dict[str, Any] = {
        "engine": folding.take("engine", one_of("native", "deepspeed"), None),
        "strategy": folding.take("strategy", one_of(*STRATEGIES), "route_full"),
        "coalesce_grad_reduction": folding.take("coalesce_grad_reduction", BOOLEAN, False),
        "bucket_numel": folding.take("bucket_numel", POSITIVE, BUCKET_NUMEL),
        "preset": folding.take("preset", optional(TABLE), None),
        "load_balance_coef": float(folding.take("load_balance_coef", COEFFICIENT, 0.0)),
        "z_loss_coef": float(folding.take("z_loss_coef", COEFFICIENT, 0.0)),
        "aux_scope": folding.take("aux_scope", one_of("rank", "global"), "rank"),
        "correction_bias_rate": float(folding.take("correction_bias_rate", COEFFICIENT, 0.0)),
    }
    if fields["preset"] is not None and preset_model is not None:
        problem = f"stands beside preset_model {preset_model!r}"
        raise ConfigError(problem, folding.at("preset"), fields["preset"], "one of the two")
    folding.close()
    return fields


def _read_precision(top: Section) -> dict[str, Any]:
    """Read ZeRO stage and mixed precision; stage 3 is to come."""
    zero = top.section("zero_optimization")
    stage = zero.take("stage", one_of(0, 1, 2, 3), 0)
    if stage == 3:
        raise Unsupported("ZeRO-3 not supported yet", zero.at("stage"), 3, [0, 1, 2])
    enabled = {k: top.section(k).take("enabled", BOOLEAN, False) for k in ("bf16", "fp16")}
    if all(enabled.values()):
        raise ConfigError("bf16 is enabled too", "fp16.enabled", True, [False])
    dtype = {"bf16": "bfloat16", "fp16": "float16"}
    return {
        "zero_stage": stage,
        "dtype": next((dtype[key] for key, on in enabled.items() if on), None),
    }


def _read_batch(top: Section, dp_size: int) -> dict[str, Any]:
    """Read the three batch sizes, of which DeepSpeed derives what is missing.

    train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * dp; where
    DeepSpeed would ask for a size because none is given, the micro-batch is 1.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, gas = (top.take(key, optional(POSITIVE), None) for key in keys)
    unit = (micro or 1) * (gas or 1) * dp_size
    per_rank = max(1, (train or unit) // unit)
    if micro is None:
        micro, gas = per_rank, gas or 1
    elif gas is None:
        gas = per_rank
    if train not in (None, micro * gas * dp_size):
        problem = f"is not micro batch {micro} * accumulation {gas} * dp {dp_size}"
        free = sum(key in top.table for key in keys) < len(keys)
        allowed = f"multiples of {unit}" if free else [unit]
        raise ConfigError(problem, "train_batch_size", train, allowed)
    return dict(zip(keys, (micro * gas * dp_size, micro, gas), strict=True))


def _read_training(top: Section) -> dict[str, Any]:
    """Read clipping, optimizer and printing."""
    return {
        "gradient_clipping": float(top.take("gradient_clipping", COEFFICIENT, 0.0)),
        "optimizer": _read_optimizer(top),
        "steps_per_print": top.take("steps_per_print", optional(POSITIVE), None),
    }


def _read_optimizer(top: Section) -> OptimizerConfig | None:
    section = top.section("optimizer")
    if not section.table:
        return None
    given = section.take("type", NAME)
    name = next((name for name in OPTIMIZERS if name.lower() == given.lower()), None)
    if name is None:
        raise ConfigError("unknown optimizer", section.at("type"), given, tuple(OPTIMIZERS))
    params = section.section("params")
    section.close()
    values = {key: params.take(key, check, None) for key, check in OPTIMIZERS[name].items()}
    params.close()
    if name == "AdamW" and values["adam_w_mode"] is False:
        key = params.at("adam_w_mode")
        raise ConfigError("contradicts optimizer.type AdamW", key, False, [True])
    return OptimizerConfig(name, {key: values[key] for key in params.table})


def _engine(asked: Engine | None, fields: Mapping[str, Any]) -> Engine:
    """Choose the engine: DeepSpeed's where ZeRO or mixed precision is on, else the native one."""
    needs = "zero_optimization.stage" if fields["zero_stage"] else None
    if fields["dtype"] is not None:
        needs = "bf16.enabled" if fields["dtype"] == "bfloat16" else "fp16.enabled"
    if asked == "native" and needs is not None:
        problem = f"{needs} needs DeepSpeed's engine (native runs in the model's own dtype)"
        raise ConfigError(problem, "folding.engine", "native", ["deepspeed"])
    return asked or ("deepspeed" if needs else "native")


def _refuse_not_yet(config: Mapping[str, Any]) -> None:
    """Refuse by name what folding does not support yet, wherever it is not switched off."""
    for dotted, off in OFF.items():
        key, _, inner = dotted.partition(".")
        table = config.get(key)
        if inner and isinstance(table, Mapping):
            present, value = inner in table, table.get(inner)
        else:
            present, value = key in config and not inner, table
        if present and value not in off:
            raise Unsupported("not supported with folding yet", dotted, value, off)


def _read_accumulation(top: Section) -> str | None:
    """Read the dtype gradients are accumulated in; None: the model's."""
    section = top.section("data_types")
    given: str | None = section.take(
        "grad_accum_dtype", optional(one_of(*PRECISION_SPELLINGS)), None
    )
    section.close()
    return given


def _refuse_paths(
    config: Mapping[str, Any], layout: FoldLayout, fields: Mapping[str, Any], asked: str | None
) -> None:
    """Refuse combinations on which DeepSpeed's engine is wrong or does not exist."""
    stage, model = fields["zero_stage"], PRECISIONS[fields["dtype"]]
    key = "data_types.grad_accum_dtype"
    accumulated = model if asked is None else PRECISION_SPELLINGS[asked]
    if stage == 0 and accumulated != model:
        problem = f"DeepSpeed has no ZeRO-0 that accumulates {model} gradients in another dtype"
        raise Unsupported(problem, key, asked, [model])
    whole = (stage, model, accumulated) == (1, "bf16", "fp32")  # keeps whole gradients, not pieces
    if fields["coalesce_grad_reduction"] and (stage == 0 or whole):
        problem = "DeepSpeed's coalesce_grad_reduction needs ZeRO-1 or 2, " + (
            "and not bf16 accumulated in fp32 at ZeRO-1" if whole else "not 0"
        )
        raise Unsupported(problem, "folding.coalesce_grad_reduction", True, [False])
    contiguous = (config.get("zero_optimization") or {}).get("contiguous_gradients", True)
    sharded = max(layout.tp_size, layout.ep_size * layout.etp_size) > 1
    if not contiguous and (stage == 2 or (stage == 1 and sharded and not whole)):
        problem = (
            "DeepSpeed averages gradients of different shards"
            if stage == 1
            else ("DeepSpeed has no ZeRO-2 without contiguous gradients")
        )
        raise Unsupported(problem, "zero_optimization.contiguous_gradients", False, [True])


def _read_rest(top: Section, engine: Engine) -> dict[str, Any]:
    """Read what only one engine understands and refuse every other key."""
    fields: dict[str, Any] = {}
    if engine == "deepspeed":
        fields["wall_clock_breakdown"] = top.take("wall_clock_breakdown", BOOLEAN, False)
        top.take("communication_data_type", optional(one_of("fp32", "fp16", "bf16")), None)
        fields["scheduler"] = _read_scheduler(top)
    top.take("compile", optional(TABLE), None)
    _close_deepspeed_sections(top)
    leftovers = [key for key in top.leftovers() if not _is_off_section(key, top.table[key])]
    if leftovers:
        _refuse_leftovers(top, leftovers, engine)
    return fields


def _is_off_section(key: str, value: object) -> bool:
    """Tell whether a section says nothing but that a feature is off (others were refused)."""
    inner_keys = [*value] if isinstance(value, Mapping) else []
    return bool(inner_keys) and all(f"{key}.{inner}" in OFF for inner in inner_keys)


def _read_scheduler(top: Section) -> SchedulerConfig | None:
    section = top.section("scheduler")
    if not section.table:
        return None
    scheduler = SchedulerConfig(
        section.take("type", NAME), section.take("params", optional(TABLE), None) or {}
    )
    section.close()
    return scheduler


def _close_deepspeed_sections(top: Section) -> None:
    """Refuse keys that DeepSpeed does not know in the sections handed on to it."""
    read = {"zero_optimization": {"stage"}, "bf16": {"enabled"}, "fp16": {"enabled"}, "compile": ()}
    for key, ours in read.items():
        table = cast(Mapping[str, Any], top.table.get(key) or {})
        unread = [inner for inner in table if inner not in ours]
        known = section_keys(key) if unread else set()
        for inner in unread:
            if inner not in known:
                raise unknown_key(f"{key}.{inner}", table[inner], sorted(known))


def _refuse_leftovers(top: Section, leftovers: Sequence[str], engine: Engine) -> None:
    """Pass keys DeepSpeed reads to its engine; refuse them natively and all others always."""
    known = deepspeed_keys()
    for key in leftovers:
        if key not in known:
            allowed = NATIVE_KEYS if engine == "native" else sorted({*NATIVE_KEYS, *known})
            raise unknown_key(key, top.table[key], allowed)
        if engine == "native":
            problem = "the native engine does not read it, folding.engine 'deepspeed' does"
            raise Unsupported(problem, key, top.table[key], NATIVE_KEYS)
