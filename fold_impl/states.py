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
from collections.abc import Mapping, Sequence
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
        group = groups[id(weight)]
        moves = bool(group.get("capturable") or group.get("fused"))
        optimizer.state[weight] = {
            key: _moved(value, weight.device, moves) for key, value in state[member.name].items()
        }


def _moved(value: StateValue, device: torch.device, scalars_too: bool) -> StateValue:
    moves = isinstance(value, Tensor) and (value.ndim > 0 or scalars_too)
    return value.to(device) if moves and isinstance(value, Tensor) else value


def parameter_groups(
    optimizer: torch.optim.Optimizer, parameters: Sequence[FoldedParameter]
) -> list[dict[str, Any]]:
    """Describe the groups: names of their parameters, and options such as lr and betas."""
    names = {id(p.parameter): p.name for p in parameters}
    return [
        {
            "names": [names[id(p)] for p in group["params"] if id(p) in names],
            "options": {k: to_plain(v, k) for k, v in group.items() if k != "params"},
        }
        for group in optimizer.param_groups
    ]


def load_parameter_groups(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Set the options of every group; a tensor (a capturable lr) is filled where it lies."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, plain in saved["options"].items():
            value, present = from_plain(plain), group.get(key)
            if isinstance(present, Tensor) and isinstance(value, Tensor):
                present.copy_(value)
            else:
                group[key] = value


def trainer_state(
    optimizer: torch.optim.Optimizer, lr_scheduler: Any, parameters: Sequence[FoldedParameter]
) -> dict[str, Any]:
    """Describe optimizer and schedule as JSON: their kinds, options and progress."""
    scheduler = None
    if lr_scheduler is not None:
        state = to_plain(lr_scheduler.state_dict(), "lr_scheduler")
        scheduler = {"type": type(lr_scheduler).__name__, "state": state}
    return {
        "optimizer": type(optimizer).__name__,
        "groups": parameter_groups(optimizer, parameters),
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
    optimizer: torch.optim.Optimizer, lr_scheduler: Any, saved: Mapping[str, Any]
) -> None:
    """Set options and schedule."""
    load_parameter_groups(optimizer, saved["groups"])
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(from_plain(saved["scheduler"]["state"]))


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
