"""Load a checkpoint into a folded training run, at the same or another layout.

Owns the order of a load over the ranks. Must not know which engine runs. Easy to get wrong: a load
that is refused must not have touched the engine, so nothing is set before the last check.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fold_impl import archive
from fold_impl.archive import CheckpointError, Index, Reader, Stored
from fold_impl.blocks import blocks, part_shape, tiles
from fold_impl.checkpoint_engine import (
    CheckpointedEngine,
    Ranks,
    buffers_of,
    device_of,
    placement_of,
)
from fold_impl.families import FoldedParameter
from fold_impl.layout import FoldLayout
from fold_impl.states import StateValue, from_plain, load_random_state


@dataclass(frozen=True)
class Loaded:
    """What a load did beside setting the engine."""

    path: Path
    client_state: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What could not be restored exactly, in words; empty: the run goes on bit for bit."""


@dataclass
class _Staged:
    """Everything a load is about to set, on the CPU."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, StateValue]] = field(default_factory=dict)
    random: dict[str, Tensor] | None = None


def load(
    engine: CheckpointedEngine,
    folder: str | os.PathLike[str],
    tag: str | None = None,
    *,
    reshard: bool = False,
    module_only: bool = False,
) -> Loaded:
    """Set an engine to a checkpoint; where that is refused, the engine stays as it is.

    Args:
        engine: engine over the same model.
        folder: directory the checkpoint was saved to.
        tag: which one; None: the latest.
        reshard: accept a checkpoint of another layout and cut it anew. Weights and optimizer state
            are exact at any layout; generators are where tp and dp are the same, else they are left
            as they are and `notes` says so.
        module_only: set weights and buffers, nothing else.

    Who must call: every rank of the stage.

    Raises:
        CheckpointError: on every rank alike: which file or tensor, what was expected, what found.
    """
    ranks = Ranks(engine.groups)
    path, index = _opened(ranks, Path(folder), tag)
    ranks.agreed(lambda: _check(engine, path, index, reshard=reshard, module_only=module_only))
    staged = ranks.agreed(lambda: _stage(engine, path, index, module_only))
    if not module_only:
        ranks.agreed(lambda: engine.check_optimizer_state(staged.optimizer))
    _set(engine, staged, index, module_only)
    notes = _notes(engine.groups.layout, index.layout) if not module_only else ()
    return Loaded(path, dict(index.client_state), notes)


def _opened(ranks: Ranks, folder: Path, tag: str | None) -> tuple[Path, Index]:
    """Read the index on every rank and make sure it is the same one."""

    def work() -> tuple[tuple[Path, Index], str]:
        path = archive.find(folder, tag)
        index = archive.read_index(path)
        return (path, index), archive.digest([index.tag, dict(index.files)])

    opened, digests = ranks.together(work)
    if len(set(digests)) > 1:
        raise CheckpointError("ranks see different checkpoints", folder, "one", set(digests))
    return opened


def _check(
    engine: CheckpointedEngine, path: Path, index: Index, *, reshard: bool, module_only: bool
) -> None:
    """Compare the checkpoint with the engine, and this rank's share of the files with the index."""
    layout = engine.groups.layout
    if index.layout != layout and not reshard:
        problem = "another layout (reshard=True cuts the checkpoint anew)"
        raise CheckpointError(problem, path, _sizes(layout), _sizes(index.layout))
    _check_weights(engine, path, index)
    if not module_only:
        _check_optimizer(engine, path, index)
        engine.check_training_state(index.training)
    files = sorted(index.files)
    archive.verify(path, index, files[engine.groups.stage.index :: engine.groups.stage.size])


def _sizes(layout: FoldLayout) -> str:
    sizes = {"world": layout.world_size, "tp": layout.tp_size, "ep": layout.ep_size}
    return ", ".join(f"{k} {n}" for k, n in (sizes | {"etp": layout.etp_size}).items())


def _check_weights(engine: CheckpointedEngine, path: Path, index: Index) -> None:
    """Compare names, families, cuts, shapes and dtypes of weights and buffers."""
    layout, wanted = engine.groups.layout, {}
    for member in engine.folded_parameters:
        like = torch.empty_like(member.parameter, dtype=engine.master_dtype, device="meta")
        placement = placement_of(engine, member)
        wanted[f"model/{member.name}"] = archive.stored_tensor(
            "model", member.name, like, placement, layout
        )
    for name, buffer in buffers_of(engine.module).items():
        wanted[f"model/{name}"] = archive.stored_tensor("model", name, buffer, None, layout)
    found = {key: stored for key, stored in index.tensors.items() if stored.folder == "model"}
    unknown, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    if unknown or missing:
        problem = "other weights than the model's" if missing else "weights the model does not have"
        raise CheckpointError(problem, path, _some(missing), _some(unknown))
    for key, stored in found.items():
        _check_tensor(path, stored, wanted[key])


def _some(keys: Sequence[str]) -> str:
    names = [key.partition("/")[2] for key in keys[:5]]
    more = [f"and {len(keys) - 5} more"] if len(keys) > 5 else []
    return ", ".join(names + more) or "none"


