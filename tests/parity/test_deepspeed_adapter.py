"""The adapter of DeepSpeed's own folding: config, names, cuts, refusals, and runs on warm ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parity import case, case_files, hugging_face, session, trial
from parity.case import Case
from parity.implementation import RankContext, Refusal
from parity.implementations import deepspeed as adapter
from parity.implementations import deepspeed_state
from parity.implementations.deepspeed import DeepSpeedImplementation, Switches, engine_config
from parity.layout import Layout
from parity.store import Row, case_verdict
from parity.trial import Order

CASES = Path(__file__).resolve().parents[2] / "cases"
FOLDED = Layout(world=4, tp=2, ep=4, etp=1, pp=1)
PLAIN = Layout(world=2, tp=1, ep=1, etp=1, pp=1)


def made(**fields: Any) -> Case:
    """Make a small case of world 2, tp 2, ep 2 on DeepSpeed's engine."""
    flat = {"shape.world": 2, "shape.tp": 2, "shape.ep": 2, "model.name": "mixtral",
            "model.layers": 1, "model.heads": 6, "engine.name": "deepspeed", "engine.zero": 1,
            "engine.gas": 2}  # fmt: skip
    return case.make({**flat, **fields}, suite="s", file="f")


def written(layout: Layout, switches: Switches | None = None, /, **fields: Any) -> dict[str, Any]:
    """Write DeepSpeed's config of a case."""
    order = Order(made(**fields), "deepspeed", layout, 0, 0.1, 0.5)
    return engine_config(
        trial.config(order), layout, order.case.model.name, 2, switches or Switches()
    )


# --- config


def test_the_baseline_is_plain_zero() -> None:
    """Without folding neither section is handed down, nor anything of the harness's own."""
    config = written(PLAIN)
    assert set(config) & {"tensor_parallel", "expert_parallel", "folding", "adapter"} == set()
    assert config["zero_optimization"]["stage"] == 1
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5


def test_folding_hands_down_both_sections() -> None:
    """Sizes and the model's preset; attention cut over tp, no grouped product on a CPU."""
    config = written(FOLDED)
    assert config["expert_parallel"] == {
        "enabled": True, "autoep_size": 4, "expert_tensor_parallel_size": 1,
        "preset_model": "mixtral", "use_grouped_mm": False,
    }  # fmt: skip
    assert config["tensor_parallel"]["autotp_size"] == 2
    specs = config["tensor_parallel"]["partition_config"]["layer_specs"]
    assert [spec["partition_type"] for spec in specs] == ["row", "column", "skip"]
    assert specs[2]["grad_allreduce"] is True


@pytest.mark.parametrize(
    ("switches", "section"),
    [
        (Switches(partition="preset"), {"autotp_size": 2, "preset_model": "mixtral"}),
        (
            Switches(partition="skip"),
            {
                "autotp_size": 2,
                "partition_config": {
                    "use_default_specs": False,
                    "layer_specs": [{"patterns": [".*"], "partition_type": "skip"}],
                },
            },
        ),
    ],
    ids=["preset", "skip"],
)
def test_other_partitions(switches: Switches, section: dict[str, Any]) -> None:
    """AutoTP's own preset, and nothing cut at all."""
    assert written(FOLDED, switches)["tensor_parallel"] == section


def test_options_of_the_case_win_over_pinned_defaults() -> None:
    """What releases disagree on is pinned, unless the case says otherwise."""
    key = "engine.options.zero_optimization.overlap_comm"
    assert written(PLAIN)["zero_optimization"]["overlap_comm"] is False
    assert written(PLAIN, **{key: True})["zero_optimization"]["overlap_comm"] is True
    assert written(PLAIN)["communication_data_type"] == "fp32"
    wire = written(PLAIN, **{"engine.options.communication_data_type": "bf16"})
    assert wire["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    ("reduction", "gas"), [("managed", 2), ("boundary", 2), ("coalesce", 1), ("no_sync", 1)]
)
def test_deepspeed_counts_micro_batches_only_where_it_is_told_of_each(
    reduction: str, gas: int
) -> None:
    """Inside one window it must not divide by gas: the adapter does."""
    config = written(PLAIN, Switches(reduction=reduction))
    assert config["gradient_accumulation_steps"] == gas


def test_switches_refuse_what_they_do_not_know() -> None:
    """The message names the key and what would do."""
    with pytest.raises(ValueError, match="unknown 'partitions'; allowed: partition, reduction"):
        Switches.read({"partitions": "skip"})
    with pytest.raises(ValueError, match="partition = 'all'; allowed: sharded, preset, skip"):
        Switches.read({"partition": "all"})


# --- names and cuts


