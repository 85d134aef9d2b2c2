"""Whether what an implementation hands back is what the Protocol asks for.

Owns the types, names and shapes of every member's answer, and the words in which a wrong one is
refused: the member, what it gave, what it must give. Must not know values: a wrong number is a
finding, never a breach. Easy to get wrong: a None in the place of a gradient is an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.errors import InfrastructureError
from parity.implementation import FAMILIES, Placement, Shard
from parity.layout import Layout

AXES = ("tp", "ep", "etp")
SHOWN = 100
"""Characters of an answer that are shown."""


class ProtocolError(InfrastructureError):
    """The implementation under test gave what no comparison can be made of."""


def losses(given: Any, micro_batches: int) -> list[float]:
    """Read what `step()` gave."""
    try:
        found = [float(x.detach() if isinstance(x, Tensor) else x) for x in given]
    except (TypeError, ValueError, RuntimeError):
        found = []
    if len(found) != micro_batches:
        raise _breach("step()", given, f"{micro_batches} floats, one per micro-batch")
    return found


def norm(given: Any) -> float | None:
    """Read what `grad_norm()` gave."""
    try:
        return None if given is None else float(given)
    except (TypeError, ValueError, RuntimeError):
        raise _breach("grad_norm()", given, "a float or None") from None


def routing(given: Any) -> list[list[Tensor]]:
    """Read what `routing()` gave; how many maps there are, and of what, is compared later."""
    needs = "[micro_batch][MoE layer] -> (tokens, top_k) int64 tensor of expert indices"
    if not _is_list(given) or not all(_is_list(layers) for layers in given):
        raise _breach("routing()", given, needs)
    for layers in given:
        for indices in layers:
            is_tensor = isinstance(indices, Tensor)
            if not is_tensor or indices.dtype != torch.int64 or indices.ndim != 2:
                raise _breach("routing()", indices, needs)
    return [list(layers) for layers in given]


def tensors(member: str, given: Any) -> Mapping[str, Tensor | None]:
    """Read what `parameters()` or `gradients()` gave: floating-point tensors by name.

    A gradient may be None; a parameter may not.
    """
    if not isinstance(given, Mapping):
        raise _breach(member, given, "full parameter name -> tensor")
    for name, tensor in given.items():
        if tensor is None and member == "gradients()":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise _breach(member, tensor, "a floating-point tensor", name)
    return given


def placements(given: Any) -> dict[str, Placement]:
    """Rebuild structurally equal placements as ours, so that no foreign class travels."""
    if not isinstance(given, Mapping) or not given:
        raise _breach("placements()", given, "full parameter name -> family and cuts")
    return {name: _placement(name, p) for name, p in given.items()}


def _placement(name: str, given: Any) -> Placement:
    member = "placements()"
    if not (hasattr(given, "family") and hasattr(given, "shards")):
        raise _breach(member, given, "an object with family and shards", name)
    if given.family not in FAMILIES:
        raise _breach(member, f"family {given.family!r}", f"one of {', '.join(FAMILIES)}", name)
    for shard in given.shards:
        if shard.axis not in AXES:
            raise _breach(member, f"axis {shard.axis!r}", f"one of {', '.join(AXES)}", name)
    shards = tuple(Shard(s.axis, s.dim, s.segments) for s in given.shards)
    return Placement(given.family, shards)


def check_shapes(
    member: str,
    shapes: Mapping[str, Sequence[int] | None],
    placed: Mapping[str, Placement],
    full: Mapping[str, Sequence[int]],
    layout: Layout,
) -> None:
    """Refuse names that `placements()` has not, names left out, and pieces of a wrong shape.

    Args:
        member: whose answer they are of.
        shapes: name -> shape of this rank's piece, None where it has none.
        placed: name -> family and cuts.
        full: name -> shape of the parameter in the uncut model; other names have no known shape.
        layout: sizes of the run.

    Raises:
        ProtocolError: names the member, the parameter, and what it must give.
    """
    for name in placed:
        if name not in shapes:
            raise _breach(member, "nothing", "every name of placements()", name)
    for name, given in shapes.items():
        if name not in placed:
            raise _breach(member, "a tensor", "names of placements() only", name)
        if given is None or name not in full:
            continue
        shape = _local(name, full[name], placed[name], layout)
        if tuple(given) != shape:
            cuts = "".join(f", dim {s.dim} cut over {s.axis}" for s in placed[name].shards)
            needs = f"shape {shape}: the model's {tuple(full[name])}{cuts or ', not cut'}"
            raise _breach(member, f"shape {tuple(given)}", needs, name)


def _local(name: str, full: Sequence[int], placement: Placement, layout: Layout) -> tuple[int, ...]:
    """Cut the shape of a parameter."""
    shape = list(full)
    for shard in placement.shards:
        parts = getattr(layout, shard.axis)
        if not 0 <= shard.dim < len(shape) or shape[shard.dim] % (parts * shard.segments):
            needs = f"cuts that divide the model's shape {tuple(full)}, {shard.axis} = {parts}"
            raise _breach("placements()", shard, needs, name)
        shape[shard.dim] //= parts
    return tuple(shape)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _breach(member: str, given: Any, needs: str, name: str | None = None) -> ProtocolError:
    """Word a breach; a text stands for itself, anything else is shown."""
    if isinstance(given, Tensor):
        given = f"a {tuple(given.shape)} tensor of {given.dtype}"
    shown = given if isinstance(given, str) else " ".join(repr(given).split())[:SHOWN]
    of = f" for {name!r}" if name else ""
    return ProtocolError(f"{member} gave {shown}{of}; it must give {needs}")
