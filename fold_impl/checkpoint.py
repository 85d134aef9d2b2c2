"""Save and load a folded training run, whole, at the same or another layout; export plain weights.

Owns the order of a save and of a load over the ranks. Must not know which engine runs: whatever
fulfils `CheckpointedEngine` is saved. Easy to get wrong: a rank that fails alone must not leave the
others waiting, and a load that is refused must not have touched the engine, so every stage ends in
one exchange of outcomes and nothing is set before the last of them.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from fold_impl import archive
from fold_impl.archive import CheckpointError, Index, Reader, Stored
from fold_impl.blocks import Block, Size, blocks, part_shape, tiles, writers
from fold_impl.families import FoldedParameter, Placement
from fold_impl.groups import FoldGroups
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from fold_impl.states import (
    StateValue,
    from_plain,
    load_random_state,
    random_state,
    to_plain,
)

__all__ = [
    "CheckpointError",
    "CheckpointedEngine",
    "Loaded",
    "export",
    "load",
    "save",
    "state_dict",
]

T = TypeVar("T")
S = TypeVar("S")
OptimizerState = Mapping[str, Mapping[str, StateValue]]
"""parameter name -> {entry: part shaped like this rank's of the parameter, 0-d tensor, number}."""
EXPORT_SHARD_BYTES = 5 * 10**9
"""Largest exported file: transformers' own default."""


class CheckpointedEngine(Protocol):
    """What an engine offers to be saved and loaded; every method is called on every rank."""

    @property
    def module(self) -> nn.Module:
        """Folded module; its persistent buffers and tied names are saved with the weights."""

    @property
    def folded_parameters(self) -> Sequence[FoldedParameter]:
        """Parameters under their names in the original model, in the same order on every rank."""

    @property
    def groups(self) -> FoldGroups:
        """This rank's place in the layout; outcomes are exchanged over its stage."""

    @property
    def points(self) -> Points:
        """Named places where a placement or a loaded part can be watched or replaced."""

    def master_weights(self) -> Mapping[str, Tensor]:
        """Give this rank's part of every parameter, at the precision that is trained."""

    def load_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's part of every parameter; the parts are on the CPU."""

    def optimizer_state(self) -> OptimizerState:
        """Give the optimizer's state; a lazy mapping may gather on access.

        Every rank asks for every parameter once, in the order of `folded_parameters`.
        """

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace the optimizer's state; the parts are on the CPU."""

    def training_state(self) -> Mapping[str, Any]:
        """Give counters, schedule and options as strict JSON, equal on every rank.

        Raises:
            CheckpointError: nothing can be saved now, as between two micro-batches of a step.
        """

    def check_training_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError where `load_training_state` could not take a state over."""

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Set counters, schedule and options."""


@dataclass(frozen=True)
class Loaded:
    """What a load did beside setting the engine."""

    path: Path
    client_state: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What could not be restored exactly, in words; empty: the run goes on bit for bit."""


@dataclass(frozen=True)
class _Ranks:
    groups: FoldGroups

    @property
    def first(self) -> bool:
        return self.groups.stage.index == 0

    def together(self, work: Callable[[], tuple[T, S]]) -> tuple[T, list[S]]:
        """Run `work` on every rank; give the own result, and by rank what each tells the others.

        Who must call: every rank of the stage, also one that has nothing to do.

        Raises:
            CheckpointError: any rank raised something: the lowest rank's words, on every rank.
        """
        cause: Exception | None = None
        told: tuple[CheckpointError | None, Any] = (None, None)
        try:
            result, share = work()
            told = (None, share)
        except CheckpointError as error:
            told = (error, None)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            cause = error
            told = (CheckpointError(f"{type(error).__name__}: {error}", "checkpoint"), None)
        everyone: list[tuple[CheckpointError | None, Any]] = self._exchange(told)
        failed = [(rank, e) for rank, (e, _) in enumerate(everyone) if e is not None]
        if failed:
            rank, first = failed[0]
            alone = "" if len(failed) == len(everyone) else f"rank {rank}: "
            where = f"{alone}{first.where}"
            raise CheckpointError(first.problem, where, first.expected, first.found) from cause
        return result, [share for _, share in everyone]

    def agreed(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank, all of them going on or none; see `together`."""
        result, _ = self.together(lambda: (work(), None))
        return result

    def _exchange(self, told: T) -> list[T]:
        stage = self.groups.stage
        if stage.handle is None:
            return [told]
        # objects travel between the living ranks of one job, never through a file
        everyone: list[Any] = [None] * stage.size
        dist.all_gather_object(everyone, told, group=stage.handle)
        return everyone


# ---------------------------------------------------------------- save


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
    ranks, root = _Ranks(engine.groups), Path(folder)
    draft, shares = ranks.together(lambda: _drafted(engine, tag, client_state))
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


def _drafted(
    engine: CheckpointedEngine, tag: str, client_state: Mapping[str, Any] | None
) -> tuple[_Draft, dict[str, Any]]:
    """Describe and copy everything this rank writes; nothing touches the disk yet."""
    archive.check_tag(tag)
    training = dict(engine.training_state())
    draft = _Draft(engine)
    layout, weights = engine.groups.layout, engine.master_weights()
    for member in engine.folded_parameters:
        part, runs_as = weights[member.name], _dtype(member.parameter)
        placement = _placement(engine, member)
        draft.add(
            archive.stored_tensor("model", member.name, part, placement, layout, runs_as=runs_as),
            part,
        )
    for name, buffer in _buffers(engine.module).items():
        draft.add(archive.stored_tensor("model", name, buffer, None, layout), buffer)
    states = engine.optimizer_state()
    for member in engine.folded_parameters:
        _draft_state(draft, member, weights[member.name], states[member.name])
    agreed = archive.digest([tag, training, draft.scalars, _plain_tensors(draft.tensors)])
    share = {
        "digest": agreed,
        "training": training,
        "client_state": _plain_client_state(client_state),
        "token": uuid.uuid4().hex[:12],
    }
    return draft, share


def _placement(
    engine: CheckpointedEngine, member: FoldedParameter, state: str | None = None
) -> Placement:
    placed: Placement = engine.points(
        "checkpoint.placement",
        member.placement,
        name=member.name,
        family=member.family,
        state=state,
        layout=engine.groups.layout,
    )
    return placed


def _draft_state(
    draft: _Draft, member: FoldedParameter, weight: Tensor, state: Mapping[str, StateValue]
) -> None:
    layout = draft.engine.groups.layout
    for key, value in state.items():
        if not isinstance(value, Tensor):
            draft.scalars.setdefault(member.name, {})[key] = to_plain(value, f"{member.name}.{key}")
            continue
        shaped = value.shape == weight.shape and value.ndim > 0
        if not shaped and value.ndim > 0:
            where, problem = f"{member.name}: {key}", "is shaped unlike its parameter"
            raise CheckpointError(problem, where, tuple(weight.shape), tuple(value.shape))
        placement = _placement(draft.engine, member, key) if shaped else None
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
        aliases=_aliases(engine),
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
    generators = random_state(_device(engine))
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


# ---------------------------------------------------------------- load


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
    ranks = _Ranks(engine.groups)
    path, index = _opened(ranks, Path(folder), tag)
    ranks.agreed(lambda: _check(engine, path, index, reshard=reshard, module_only=module_only))
    staged = ranks.agreed(lambda: _stage(engine, path, index, module_only))
    _set(engine, staged, index, module_only)
    notes = _notes(engine.groups.layout, index.layout) if not module_only else ()
    return Loaded(path, dict(index.client_state), notes)


def _opened(ranks: _Ranks, folder: Path, tag: str | None) -> tuple[Path, Index]:
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
    weights, layout = engine.master_weights(), engine.groups.layout
    wanted = {
        f"model/{m.name}": archive.stored_tensor(
            "model", m.name, weights[m.name], _placement(engine, m), layout
        )
        for m in engine.folded_parameters
    }
    for name, buffer in _buffers(engine.module).items():
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
    staged = _Staged()
    members = {member.name: member for member in engine.folded_parameters}
    with Reader(path, index) as reader:
        for key, stored in index.tensors.items():
            if stored.folder == "optimizer" and module_only:
                continue
            part = _read(engine, reader, key, stored, members.get(stored.name))
            if stored.folder == "optimizer":
                assert stored.state is not None
                staged.optimizer.setdefault(stored.name, {})[stored.state] = part
            else:
                (staged.weights if stored.name in members else staged.buffers)[stored.name] = part
        if not module_only:
            staged.random = _random(engine, reader)
    if not module_only:
        for name, entries in index.scalars.items():
            staged.optimizer.setdefault(name, {}).update(
                {key: from_plain(value) for key, value in entries.items()}
            )
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
    placement = _placement(engine, member, stored.state)
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
    present = _buffers(engine.module)
    for name, buffer in staged.buffers.items():
        present[name].copy_(buffer)
    if module_only:
        return
    names = [member.name for member in engine.folded_parameters]
    engine.load_optimizer_state({name: staged.optimizer.get(name, {}) for name in names})
    engine.load_training_state(index.training)
    if staged.random is not None:
        load_random_state(staged.random, _device(engine))


# ---------------------------------------------------------------- what an engine holds


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Give the persistent buffers by name: a router's correction bias is one."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    }


def _aliases(engine: CheckpointedEngine) -> dict[str, str]:
    """Give the further names of tied weights."""
    names = {id(m.parameter): m.name for m in engine.folded_parameters}
    state = engine.module.state_dict(keep_vars=True)
    found = {alias: names[id(value)] for alias, value in state.items() if id(value) in names}
    return {alias: name for alias, name in found.items() if alias != name}


def _device(engine: CheckpointedEngine) -> torch.device:
    return next((m.parameter.device for m in engine.folded_parameters), torch.device("cpu"))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------- export


def state_dict(
    folder: str | os.PathLike[str], tag: str | None = None, *, master: bool = False
) -> dict[str, Tensor]:
    """Give the full weights and buffers under their names in the original model, tied ones too.

    Args:
        folder: directory the checkpoint was saved to.
        tag: which one; None: the latest.
        master: keep the precision that was trained instead of the one the model runs in.

    Returns:
        What the original model's `load_state_dict` takes, on the CPU.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    path = archive.find(Path(folder), tag)
    index = archive.read_index(path)
    files = [file for file in index.files if file.startswith("model/")]
    archive.verify(path, index, files)
    with Reader(path, index) as reader:
        full = {
            stored.name: reader.whole(key).to(_export_dtype(stored, master))
            for key, stored in index.tensors.items()
            if stored.folder == "model"
        }
    return full | {alias: full[name] for alias, name in index.aliases.items()}


def _export_dtype(stored: Stored, master: bool) -> torch.dtype:
    name = stored.dtype if master or stored.runs_as is None else stored.runs_as
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def export(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tag: str | None = None,
    *,
    master: bool = False,
    shard_bytes: int = EXPORT_SHARD_BYTES,
) -> Path:
    """Write a checkpoint's weights as Hugging Face does: safetensors and, where split, an index.

    Args:
        folder: directory the checkpoint was saved to.
        target: directory to make; must not exist.
        tag: which one; None: the latest.
        master: keep the precision that was trained instead of the one the model runs in.
        shard_bytes: size at which a new file begins.

    Raises:
        CheckpointError: the checkpoint is not whole, or the target exists.
    """
    made = Path(target)
    if made.exists():
        raise CheckpointError("exists already", made, "a new directory", "something")
    full = state_dict(folder, tag, master=master)
    partial = made.with_name(f".{made.name}.partial-{uuid.uuid4().hex[:12]}")
    partial.mkdir(parents=True)
    try:
        _write_plain(partial, list(_split(full, shard_bytes)))
        os.replace(partial, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    archive.sync(made.parent)
    return made


def _split(full: Mapping[str, Tensor], limit: int) -> Iterable[dict[str, Tensor]]:
    """Fill files up to the limit; tied weights get memory of their own."""
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in full.items():
        if current and size + tensor.nbytes > limit:
            yield current
            current, size = {}, 0
        current[name] = tensor.clone()
        size += tensor.nbytes
    yield current


def _write_plain(folder: Path, parts: Sequence[Mapping[str, Tensor]]) -> None:
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        numbered = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file = numbered if len(parts) > 1 else "model.safetensors"
        save_file(dict(part), folder / file, metadata={"format": "pt"})
        archive.sync(folder / file)
        places |= dict.fromkeys(part, file)
    if len(parts) > 1:
        total = sum(tensor.nbytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        archive.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    archive.sync(folder)
