"""The adapter of Megatron-Core: fields, names, cuts, refusals, the shim, and runs on warm ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parity import case, case_files, models, session, trial
from parity.case import Case
from parity.implementation import Placement, RankContext, Refusal, Shard
from parity.implementations import megatron_core as adapter
from parity.implementations import megatron_names as names
from parity.implementations import megatron_state as state
from parity.implementations.megatron_core import MegatronCoreImplementation
from parity.implementations.megatron_names import Entry, Part
from parity.layout import Layout
from parity.store import Row, case_verdict

CASES = Path(__file__).resolve().parents[2] / "cases"
FOLDED = Layout(world=4, tp=2, ep=2, etp=2)
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)


def made(**fields: Any) -> Case:
    """Make a small float64 case of world 2, tp 2, ep 2."""
    flat = {"shape.world": 2, "shape.tp": 2, "shape.ep": 2, "model.layers": 1, "model.vocab": 36,
            "engine.dtype": "float64"}  # fmt: skip
    return case.make({**flat, **fields}, suite="s", file="f")


def config(of: Case, layout: Layout = FOLDED) -> dict[str, Any]:
    """Write the config of a case."""
    return trial.config(trial.Order(of, "megatron_core", layout, 0, 0.1, 0.5))


def fields(of: Case, layout: Layout = FOLDED) -> dict[str, Any]:
    """Write the fields of Megatron's TransformerConfig of a case."""
    return adapter.transformer_fields(of.model, config(of, layout), layout, torch.float64)


# --- fields


def test_megatrons_load_balance_is_divided_by_top_k() -> None:
    """Its coefficient is top_k times the case's; the scope chooses its kind of loss."""
    given = fields(made(**{"auxiliary.load_balance": 0.1, "model.top_k": 4}))
    assert given["moe_aux_loss_coeff"] == pytest.approx(0.4)
    assert given["moe_router_load_balancing_type"] == "aux_loss"
    scoped = fields(made(**{"auxiliary.load_balance": 0.1, "auxiliary.scope": "global"}))
    assert scoped["moe_router_load_balancing_type"] == "global_aux_loss"
    assert fields(made())["moe_router_load_balancing_type"] == "none"


def test_weights_that_are_not_normalized_are_softmax_before_top_k() -> None:
    """Softmax over the chosen divides by their sum; over all experts it does not."""
    assert fields(made())["moe_router_pre_softmax"] is False
    assert fields(made(**{"model.normalize": False}))["moe_router_pre_softmax"] is True


def test_sequence_parallelism_follows_tp_unless_the_case_says_otherwise() -> None:
    """Megatron's MoE refuses to train under tp without it, and its config without tp with it."""
    assert fields(made())["sequence_parallel"] is True
    assert fields(made(), Layout(world=2))["sequence_parallel"] is False
    off = made(**{"engine.options.megatron.transformer.sequence_parallel": False})
    assert fields(off)["sequence_parallel"] is False


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model.biases": True}, "gives its experts biases"),
        ({"model.score": "sigmoid", "model.normalize": False}, "sigmoid scores"),
        ({"model.score": "sigmoid", "model.top_k": 1}, "sigmoid scores"),
    ],
)
def test_models_megatron_has_not_are_refused(given: dict[str, Any], said: str) -> None:
    """A router or parameters it does not offer make no comparison."""
    with pytest.raises(Refusal, match=said):
        fields(made(**given))


def test_optimizers_are_megatrons_or_refused() -> None:
    """AdamW is decoupled decay; Lion it has not."""
    adamw = adapter.optimizer_fields(config(made(**{"optimizer.name": "adamw"})), True)
    assert (adamw["optimizer"], adamw["decoupled_weight_decay"]) == ("adam", True)
    assert adamw["use_distributed_optimizer"]
    with pytest.raises(Refusal, match="no optimizer Lion"):
        adapter.optimizer_fields(config(made(**{"optimizer.name": "lion"})), False)


# --- names and cuts