def test_names_and_halves_are_undone() -> None:
    """w1 stands above w3 in gate_up_proj, the gate keeps its own name, all get the prefix."""
    block = "model.layers.0.mlp."
    parts = {
        "model.norm.weight": torch.zeros(3),
        f"{block}router.gate.weight": torch.zeros(4, 3),
        f"{block}experts.w1": torch.full((2, 5, 3), 1.0),
        f"{block}experts.w2": torch.full((2, 3, 5), 2.0),
        f"{block}experts.w3": torch.full((2, 5, 3), 3.0),
    }
    found = adapter.joined(parts)
    assert list(found) == [
        "model.model.norm.weight",
        f"model.{block}gate.weight",
        f"model.{block}experts.gate_up_proj",
        f"model.{block}experts.down_proj",
    ]
    fused = found[f"model.{block}experts.gate_up_proj"]
    assert fused is not None
    assert fused.shape == (2, 10, 3)
    assert fused[:, :5].unique().tolist() == [1.0]
    assert fused[:, 5:].unique().tolist() == [3.0]


def test_one_missing_half_leaves_no_gradient() -> None:
    """A gradient that is there by half is None, not half of zeros."""
    parts = {"m.experts.w1": torch.zeros(1, 2, 3), "m.experts.w3": None}
    assert adapter.joined(parts) == {"model.m.experts.gate_up_proj": None}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.model.layers.0.mlp.gate.weight", "router"),
        ("model.model.layers.0.mlp.gate_proj.weight", "dense"),
        ("model.model.layers.0.mlp.experts.down_proj", "expert"),
        ("model.model.layers.0.mlp.shared_expert.up_proj.weight", "shared_expert"),
        ("model.model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.model.layers.0.self_attn.q_norm.weight", "layernorm"),
        ("model.model.embed_tokens.weight", "embedding"),
        ("model.lm_head.weight", "dense"),
    ],
)
def test_families(name: str, family: str) -> None:
    """A norm inside a head is a norm; a dense MLP's gate_proj is no router."""
    assert adapter.family_of(name) == family


def test_cuts_are_read_off_the_shapes() -> None:
    """Experts by ep, others by tp, on whichever dim shrank; replicated where none did."""
    experts = adapter.placement_of("m.mlp.experts.down_proj", (2, 3, 5), (8, 3, 5), FOLDED)
    assert [(s.axis, s.dim) for s in experts.shards] == [("ep", 0)]
    row = adapter.placement_of("m.self_attn.o_proj.weight", (8, 4), (8, 8), FOLDED)
    assert [(s.axis, s.dim) for s in row.shards] == [("tp", 1)]
    assert adapter.placement_of("m.norm.weight", (8,), (8,), FOLDED).shards == ()


@pytest.mark.parametrize(
    ("name", "local", "says"),
    [
        ("m.self_attn.q_proj.weight", (3, 8), "no cut over tp = 2"),
        ("m.self_attn.q_proj.weight", (4, 4), "no cut over tp = 2"),
        ("m.mlp.experts.down_proj", (8, 8), "every rank holds all experts, ep = 4"),
    ],
)
def test_shapes_that_are_no_even_cut(name: str, local: tuple[int, ...], says: str) -> None:
    """Uneven, cut twice, or not cut where ep says so."""
    with pytest.raises(AssertionError, match=says):
        adapter.placement_of(name, local, (8, 8), FOLDED)


# --- refusals


def in_deepspeed(source: str) -> None:
    """Run a line as if it stood in a file of DeepSpeed."""
    exec(compile(source, "/site-packages/deepspeed/runtime/engine.py", "exec"))


def test_only_worded_exceptions_of_deepspeed_are_refusals() -> None:
    """The same exception raised elsewhere, or without a word, stays what it is."""
    with pytest.raises(ValueError, match="ours"), adapter._refusals(ValueError):
        raise ValueError("ours")
    with pytest.raises(Refusal, match="ValueError: theirs"), adapter._refusals(ValueError):
        in_deepspeed("raise ValueError('theirs')")
    with pytest.raises(AssertionError), adapter._refusals(AssertionError):
        in_deepspeed("raise AssertionError")
    with pytest.raises(IndexError), adapter._refusals(ValueError):
        in_deepspeed("raise IndexError('list index out of range')")


def test_other_models_are_refused() -> None:
    """The tiny model has no preset."""
    context = RankContext(0, PLAIN, torch.device("cpu"), "gloo", lambda _ranks: None)
    with pytest.raises(Refusal, match="models of transformers only"):
        DeepSpeedImplementation().build(nn.Linear(2, 2), {}, context)


def test_the_workaround_for_transformers_is_taken_back() -> None:
    """A class name can be read and written inside, and the registry is as before afterwards."""
    capturing = pytest.importorskip("transformers.utils.output_capturing")
    kind: Any = type(capturing._CAN_RECORD_REGISTRY)
    before = kind.get, kind.__setitem__
    back = deepspeed_state.let_presets_read_transformers()
    registry = kind()
    registry["<class 'X'>"] = {"router_logits": 1}
    assert registry.get("<class 'X'>", None) == {"router_logits": 1}
    assert registry.get("<class 'Y'>", 7) == 7
    back()
    assert (kind.get, kind.__setitem__) == before


