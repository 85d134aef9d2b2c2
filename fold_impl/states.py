"""What a training run remembers besides weights, as tensors and JSON: optimizer, schedule, random.

Owns the translation of torch's objects to and from plain values. Must not know files or ranks.
Easy to get wrong: JSON has no tuples, counters or infinities, so a value that would come back as
something else is written with its kind, and one that has no kind is refused.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fold_impl.archive import CheckpointError
from fold_impl.families import FoldedParameter

StateValue = Tensor | float | int | bool | None
"""One entry of a parameter's optimizer state."""


class PlainError(TypeError):
    """A value that JSON cannot give back as it is."""


def to_plain(value: Any, path: str = "") -> Any:
    """Turn a value into JSON that `from_plain` gives back equal, in kind too.

    Raises:
        PlainError: names the place and type of a value that has no JSON form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor) and value.ndim == 0:
        kind = str(value.dtype).removeprefix("torch.")
        return {"$tensor": [kind, to_plain(value.item(), path)]}
    if isinstance(value, (list, tuple)):
        items = [to_plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        return _plain_mapping(value, path)
    raise PlainError(f"{path or 'value'} is a {type(value).__name__}")


def _plain_mapping(value: Mapping[Any, Any], path: str) -> dict[str, Any]:
    if type(value) is dict and all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {k: to_plain(v, f"{path}.{k}" if path else k) for k, v in value.items()}
    if type(value) not in (dict, Counter):
        raise PlainError(f"{path or 'value'} is a {type(value).__name__}")
    kind = "$counter" if isinstance(value, Counter) else "$map"
    pairs = [[to_plain(k, path), to_plain(v, f"{path}[{k!r}]")] for k, v in value.items()]
    return {kind: pairs}


def from_plain(value: Any) -> Any:
    """Give back what `to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    inner: Any
    kind, inner = next(iter(value.items()), ("", None))
    if kind == "$float":
        return float(inner)
    if kind == "$tensor":
        return torch.tensor(from_plain(inner[1]), dtype=getattr(torch, inner[0]))
    if kind == "$tuple":
        return tuple(from_plain(v) for v in inner)
    if kind in ("$map", "$counter"):
        pairs = {from_plain(k): from_plain(v) for k, v in inner}
        return Counter(pairs) if kind == "$counter" else pairs
    return {k: from_plain(v) for k, v in value.items()}


# ---------------------------------------------------------------- torch.optim


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[FoldedParameter]
) -> dict[str, dict[str, StateValue]]:
    """Read the state of every parameter by name: SGD, Adam, AdamW, Lion and their like."""
    return {p.name: dict(optimizer.state.get(p.parameter, {})) for p in parameters}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[FoldedParameter],
    state: Mapping[str, Mapping[str, StateValue]],
) -> None:
    """Replace the state of every parameter; counters stay on the CPU where torch keeps them."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for member in parameters:
        weight = member.parameter
        optimizer.state.pop(weight, None)
        if not state.get(member.name):
            continue
        optimizer.state[weight] = {
            key: on_device(value, weight.device, groups[id(weight)])
            for key, value in state[member.name].items()
        }


def on_device(value: StateValue, device: torch.device, group: Mapping[str, Any]) -> StateValue:
    """Bring one entry to where torch keeps it: a counter only for some options of its group."""
    if not isinstance(value, Tensor):
        return value
    moves = value.ndim > 0 or group.get("capturable") or group.get("fused")
    return value.to(device) if moves else value


@dataclass(frozen=True)
class Grouping:
    """Which parameters an optimizer's groups hold, and which of them were one group when given.

    An engine may split a group by family, and how depends on the layout: a checkpoint knows groups
    as they were given.
    """

    names: Sequence[Sequence[str]]
    """Per group: its trained parameters."""
    origin: Sequence[int]
    """Per group: number of the given group it is a part of."""

    @classmethod
    def whole(
        cls, optimizer: torch.optim.Optimizer, parameters: Sequence[FoldedParameter]
    ) -> Grouping:
        """Describe groups that are as they were given."""
        names = {id(p.parameter): p.name for p in parameters if p.parameter.requires_grad}
        held = [
            [names[id(p)] for p in group["params"] if id(p) in names]
            for group in optimizer.param_groups
        ]
        return cls(held, range(len(held)))

    @property
    def given(self) -> list[int]:
        """Per group: place of its given group among those that have a part."""
        present = list(dict.fromkeys(self.origin))
        return [present.index(origin) for origin in self.origin]

    def joined(self, values: Sequence[Any]) -> list[Any]:
        """Give one value per given group, that of its first part, out of one per group."""
        return [values[self.given.index(place)] for place in dict.fromkeys(self.given)]

    def split(self, values: Sequence[Any]) -> list[Any]:
        """Give one value per group out of one per given group."""
        return [values[place] for place in self.given]


MARKS = ("params", "name", "moe")
"""Entries of a group that are no options: its parameters, and what DeepSpeed calls it."""
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs")
"""Entries of torch's schedules that hold one value per group."""


def parameter_groups(optimizer: torch.optim.Optimizer, grouping: Grouping) -> list[dict[str, Any]]:
    """Describe the groups as given: names of their parameters, and options such as lr and betas.

    Raises:
        CheckpointError: parts of one given group have different options.
    """
    options = [
        {key: to_plain(value, key) for key, value in group.items() if key not in MARKS}
        for group in optimizer.param_groups
    ]
    firsts = grouping.joined(options)
    for place, found in zip(grouping.given, options, strict=True):
        if found != firsts[place]:
            problem = "options differ between the families of one group"
            raise CheckpointError(problem, f"parameter group {place}", firsts[place], found)
    names: list[list[str]] = [[] for _ in firsts]
    for place, part in zip(grouping.given, grouping.names, strict=True):
        names[place] += part
    return [
        {"names": sorted(held), "options": first} for held, first in zip(names, firsts, strict=True)
    ]


def load_parameter_groups(
    optimizer: torch.optim.Optimizer, grouping: Grouping, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Set the options of every group; a tensor (a capturable lr) is filled where it lies."""
    for group, saved in zip(optimizer.param_groups, grouping.split(groups), strict=True):
        for key, plain in saved["options"].items():
            value, present = from_plain(plain), group.get(key)
            if isinstance(present, Tensor) and isinstance(value, Tensor):
                present.copy_(value)
            else:
                group[key] = value


def _regrouped(state: Any, rule: Callable[[Sequence[Any]], list[Any]]) -> Any:
    """Apply a rule to every list of a schedule's plain state that holds a value per group."""
    if isinstance(state, list):
        return [_regrouped(value, rule) for value in state]
    if not isinstance(state, dict):
        return state
    return {
        key: rule(value)
        if key in PER_GROUP and isinstance(value, list)
        else _regrouped(value, rule)
        for key, value in state.items()
    }


def trainer_state(
    optimizer: torch.optim.Optimizer, lr_scheduler: Any, grouping: Grouping
) -> dict[str, Any]:
    """Describe optimizer and schedule as JSON: their kinds, options and progress."""
    scheduler = None
    if lr_scheduler is not None:
        state = to_plain(lr_scheduler.state_dict(), "lr_scheduler")
        state = _regrouped(state, grouping.joined)
        scheduler = {"type": type(lr_scheduler).__name__, "state": state}
    return {
        "optimizer": type(optimizer).__name__,
        "groups": parameter_groups(optimizer, grouping),
        "scheduler": scheduler,
    }


def check_trainer_state(present: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse the state of another optimizer, other parameter groups or another schedule.

    Args:
        present: `trainer_state` of the run that is to go on.
        saved: that of the checkpoint.

    Raises:
        CheckpointError: names what differs.
    """
    for what, kind in (("optimizer", str), ("scheduler", _type_of)):
        expected, found = kind(present[what]), kind(saved[what])
        if expected != found:
            raise CheckpointError(f"of another {what}", "training state", expected, found)
    groups = [[group["names"] for group in state["groups"]] for state in (present, saved)]
    if groups[0] != groups[1]:
        sizes = [f"groups of {[len(names) for names in found]} parameters" for found in groups]
        raise CheckpointError("other parameter groups", "training state", *sizes)


def _type_of(scheduler: Mapping[str, Any] | None) -> str:
    return "none" if scheduler is None else str(scheduler["type"])


def load_trainer_state(
    optimizer: torch.optim.Optimizer,
    lr_scheduler: Any,
    grouping: Grouping,
    saved: Mapping[str, Any],
) -> None:
    """Set options and schedule."""
    load_parameter_groups(optimizer, grouping, saved["groups"])
    if lr_scheduler is not None:
        state = _regrouped(saved["scheduler"]["state"], grouping.split)
        lr_scheduler.load_state_dict(from_plain(state))


# ---------------------------------------------------------------- generators


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Read this rank's generators: torch's on the CPU and its device, Python's, NumPy's."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": _bytes([*random.getstate()]),
        "numpy": _bytes([kind, np.asarray(keys).tolist(), *rest]),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set this rank's generators."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = _values(state["python"])
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = _values(state["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _bytes(values: Sequence[Any]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _values(written: Tensor) -> list[Any]:
    values: list[Any] = json.loads(bytes(written.tolist()))
    return values