def test_queries_keys_and_values_are_taken_out_head_by_head() -> None:
    """Two heads of one row each: Megatron's rows are q0 k0 v0 q1 k1 v1."""
    fused = nn.Parameter(torch.arange(6.0)[:, None].expand(6, 2).clone())
    keys = Entry(Placement("attention"), (Part(fused, names._heads(1, 1)),))
    assert keys.read(lambda p: p.data)[:, 0].tolist() == [1.0, 4.0]
    keys.write(torch.tensor([[7.0, 7.0], [8.0, 8.0]]))
    assert fused[:, 0].tolist() == [0.0, 7.0, 2.0, 3.0, 8.0, 5.0]


def test_the_experts_of_a_rank_are_stacked() -> None:
    """Gate and up are the halves of each expert's first weight."""
    first, second = (nn.Parameter(torch.full((4, 2), value)) for value in (1.0, 2.0))
    parts = tuple(Part(p, names._nth(1, 2)) for p in (first, second))
    up = Entry(Placement("expert"), parts)
    up.write(torch.stack([torch.full((2, 2), 5.0), torch.full((2, 2), 6.0)]))
    assert first[:, 0].tolist() == [1.0, 1.0, 5.0, 5.0]
    assert up.read(lambda p: p.data)[:, 0, 0].tolist() == [5.0, 6.0]


def test_a_piece_is_cut_by_expert_and_then_by_column() -> None:
    """Rank 3 of ep 2, etp 2 is ep 1, etp 1: the second expert's second column."""
    full = torch.arange(4.0).reshape(2, 1, 2)
    placed = Placement("expert", (Shard("ep", 0), Shard("etp", 2)))
    assert names.piece_of(full, placed, FOLDED, 3).tolist() == [[[3.0]]]


# --- refusals and the shim


def context() -> RankContext:
    """Give a rank no collective is called on."""
    return RankContext(0, FOLDED, torch.device("cpu"), "gloo", lambda _: None)