# --- the suite


def test_the_suite_holds_every_path_and_names_its_implementation() -> None:
    """Stages x precisions, and every way to accumulate, occur; the files are DeepSpeed's."""
    cells = [c for c in case_files.load_folder(CASES) if c.suite == "deepspeed"]
    assert session.implementation_of(cells) == "deepspeed"
    paths = {
        (c.engine.zero, c.engine.dtype, c.engine.options.get("data_types", {}).get(
            "grad_accum_dtype")) for c in cells
    }  # fmt: skip
    assert {z for z, dtype, _ in paths if dtype == "float32"} == {0, 1, 2, 3}
    for low, short in (("bfloat16", "bf16"), ("float16", "fp16")):
        assert {(1, low, short), (1, low, "fp32"), (2, low, short), (2, low, "fp32")} <= paths
    ways = {c.engine.options.get("adapter", {}).get("reduction", "managed") for c in cells}
    assert ways == set(adapter.REDUCTIONS)


def test_every_known_finding_is_written_down_and_names_cases() -> None:
    """Each entry has its page, and each of its patterns a case about the same implementation."""
    findings = CASES.parent / "docs" / "findings"
    cells = case_files.load_folder(CASES)
    entries = case_files.load_toml((findings / "known.toml").read_text())["known"]
    assert len(entries) >= 10
    for entry in entries:
        assert list(findings.glob(f"{entry['finding']}-*")), entry["finding"]
        ids = [c.id for c in cells if c.implementation == entry["implementation"]]
        for pattern in entry["cases"]:
            assert fnmatch.filter(ids, pattern), pattern


# --- on ranks


@pytest.fixture(scope="module")
def judging() -> Iterator[session.Judging]:
    """Open one judge with warm ranks for the module."""
    first = made()
    with session.open_judge("deepspeed", "cpu", first, max_live_ranks=4) as judge:
        yield judge


def verdicts(rows: list[Row]) -> dict[str, str]:
    """Give the verdict of each quantity."""
    kinds = dict.fromkeys(row.quantity or "case" for row in rows)
    return {k: case_verdict(r for r in rows if (r.quantity or "case") == k) for k in kinds}


def test_zero_3_is_right_and_read_whole(judging: session.Judging) -> None:
    """Divided parameters are gathered: gradients, norm, clipped update and replicas all agree."""
    rows = list(judging.rows(made(**{"engine.zero": 3, "engine.clip": 0.5, "steps": 2})))
    assert set(verdicts(rows).values()) == {"pass"}, [r.reason for r in rows if r.reason]
    names = {row.tensor for row in rows if row.quantity == "gradient"}
    made_names = dict(hugging_face.build(made().model, 0, idle_expert=True).named_parameters())
    assert names == set(made_names)


def test_zero_0_reports_no_norm(judging: session.Judging) -> None:
    """The row of the norm is skipped and says why; everything else is judged."""
    rows = list(judging.rows(made(**{"engine.zero": 0, "model.name": "qwen3_moe",
                                     "model.layers": 2})))  # fmt: skip
    assert verdicts(rows)["grad_norm"] == "skipped"
    assert {r.reason for r in rows if r.quantity == "grad_norm"} == {"the engine reports no norm"}
    assert {v for k, v in verdicts(rows).items() if k != "grad_norm"} == {"pass"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_follows_the_engines_routing(judging: session.Judging, dtype: str) -> None:
    """The reference goes where the engine sent each token; master weights are read.

    float16 on every CPU: few have what DeepSpeed asks for before it takes it.
    """
    rows = list(judging.rows(made(**{"engine.dtype": dtype, "engine.zero": 3})))
    assert verdicts(rows)["gradient"] == verdicts(rows)["update"] == "pass"
    routing = [r for r in rows if r.quantity == "routing" and r.against == "reference"]
    assert all(r.detail is not None and r.detail["followed"] for r in routing)


def test_a_ulysses_size_is_refused(judging: session.Judging) -> None:
    """DeepSpeed would take it and run whole sequences on each rank: nothing would be split."""
    asked = made(**{"shape.world": 2, "shape.tp": 1, "engine.sequence_parallel_size": 2})
    (row,) = session.judge_case(judging, asked, "deepspeed").rows
    assert row.verdict == "skipped"
    assert "no Ulysses" in (row.reason or "")


def test_a_refusal_is_deepspeeds_own_text(judging: session.Judging) -> None:
    """Expert-TP is refused by DeepSpeed; the ranks are kept."""
    refused = made(**{"shape.world": 4, "shape.etp": 2})
    finished = session.judge_case(judging, refused, "deepspeed")
    (row,) = finished.rows
    assert row.verdict == "skipped"
    assert "expert_tensor_parallel_size=2 is reserved" in (row.reason or "")
