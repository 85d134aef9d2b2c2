"""Write a checkpoint of a folded training run, whole or not at all.

Owns the order of a save over the ranks. Must not know which engine runs. Easy to get wrong: the
previous checkpoint must stay usable whatever interrupts a save, so nothing it consists of is
touched before the new one is on the disk.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fold_impl import archive
from fold_impl.archive import CheckpointError, Index, Stored
from fold_impl.blocks import Block, Size, blocks, writers
from fold_impl.checkpoint_engine import (
    CheckpointedEngine,
    Ranks,
    aliases_of,
    buffers_of,
    device_of,
    placement_of,
)
from fold_impl.families import FoldedParameter
from fold_impl.states import StateValue, random_state, to_plain


@dataclass
class _Draft:
    """What this rank is to write, by folder and number of the rectangle in its part."""

    engine: CheckpointedEngine
    tensors: dict[str, Stored] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def add(self, stored: Stored, part: Tensor) -> None:
        """Note a tensor, and keep a copy of this rank's part if this rank is its writer."""
        layout, rank = self.engine.groups.layout, self.engine.groups.rank
        entry = f"{stored.folder}/{stored.key}"
        self.tensors[entry] = stored
        if rank in writers(stored.cut, layout):
            found = blocks(stored.shape, stored.cut, layout, rank)
            self.own[entry] = {n: _rectangle(part, b) for n, b in enumerate(found)}


def _rectangle(part: Tensor, block: Block) -> Tensor:
    """Copy a rectangle of a part to memory of its own on the CPU."""
    ranges = zip(block.local, block.shape, strict=True)
    view = part.detach()[tuple(slice(at, at + size) for at, size in ranges)]
    copied = torch.empty(block.shape, dtype=view.dtype)
    copied.copy_(view)
    return copied


