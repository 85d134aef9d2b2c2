"""What an implementation hands back in another form than the Protocol's, said in its own terms."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fold_impl.adapter import FoldImplementation
from parity import collect, protocol, session
from parity.case import Case, make
from parity.implementation import Placement, Shard
from parity.layout import Layout
from parity.protocol import ProtocolError
from parity.store import Row
from parity.trial import Order, run

INDICES = torch.zeros(3, 2, dtype=torch.int64)


class Lying(FoldImplementation):
    """Answers one member by what is left of the right answer after a change."""

    member = ""
    change: Callable[[Any], Any] = staticmethod(lambda answer: answer)

    def __getattribute__(self, name: str) -> Any:
        """Change the answer of the one member."""
        found = super().__getattribute__(name)
        if name != type(self).member:
            return found
        return lambda *given: type(self).change(found(*given))


def told(monkeypatch: pytest.MonkeyPatch, member: str, change: Callable[[Any], Any]) -> str:
    """Run one rank and give the words of the breach."""
    monkeypatch.setattr(Lying, "member", member)
    monkeypatch.setattr(Lying, "change", staticmethod(change))
    case = make({"shape.world": 1, "engine.gas": 2}, suite="s", file="f")
    here = SimpleNamespace(
        rank=0, device=torch.device("cpu"), backend="gloo", new_group=lambda _: None
    )
    order = Order(case, f"{__name__}:Lying", case.layout, 0, 0.1, 0.0)
    if member == "":
        run(here, order)
        return ""
    with pytest.raises(ProtocolError) as breach:
        run(here, order)
    return str(breach.value)


def without(answer: Any) -> Any:
    """Leave out the embedding."""
    return {name: value for name, value in answer.items() if name != "embedding.weight"}


def each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change every value of a table."""
    return lambda answer: {name: change(value) for name, value in answer.items()}


def maps(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change every map of a routing."""
    return lambda answer: [[change(indices) for indices in layers] for layers in answer]


def test_the_right_answers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation the others are made of."""
    assert told(monkeypatch, "", lambda answer: answer) == ""


@pytest.mark.parametrize(
    ("member", "change", "says"),
    [
        ("step", lambda _: None, "step() gave None; it must give 2 floats, one per micro-batch"),
        ("step", lambda _: [], "step() gave []; it must give 2 floats"),
        ("step", lambda losses: losses[:1], "it must give 2 floats"),
        ("step", lambda _: ["a", "b"], "step() gave ['a', 'b']; it must give 2 floats"),
        ("gradients", each(torch.Tensor.flatten), "gradients() gave shape (1776,) for "
         "'embedding.weight'; it must give shape (37, 48): the model's (37, 48), not cut"),
        ("gradients", each(torch.Tensor.long), "gradients() gave a (37, 48) tensor of torch.int64"),
        ("gradients", without, "gradients() gave nothing for 'embedding.weight'; it must give "
         "every name of placements()"),
        ("gradients", lambda found: {**found, "z": torch.ones(2)}, "gradients() gave a tensor for "
         "'z'; it must give names of placements() only"),
        ("gradients", lambda _: None, "gradients() gave None; it must give full parameter name"),
        ("parameters", without, "parameters() gave nothing for 'embedding.weight'"),
        ("parameters", each(lambda _: None), "parameters() gave None for 'embedding.weight'; it "
         "must give a floating-point tensor"),
        ("routing", lambda _: None, "routing() gave None; it must give [micro_batch][MoE layer]"),
        ("routing", lambda found: found[0], "routing() gave [tensor("),
        ("routing", maps(torch.Tensor.float), ", 2) tensor of torch.float32; it must give "
         "[micro_batch][MoE layer] -> (tokens, top_k) int64 tensor"),
        ("routing", maps(torch.Tensor.tolist), "routing() gave [["),
        ("routing", maps(torch.Tensor.flatten), ",) tensor of torch.int64"),
        ("placements", lambda _: {}, "placements() gave {}; it must give full parameter name"),
        ("placements", each(lambda _: "dense"), "placements() gave dense for 'embedding.weight'; "
         "it must give an object with family and shards"),
        ("placements", each(lambda _: Placement("foo")), "placements() gave family 'foo' for "  # type: ignore[arg-type]
         "'embedding.weight'; it must give one of router, layernorm, dense, attention, embedding, "
         "expert, shared_expert"),
        ("placements", each(lambda _: Placement("dense", (Shard("dp", 0),))), "axis 'dp'"),  # type: ignore[arg-type]
        ("placements", each(lambda _: Placement("dense", (Shard("tp", 2),))),
         "placements() gave Shard(axis='tp', dim=2, segments=1) for 'embedding.weight'; it must "
         "give cuts that divide the model's shape (37, 48)"),
    ],
)  # fmt: skip
def test_another_answer_names_the_member_and_what_it_must_give(
    monkeypatch: pytest.MonkeyPatch, member: str, change: Callable[[Any], Any], says: str
) -> None:
    """The member, what it gave, for which parameter, and what would do."""
    assert says in told(monkeypatch, member, change)


def test_answers_beside_the_usual_ones_are_taken() -> None:
    """A scalar tensor is a number, None a missing gradient, a tuple a list."""
    loss = torch.tensor(2.0, requires_grad=True)
    assert protocol.losses((loss, 1), 2) == [2.0, 1.0]
    assert (protocol.norm(None), protocol.norm(torch.tensor(3.0))) == (None, 3.0)
    assert protocol.tensors("gradients()", {"w": None}) == {"w": None}
    assert protocol.routing(((INDICES,),)) == [[INDICES]]
    with pytest.raises(ProtocolError, match=r"grad_norm\(\) gave x; it must give a float or None"):
        protocol.norm("x")


def test_a_piece_is_what_the_cuts_leave_of_the_models_shape() -> None:
    """Two cuts of one tensor; a fused weight in segments; a name the model has not is not known."""
    layout = Layout(8, tp=2, ep=2, etp=2)
    placed = {
        "w": Placement("expert", (Shard("ep", 0), Shard("etp", 1, 2))),
        "v": Placement("dense"),
    }
    full = {"w": (4, 8, 3)}

    def check(shape: tuple[int, ...]) -> None:
        shapes = {"w": shape, "v": (9,)}
        protocol.check_shapes("parameters()", shapes, placed, full, layout)

    check((2, 4, 3))
    with pytest.raises(ProtocolError, match=r"dim 0 cut over ep, dim 1 cut over etp"):
        check((4, 8, 3))
    with pytest.raises(ProtocolError, match=r"cuts that divide the model's shape \(4, 6, 3\)"):
        protocol.check_shapes("parameters()", dict.fromkeys("wv", (2,)), placed,
                              {"w": (4, 6, 3)}, layout)  # fmt: skip


def test_ranks_that_disagree_are_an_error_of_the_implementation() -> None:
    """The row says what they disagree on, and not that the harness failed."""

    class Judge:
        def rows(self, _: Case) -> list[Row]:
            collect.agree([{"w": Placement("dense")}, {"w": Placement("router")}])
            return []

    case = make({"shape.world": 2}, suite="s", file="f")
    (row,) = session.judge_case(Judge(), case, "x").rows
    assert row.verdict == "error"
    assert (row.reason or "").startswith("w: ranks 0 and 1 disagree on its placement")