def _check_tensor(path: Path, found: Stored, wanted: Stored) -> None:
    where = f"{path}: {found.name}"
    if found.placement != wanted.placement:
        expected, actual = map(archive.describe_placement, (wanted.placement, found.placement))
        if expected == actual:
            expected, actual = str(wanted.placement), str(found.placement)
        raise CheckpointError("another family or placement", where, expected, actual)
    for what in ("shape", "dtype"):
        if getattr(found, what) != getattr(wanted, what):
            raise CheckpointError(
                f"another {what}", where, getattr(wanted, what), getattr(found, what)
            )


def _check_optimizer(engine: CheckpointedEngine, path: Path, index: Index) -> None:
    """Check that every entry of the state fits its parameter, cut as its parameter is."""
    weights = {s.name: s for s in index.tensors.values() if s.folder == "model"}
    members = {member.name: member for member in engine.folded_parameters}
    for stored in index.tensors.values():
        if stored.folder == "model":
            continue
        where = f"{path}: {stored.key}"
        if stored.name not in members:
            raise CheckpointError("state of no parameter", where, "a parameter", stored.name)
        weight = weights[stored.name]
        if stored.placement is None:
            if stored.shape:
                raise CheckpointError("a counter with a shape", where, (), stored.shape)
        elif (stored.placement, stored.shape) != (weight.placement, weight.shape):
            expected = f"{archive.describe_placement(weight.placement)}, shape {weight.shape}"
            actual = f"{archive.describe_placement(stored.placement)}, shape {stored.shape}"
            raise CheckpointError("placed unlike its weight", where, expected, actual)
    if unknown := sorted(set(index.scalars) - set(members)):
        raise CheckpointError("state of no parameter", path, "parameters", unknown[0])


def _stage(engine: CheckpointedEngine, path: Path, index: Index, module_only: bool) -> _Staged:
    """Read this rank's parts of everything."""
    staged = _Staged(optimizer={member.name: {} for member in engine.folded_parameters})
    members = {member.name: member for member in engine.folded_parameters}
    with Reader(path, index) as reader:
        for key, stored in index.tensors.items():
            if stored.folder == "optimizer" and module_only:
                continue
            part = _read(engine, reader, key, stored, members.get(stored.name))
            if stored.folder == "optimizer":
                assert stored.state is not None
                staged.optimizer[stored.name][stored.state] = part
            else:
                (staged.weights if stored.name in members else staged.buffers)[stored.name] = part
        if not module_only:
            staged.random = _random(engine, reader)
    if not module_only:
        for name, entries in index.scalars.items():
            staged.optimizer[name] |= {key: from_plain(value) for key, value in entries.items()}
    return staged


def _read(
    engine: CheckpointedEngine,
    reader: Reader,
    key: str,
    stored: Stored,
    member: FoldedParameter | None,
) -> Tensor:
    """Read the part that is this rank's under the engine's own layout."""
    if member is None or stored.placement is None:
        return reader.whole(key)
    layout, rank = engine.groups.layout, engine.groups.rank
    placement = placement_of(engine, member, stored.state)
    if not tiles(stored.shape, placement, layout):
        where = f"{reader.path}: {stored.key} {stored.shape}"
        raise CheckpointError("cannot be cut", where, "sizes that divide it", _sizes(layout))
    part = reader.part(key, blocks(stored.shape, placement, layout, rank))
    assert part.shape == part_shape(stored.shape, placement, layout)
    loaded: Tensor = engine.points(
        "checkpoint.part",
        part,
        name=member.name,
        family=member.family,
        state=stored.state,
        layout=layout,
        saved=reader.index.layout,
    )
    return loaded


def _random(engine: CheckpointedEngine, reader: Reader) -> dict[str, Tensor] | None:
    """Read the generators of this rank's (dp index, lane), where the dense view is the same."""
    layout, rank = engine.groups.layout, engine.groups.rank
    if _notes(layout, reader.index.layout):
        return None
    file = archive.random_file(layout.rank_in("dp", rank), layout.rank_in("tp", rank))
    return reader.all_of(file)


def _notes(layout: FoldLayout, saved: FoldLayout) -> tuple[str, ...]:
    if (layout.dp_size, layout.tp_size) == (saved.dp_size, saved.tp_size):
        return ()
    return (
        f"random state not restored: it was saved for dp {saved.dp_size} x tp {saved.tp_size}, "
        f"this run is dp {layout.dp_size} x tp {layout.tp_size}; generators are left as they are",
    )


@torch.no_grad()
def _set(engine: CheckpointedEngine, staged: _Staged, index: Index, module_only: bool) -> None:
    """Set the engine; everything was checked and read, so only copies in memory are left."""
    engine.load_master_weights(staged.weights)
    present = buffers_of(engine.module)
    for name, buffer in staged.buffers.items():
        present[name].copy_(buffer)
    if module_only:
        return
    engine.load_optimizer_state(staged.optimizer)
    engine.load_training_state(index.training)
    if staged.random is not None:
        load_random_state(staged.random, device_of(engine))