def save(
    engine: CheckpointedEngine,
    folder: str | os.PathLike[str],
    tag: str,
    client_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint and make it the latest; whatever interrupts it, the previous one stays.

    Everything is written into a directory beside the target and reaches the disk before that takes
    its name; `latest` changes last. Each distinct part is written once, by the lowest rank that
    holds it.

    Args:
        engine: engine at the boundary of a step.
        folder: directory of all checkpoints of a run, shared by the ranks.
        tag: name of this one; an existing one of that name is replaced.
        client_state: JSON of the caller's; rank 0's is kept.

    Who must call: every rank of the stage.

    Raises:
        CheckpointError: on every rank alike; nothing has changed for a later load.
    """
    ranks, root = Ranks(engine.groups), Path(folder)
    facts = ranks.agreed(lambda: _facts(engine, tag, client_state))
    draft, shares = ranks.together(lambda: _drafted(engine, tag, facts))
    partial = root / _partial(tag, shares[0]["token"])
    try:
        ranks.agreed(lambda: _begin(root, tag, shares, first=ranks.first))
        index = _index(engine, draft, tag, shares[0])
        _, reports = ranks.together(lambda: (None, _written(engine, draft, index, partial)))
        files = {file: facts for report in reports for file, facts in report.items()}
        index = replace(index, files=dict(sorted(files.items())))
        ranks.agreed(lambda: _commit(root, partial, index) if ranks.first else None)
    except CheckpointError:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return root / tag


def _facts(
    engine: CheckpointedEngine, tag: str, client_state: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Give all that is no tensor; makes every refusal that could be one rank's alone."""
    archive.check_tag(tag)
    return {
        "training": dict(engine.training_state()),
        "client_state": _plain_client_state(client_state),
        "token": uuid.uuid4().hex[:12],
    }


def _drafted(
    engine: CheckpointedEngine, tag: str, facts: Mapping[str, Any]
) -> tuple[_Draft, dict[str, Any]]:
    """Describe and copy everything this rank writes; nothing touches the disk yet.

    Engines may gather here: collectives that every rank enters in the same order.
    """
    draft = _Draft(engine)
    layout, weights = engine.groups.layout, engine.master_weights()
    for member in engine.folded_parameters:
        part, runs_as = weights[member.name], _dtype(member.parameter)
        placement = placement_of(engine, member)
        draft.add(
            archive.stored_tensor("model", member.name, part, placement, layout, runs_as=runs_as),
            part,
        )
    for name, buffer in buffers_of(engine.module).items():
        draft.add(archive.stored_tensor("model", name, buffer, None, layout), buffer)
    states = engine.optimizer_state()
    for member in engine.folded_parameters:
        _draft_state(draft, member, states[member.name])
    told = [tag, facts["training"], draft.scalars, _plain_tensors(draft.tensors)]
    return draft, {**facts, "digest": archive.digest(told)}


def _draft_state(draft: _Draft, member: FoldedParameter, state: Mapping[str, StateValue]) -> None:
    layout, wanted = draft.engine.groups.layout, member.parameter.shape
    for key, value in state.items():
        if not isinstance(value, Tensor):
            draft.scalars.setdefault(member.name, {})[key] = to_plain(value, f"{member.name}.{key}")
            continue
        shaped = value.shape == wanted and value.ndim > 0
        if not shaped and value.ndim > 0:
            where, problem = f"{member.name}: {key}", "is shaped unlike its parameter"
            raise CheckpointError(problem, where, tuple(wanted), tuple(value.shape))
        placement = placement_of(draft.engine, member, key) if shaped else None
        stored = archive.stored_tensor(
            "optimizer", member.name, value, placement, layout, state=key
        )
        draft.add(stored, value)


def _plain_tensors(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    return {key: asdict(stored) for key, stored in tensors.items()}


def _plain_client_state(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check that JSON gives the caller's state back as it is."""
    given = dict(state or {})
    try:
        returned = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"not JSON ({error})", "client_state") from error
    if returned != given:
        changed = [k for k in given if returned.get(str(k)) != given[k] or not isinstance(k, str)]
        problem = "would come back changed (JSON has no tuples, and keys are strings)"
        raise CheckpointError(problem, f"client_state[{changed[0]!r}]")
    return given


def _begin(root: Path, tag: str, shares: Sequence[Mapping[str, Any]], *, first: bool) -> None:
    """Refuse ranks about to save different runs; remove what killed saves of this tag left."""
    for rank, share in enumerate(shares):
        if share["digest"] != shares[0]["digest"]:
            problem = "saves another tag, other tensors or counters than rank 0"
            raise CheckpointError(problem, f"rank {rank}", shares[0]["digest"], share["digest"])
    if first:
        for leftover in root.glob(_partial(glob.escape(tag), "*")):
            shutil.rmtree(leftover, ignore_errors=True)


def _partial(tag: str, token: str) -> str:
    return f".{tag}.partial-{token}"


def _index(engine: CheckpointedEngine, draft: _Draft, tag: str, share: Mapping[str, Any]) -> Index:
    return Index(
        tag=tag,
        layout=engine.groups.layout,
        tensors=draft.tensors,
        aliases=aliases_of(engine),
        scalars=draft.scalars,
        training=share["training"],
        client_state=share["client_state"],
    )


def _written(
    engine: CheckpointedEngine, draft: _Draft, index: Index, partial: Path
) -> dict[str, dict[str, Any]]:
    """Write this rank's files and give sizes and hashes."""
    layout, rank = engine.groups.layout, engine.groups.rank
    tensors: dict[str, dict[str, Tensor]] = {}
    offsets: dict[str, dict[str, Size]] = {}
    for entry, found in index.pieces.items():
        mine = [piece for piece in found if piece.rank == rank]
        for number, piece in enumerate(mine):
            key = index.tensors[entry].key
            tensors.setdefault(piece.file, {})[key] = draft.own[entry].pop(number)
            offsets.setdefault(piece.file, {})[key] = piece.block.offset
    generators = random_state(device_of(engine))
    file = archive.random_file(layout.rank_in("dp", rank), layout.rank_in("tp", rank))
    tensors[file], offsets[file] = generators, dict.fromkeys(generators, (0,))
    return {
        file: archive.write_tensors(partial, file, tensors.pop(file), offsets[file])
        for file in list(tensors)
    }


def _commit(root: Path, partial: Path, index: Index) -> None:
    """Give the finished directory its name, then make it the latest."""
    archive.write_text(partial / archive.INDEX, index.to_json())
    archive.sync(partial)
    target = root / index.tag
    aside = root / archive.PREVIOUS.format(tag=index.tag)
    if target.exists():
        # from here until the second rename `archive.find` answers with the one put aside
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    os.replace(partial, target)
    archive.sync(root)
    archive.switch_text(root / archive.LATEST, index.tag)
    shutil.rmtree(aside, ignore_errors=True)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
