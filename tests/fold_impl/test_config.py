"""What a config may say, and the words in which it is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from fold_impl.config import ConfigError, FoldConfig, Unsupported

# `deepspeed` imports lazily and warns on its own account
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:deepspeed.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]

FOLDED: dict[str, Any] = {
    "tensor_parallel": {"autotp_size": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 4},
}


def expert(**keys: Any) -> dict[str, Any]:
    """Give an expert_parallel section with some keys changed."""
    return {"expert_parallel": {"enabled": True, "autoep_size": 4, **keys}}


def parse(world: int = 8, **sections: Any) -> FoldConfig:
    """Parse the folded config with some sections replaced."""
    return FoldConfig.from_dict({**FOLDED, **sections}, world)


def test_sizes_reach_the_layout_with_dp_and_edp_derived() -> None:
    """World 8, tp 2, ep 2, etp 2 is dp 4 and edp 2."""
    layout = parse(**expert(autoep_size=2, expert_tensor_parallel_size=2)).layout
    assert (layout.tp_size, layout.ep_size, layout.etp_size) == (2, 2, 2)
    assert (layout.dp_size, layout.edp_size, layout.pp_size) == (4, 2, 1)


def test_empty_config_is_one_rank_of_everything_and_no_optimizer() -> None:
    """All defaults: native, tp ep etp 1, no clipping, rank scope, accumulation 1."""
    config = FoldConfig.from_dict({}, 3)
    assert (config.layout.tp_size, config.layout.ep_size, config.layout.etp_size) == (1, 1, 1)
    assert (config.engine, config.strategy, config.aux_scope) == ("native", "route_full", "rank")
    assert (config.gradient_clipping, config.gradient_accumulation_steps) == (0.0, 1)
    assert config.optimizer is None


def test_disabled_expert_parallel_means_no_folding_as_in_deepspeed() -> None:
    """`enabled: false` switches sizes off, it does not refuse them."""
    assert parse(**expert(enabled=False)).layout.ep_size == 1


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}}
REFUSED = [
    # sizes
    ({"tensor_parallel": {"autotp_size": 0}}, "tensor_parallel.autotp_size", 0, "positive integer"),
    ({"tensor_parallel": {"autotp_size": "2"}}, "tensor_parallel.autotp_size", "2", "positive"),
    ({"tensor_parallel": {"autotp_size": 2.0}}, "tensor_parallel.autotp_size", 2.0, "positive"),
    ({"tensor_parallel": {"autotp_size": True}}, "tensor_parallel.autotp_size", True, "positive"),
    ({"tensor_parallel": {"autotp_size": 3}}, "tensor_parallel.autotp_size", 3, "1, 2, 4, 8"),
    (expert(autoep_size=3), "expert_parallel.autoep_size", 3, "1, 2, 4, 8"),
    (expert(autoep_size=-1), "expert_parallel.autoep_size", -1, "positive integer"),
    (
        expert(autoep_size=4, expert_tensor_parallel_size=4),
        "expert_parallel.autoep_size",
        4,
        "allowed: 1, 2",
    ),
    (
        expert(expert_tensor_parallel_size=5),
        "expert_parallel.expert_tensor_parallel_size",
        5,
        "1, 2, 4, 8",
    ),
    ({"pipeline": {"stages": 3}}, "pipeline.stages", 3, "1, 2, 4, 8"),
    ({"data_parallel_size": 4}, "data_parallel_size", 4, "leave it out"),
    # keys
    (expert(autoep_sise=4), "expert_parallel.autoep_sise", 4, "did you mean 'autoep_size'"),
    ({"tensor_parallel": {"size": 2}}, "tensor_parallel.size", 2, "autotp_size"),
    ({"folding": {"stratgy": "x"}}, "folding.stratgy", "x", "did you mean 'strategy'"),
    ({"gradient_cliping": 1.0}, "gradient_cliping", 1.0, "did you mean 'gradient_clipping'"),
    ({"bfloat16": {"enabled": True}}, "bfloat16", {"enabled": True}, "old spelling of bf16"),
    ({"bf16": {"enable": True}}, "bf16.enable", True, "did you mean 'enabled'"),
    ({"zero_optimization": {"stage": 1, "bucket": 2}}, "zero_optimization.bucket", 2, "stage"),
    ({"tensor_parallel": [2]}, "tensor_parallel", [2], "a table"),
    # what does not go together
    ({"sequence_parallel_size": 2}, "sequence_parallel_size", 2, "autotp_size 2"),
    (
        {"expert_parallel": {"autoep_size": 4}},
        "expert_parallel.enabled",
        None,
        "true, false",
    ),
    (
        {
            "tensor_parallel": {"autotp_size": 2, "preset_model": "mixtral"},
            **expert(preset_model="qwen3_moe"),
        },
        "tensor_parallel.preset_model",
        "mixtral",
        "qwen3_moe",
    ),
    (expert(preset_model="mixtrall"), "expert_parallel.preset_model", "mixtrall", "mixtral"),
    (
        {**expert(preset_model="mixtral"), "folding": {"preset": {"moe": "x"}}},
        "folding.preset",
        {"moe": "x"},
        "one of the two",
    ),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", True, "False"),
    (
        {"folding": {"engine": "native"}, "zero_optimization": {"stage": 1}},
        "folding.engine",
        "native",
        "zero_optimization.stage",
    ),
    (
        {"folding": {"engine": "native"}, "bf16": {"enabled": True}},
        "folding.engine",
        "native",
        "bf16.enabled",
    ),
    # values of the folding section
    ({"folding": {"engine": "torch"}}, "folding.engine", "torch", "native, deepspeed"),
    ({"folding": {"strategy": "own_slice"}}, "folding.strategy", "own_slice", "route_full"),
    ({"folding": {"aux_scope": "world"}}, "folding.aux_scope", "world", "rank, global"),
    ({"folding": {"z_loss_coef": -0.1}}, "folding.z_loss_coef", -0.1, ">= 0"),
    ({"folding": {"load_balance_coef": float("inf")}}, "folding.load_balance_coef", None, ">= 0"),
    ({"folding": {"correction_bias_rate": -0.1}}, "folding.correction_bias_rate", -0.1, ">= 0"),
    ({"folding": {"preset": "mixtral"}}, "folding.preset", "mixtral", "a table"),
    # training
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", 0, "positive integer"),
    ({"gradient_clipping": "auto"}, "gradient_clipping", "auto", ">= 0"),
    ({"train_batch_size": 5}, "train_batch_size", 5, "multiples of 4"),
    (
        {"train_batch_size": 12, "gradient_accumulation_steps": 2},
        "train_batch_size",
        12,
        "multiples of 8",
    ),
    (
        {
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 3,
        },
        "train_batch_size",
        12,
        "allowed: 24",
    ),
    ({"optimizer": {"params": {}}}, "optimizer.type", None, "missing"),
    ({"optimizer": {"type": "Muon"}}, "optimizer.type", "Muon", "SGD, Adam, AdamW, Lion"),
    (
        {"optimizer": {"type": "SGD", "params": {"betas": [0, 0]}}},
        "optimizer.params.betas",
        [0, 0],
        "momentum",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}},
        "optimizer.params.betas",
        [0.9, 1.0],
        "< 1",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode",
        False,
        "True",
    ),
    ({"data_types": {"grad_accum_dtyp": "fp32"}, **ZERO}, "data_types.grad_accum_dtyp", "fp32",
     "did you mean 'grad_accum_dtype'"),
    ({"data_types": {"params": 1}, **ZERO}, "data_types.params", 1, "grad_accum_dtype"),
    ({"data_types": {"grad_accum_dtype": "fp8"}, **ZERO}, "data_types.grad_accum_dtype", "fp8",
     "fp32, float32"),
    ({"data_types": {"grad_accum_dtype": ["fp32"]}, **ZERO}, "data_types.grad_accum_dtype",
     ["fp32"], "fp32, float32"),
    ({"data_types": "fp32", **ZERO}, "data_types", "fp32", "a table"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "key", "value", "said"),
    REFUSED,
    ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)],
)
def test_mistakes_are_refused_with_key_value_and_what_would_do(
    sections: dict[str, Any], key: str, value: object, said: str
) -> None:
    """The error carries key, value, allowed and says all three; it is not a "not yet"."""
    with pytest.raises(ConfigError) as caught:
        parse(**sections)
    error = caught.value
    assert error.key == key
    assert error.value == value or value is None
    assert not error.refusal
    assert f"{key} = {error.value!r}" in str(error)
    assert said in str(error)
    assert "allowed: " in str(error)


@pytest.mark.parametrize(
    ("config", "key"),
    [({1: 2}, "1"), ({"tensor_parallel": {1: 2}}, "tensor_parallel.1"), ({None: 2}, "None")],
)
def test_a_key_that_is_no_text_is_refused(config: dict[Any, Any], key: str) -> None:
    """JSON has none, a dict of Python may."""
    with pytest.raises(ConfigError, match="a key is text") as caught:
        FoldConfig.from_dict(config, 4)
    assert (caught.value.key, caught.value.value) == (key, 2)


NOT_YET = [
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "0, 1, 2"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer",
        "none",
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "nvme"}}},
        "zero_optimization.offload_param",
        "none",
    ),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile", "False"),
    ({"pipeline": {"stages": 2}}, "pipeline.stages", "allowed: 1"),
    (
        {"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 2},
        "sequence_parallel_size",
        "Ulysses",
    ),
    ({"elasticity": {"enabled": True}}, "elasticity.enabled", "False"),
    ({"moe": {"enabled": True}}, "moe.enabled", "False"),
    ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled", "False"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "False"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "mean"),
    ({"prescale_gradients": True}, "prescale_gradients", "False"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", "True"),
    (expert(use_grouped_mm=False), "expert_parallel.use_grouped_mm", "autoep_size"),
    ({"tensor_parallel": {"tp_overlap_comm": True}}, "tensor_parallel.tp_overlap_comm", "autotp"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "folding.engine 'deepspeed'"),
    ({"communication_data_type": "fp32"}, "communication_data_type", "native"),
    ({"wandb": {}}, "wandb", "native"),
]


@pytest.mark.parametrize(("sections", "key", "said"), NOT_YET, ids=[n[1] for n in NOT_YET])
def test_wishes_not_fulfilled_yet_are_refused_by_name(
    sections: dict[str, Any], key: str, said: str
) -> None:
    """These are refusals of the implementation, marked as such, so a harness skips the case."""
    with pytest.raises(Unsupported) as caught:
        parse(**sections)
    assert caught.value.refusal
    assert caught.value.key == key
    assert said in str(caught.value)


NEAR_MISSES = [
    {"tensor_parallel": {"autotp_size": 8}},
    expert(autoep_size=8),
    expert(autoep_size=4, expert_tensor_parallel_size=2),
    {"pipeline": {"stages": 1}},
    {"sequence_parallel_size": 1},
    {"zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
    {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}},
    {"compile": {"deepcompile": False}},
    {"elasticity": {"enabled": False}},
    {"gradient_allreduce_op": "mean", "bf16": {"enabled": True}},
    {"bf16": {"enabled": False}, "folding": {"engine": "native"}},
    {"fp16": {"enabled": True, "loss_scale": 128}},
    {"gradient_clipping": 0},
    {"train_batch_size": 12},
    {"expert_parallel": {"autoep_size": 1}},
    {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": True}}},
    {
        "folding": {"engine": "deepspeed"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "wandb": {"enabled": False},
        "wall_clock_breakdown": True,
    },
    {"data_types": {"grad_accum_dtype": None}, "zero_optimization": {"stage": 1}},
    {"data_types": None, "zero_optimization": {"stage": 1}},
    {
        "tensor_parallel": {"autotp_size": 2, "preset_model": "mixtral"},
        **expert(preset_model="mixtral"),
    },
]


@pytest.mark.parametrize("sections", NEAR_MISSES, ids=[f"{i}" for i in range(len(NEAR_MISSES))])
def test_near_misses_of_every_refusal_are_accepted(sections: dict[str, Any]) -> None:
    """A value just inside each limit parses."""
    assert parse(**sections).layout.world_size == 8


@pytest.mark.parametrize(
    ("sections", "engine"),
    [
        ({}, "native"),
        ({"zero_optimization": {"stage": 0}}, "native"),
        ({"zero_optimization": {"stage": 1}}, "deepspeed"),
        ({"bf16": {"enabled": False}}, "native"),
        ({"bf16": {"enabled": True}}, "deepspeed"),
        ({"fp16": {"enabled": True}}, "deepspeed"),
        ({"zero_optimization": {"stage": 0}, "folding": {"engine": "deepspeed"}}, "deepspeed"),
    ],
    ids=["none", "zero-0", "zero-1", "bf16-off", "bf16", "fp16", "asked"],
)
def test_engine_follows_from_zero_and_precision_unless_asked(
    sections: dict[str, Any], engine: str
) -> None:
    """Enabled ZeRO or mixed precision needs DeepSpeed's engine, all else runs natively."""
    assert parse(**sections).engine == engine


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (4, 1, 1)),
        ((24, None, None), (24, 6, 1)),
        ((24, 2, None), (24, 2, 3)),
        ((24, None, 3), (24, 2, 3)),
        ((None, 2, 3), (24, 2, 3)),
        ((None, None, 3), (12, 1, 3)),
        ((24, 2, 3), (24, 2, 3)),
    ],
    ids=["nothing", "train", "train-micro", "train-gas", "micro-gas", "gas", "all"],
)
def test_missing_batch_sizes_are_derived_over_dense_data_parallel(
    given: tuple[int | None, ...], expected: tuple[int, ...]
) -> None:
    """train = micro * gas * dp with dp = 8 / tp 2 = 4, lanes not counted."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = parse(**{k: v for k, v in zip(keys, given, strict=True) if v is not None})
    assert tuple(getattr(config, key) for key in keys) == expected


@pytest.mark.parametrize(
    ("kind", "params", "name", "decoupled"),
    [
        ("sgd", {"lr": 0.1, "momentum": 0.9}, "SGD", False),
        ("ADAM", {"lr": 0.1}, "Adam", True),
        ("Adam", {"adam_w_mode": False}, "Adam", False),
        ("adamw", {"betas": [0.9, 0.95]}, "AdamW", True),
        ("Lion", {"lr": 1}, "Lion", True),
    ],
    ids=["sgd", "adam", "adam-l2", "adamw", "lion"],
)
def test_optimizer_names_ignore_case_and_adam_decays_as_in_deepspeed(
    kind: str, params: dict[str, Any], name: str, decoupled: bool
) -> None:
    """DeepSpeed's "Adam" is AdamW unless adam_w_mode is false; here it means the same."""
    optimizer = parse(optimizer={"type": kind, "params": params}).optimizer
    assert optimizer is not None
    assert (optimizer.type, optimizer.params) == (name, params)
    assert optimizer.decoupled_weight_decay is decoupled