def test_a_missing_package_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says how to install it."""
    monkeypatch.setattr(state, "installed", lambda: None)
    model = models.build_for(made(), 0)
    with pytest.raises(Refusal, match=r"pip install 'foldparity\[megatron\]'"):
        MegatronCoreImplementation().build(model, config(made()), context())


@needs_megatron
def test_a_gpu_is_a_refusal() -> None:
    """The stand-ins for CUDA would be in the way there."""
    gpu = RankContext(0, FOLDED, torch.device("cuda", 0), "nccl", lambda _: None)
    with pytest.raises(Refusal, match="on CPU ranks only"):
        MegatronCoreImplementation().build(models.build_for(made(), 0), config(made()), gpu)


@needs_megatron
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": {}}, "unknown 'adapter'; allowed: transformer, ddp"),
        ({"ddp": {"overlap_param_gather": True}}, "read before the forward"),
    ],
)
def test_options_that_would_do_nothing_or_mislead_are_errors(
    options: dict[str, Any], said: str
) -> None:
    """A key no one reads, and one under which weights would be read too early."""
    model = models.build_for(made(), 0)
    with pytest.raises(ValueError, match=said):
        MegatronCoreImplementation().build(model, {"megatron": options}, context())


@needs_megatron
def test_the_shim_lasts_as_long_as_it_is_entered() -> None:
    """Inside, what is asked for on CUDA is on the CPU and float32 is float64; after, nothing is."""
    from torch import cuda, distributed

    before = (cuda.current_device, cuda.Stream, distributed.all_gather, torch.get_default_dtype())
    with state.running(torch.float64):
        made_there = torch.zeros(2, device="cuda", dtype=torch.float32)
        assert (made_there.device.type, made_there.dtype) == ("cpu", torch.float64)
        assert made_there.cuda() is made_there
        assert made_there.type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).dtype is torch.float64
    after = (cuda.current_device, cuda.Stream, distributed.all_gather, torch.get_default_dtype())
    assert before == after
    assert torch.zeros(2).type() == "torch.FloatTensor"


# --- the suite


def test_the_suite_reaches_tp_other_than_etp_and_every_refusal() -> None:
    """EP over lanes, etp below and above tp, replicated experts, three lanes; refusals by name."""
    cells = [c for c in case_files.load_folder(CASES) if c.suite == "megatron"]
    shapes = {(c.shape.tp, c.shape.ep, c.shape.etp) for c in cells}
    assert {(2, 4, 1), (4, 2, 1), (4, 2, 2), (1, 2, 2), (3, 2, 1)} <= shapes
    assert any(c.layout.edp == 3 for c in cells)
    assert {c.implementation for c in cells} == {"megatron_core"}
    assert sum(c.id.startswith("refused-") for c in cells) == 2


# --- on ranks


@pytest.fixture(scope="module")
def judging() -> Iterator[session.Judging]:
    """Open one judge with warm ranks for the module."""
    with session.open_judge("megatron_core", "cpu", made(), max_live_ranks=4) as judge:
        yield judge


def verdicts(rows: list[Row]) -> dict[str, str]:
    """Give the verdict of each quantity."""
    kinds = dict.fromkeys(row.quantity or "case" for row in rows)
    return {k: case_verdict(r for r in rows if (r.quantity or "case") == k) for k in kinds}


@needs_megatron
def test_folded_megatron_is_right_in_float64(judging: session.Judging) -> None:
    """Padded sequences, gas, clipping, auxiliary and shared expert: every quantity, every name."""
    cell = made(**{"engine.gas": 2, "engine.clip": 0.5, "auxiliary.load_balance": 0.1,
                   "model.shared_width": 24, "steps": 2})  # fmt: skip
    rows = list(judging.rows(cell))
    assert set(verdicts(rows).values()) == {"pass"}, [r.reason for r in rows if r.reason]
    judged = {row.tensor for row in rows if row.quantity == "gradient"}
    assert judged == set(dict(models.build_for(cell, 0).named_parameters()))


@needs_megatron
def test_groups_of_the_shape_before_are_forgotten(judging: session.Judging) -> None:
    """One gang, EP alone after TP and EP: right in either order, as the test above came first."""
    rows = list(judging.rows(made(**{"shape.tp": 1})))
    assert set(verdicts(rows).values()) == {"pass"}
    again = list(judging.rows(made(**{"model.top_k": 1, "model.normalize": False})))
    assert set(verdicts(again).values()) == {"pass"}


@needs_megatron
def test_masters_divided_over_dp_are_read_whole(judging: session.Judging) -> None:
    """In bfloat16 the distributed optimizer has a part of each on every rank; routing is forced."""
    cell = made(**{"shape.tp": 1, "engine.dtype": "bfloat16", "optimizer.name": "adam",
                   "engine.options.megatron.ddp.use_distributed_optimizer": True})  # fmt: skip
    rows = list(judging.rows(cell))
    assert set(verdicts(rows).values()) == {"pass"}, [r.reason for r in rows if r.reason]
    assert {row.tensor for row in rows if row.quantity == "update"} >= {"layers.0.moe.experts.w1"}


@needs_megatron
def test_experts_without_expert_parallelism_are_caught(judging: session.Judging) -> None:
    """Finding 0020: lanes do not add their experts' gradients; no other family is off."""
    rows = list(judging.rows(made(**{"shape.ep": 1})))
    failed = {row.family for row in rows if row.quantity == "gradient" and row.verdict == "fail"}
    assert failed == {"expert"}
    assert verdicts(rows)["replica"] == "fail"


@needs_megatron
def test_a_refusal_is_megatrons_own_text(judging: session.Judging) -> None:
    """While it is built, and in the first forward; the ranks are kept."""
    for given, said in (
        ({"model.vocab": 37}, "37 is not divisible by 2"),
        ({"engine.options.megatron.transformer.sequence_parallel": False}, "sequence parallelism"),
        ({"shape.tp": 1, "engine.sequence_parallel_size": 2}, "has no Ulysses"),
    ):
        (row,) = session.judge_case(judging, made(**given), "megatron_core").rows
        assert row.verdict == "skipped"
        assert said in (row.reason or "")