def test_inline_preset_and_auxiliary_losses_are_passed_on() -> None:
    """The preset table is handed over as it is; coefficients become floats."""
    preset = {"moe": r".*\.moe", "top_k": 2}
    folding = {"preset": preset, "load_balance_coef": 1, "z_loss_coef": 0.5, "aux_scope": "global"}
    config = parse(folding={**folding, "correction_bias_rate": 1})
    assert config.preset == preset
    assert (config.load_balance_coef, config.z_loss_coef) == (1.0, 0.5)
    assert config.aux_scope == "global"
    assert (config.correction_bias_rate, parse().correction_bias_rate) == (1.0, 0.0)


def test_parsing_neither_changes_nor_shares_the_given_config() -> None:
    """A caller may reuse and change the dict afterwards."""
    given = {**FOLDED, "optimizer": {"type": "sgd", "params": {"lr": 0.5}}}
    before = copy.deepcopy(given)
    config = FoldConfig.from_dict(given, 8)
    given["optimizer"]["params"]["lr"] = 7.0
    assert config.optimizer is not None
    assert config.optimizer.params["lr"] == 0.5
    assert config.source == before


def test_deepspeed_is_handed_sizes_and_clipping_written_out() -> None:
    """Sections folding fulfils are gone; what DeepSpeed's defaults move is explicit."""
    optimizer = {"type": "sgd", "params": {"lr": 0.5}}
    config = parse(zero_optimization={"stage": 1}, optimizer=optimizer, folding={})
    assert config.for_deepspeed() == {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


@pytest.mark.parametrize(
    ("sizes", "key", "said"),
    [
        ({"num_experts": 6}, "expert_parallel.autoep_size", "num_experts 6; allowed: 1, 2"),
        ({"num_experts": 18}, "expert_parallel.autoep_size", "num_experts 18; allowed: 1, 2"),
        ({"num_heads": 5}, "tensor_parallel.autotp_size", "num_heads 5; allowed: 1"),
        ({"mlp_width": 9}, "tensor_parallel.autotp_size", "mlp_width 9; allowed: 1"),
        (
            {"expert_width": 7},
            "expert_parallel.expert_tensor_parallel_size",
            "expert_width 7; allowed: 1",
        ),
    ],
    ids=["ep", "ep-many", "tp-heads", "tp-mlp", "etp"],
)
def test_model_sizes_that_cannot_be_cut_evenly_are_refused(
    sizes: dict[str, int], key: str, said: str
) -> None:
    """ep divides the experts, etp their width, tp the heads; allowed values also tile the stage."""
    config = parse(**expert(expert_tensor_parallel_size=2))
    with pytest.raises(ConfigError) as caught:
        config.check_model(**sizes)
    assert caught.value.key == key
    assert str(caught.value).endswith(said)


def test_model_sizes_that_can_be_cut_are_accepted() -> None:
    """Multiples of ep 4, etp 2 and tp 2 pass, as does a size the model does not have."""
    config = parse(**expert(expert_tensor_parallel_size=2))
    config.check_model(num_experts=12, expert_width=36, num_heads=6, mlp_width=60, vocab_size=None)


def test_not_a_table_and_an_impossible_world_are_refused_too() -> None:
    """The two arguments themselves are checked before anything is read."""
    with pytest.raises(ConfigError, match="DeepSpeed-style dict"):
        FoldConfig.from_dict([], 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="world_size = 0"):
        FoldConfig.from_dict({}, 0)


def test_errors_survive_the_way_out_of_a_rank() -> None:
    """Pickled and back, class, attributes and message are the same."""
    with pytest.raises(Unsupported) as caught:
        parse(compile={"deepcompile": True})
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is Unsupported
    assert (again.key, str(again)) == ("compile.deepcompile", str(caught.value))
