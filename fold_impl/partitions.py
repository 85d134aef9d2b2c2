"""What ZeRO left of each parameter on this rank, read as whole parts and set from them.

Owns the pieces of masters, gradients and optimizer state. Must not know a step's order or files.
Easy to get wrong: DeepSpeed links optimizer state to parameters in the step of the first group,
when the others have none yet (docs/findings/0005), so pieces are found by their address here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl.archive import CheckpointError
from fold_impl.families import FoldedParameter
from fold_impl.groups import Group
from fold_impl.states import StateValue, on_device

V = TypeVar("V")
State = Mapping[str, Mapping[str, StateValue]]
GATHER_NUMEL = 1 << 26
"""Entries gathered at a time: 256 MiB, as the collectives of the native engine."""


@dataclass(frozen=True)
class Partition:
    """One optimizer group: its parameters one behind the other, cut evenly over their replicas."""

    members: Sequence[FoldedParameter]
    replicas: Group
    masters: Tensor
    """This rank's piece, flat float32; what the inner optimizer steps and keys its state by."""


@dataclass(frozen=True)
class _Batch:
    partition: Partition
    members: Sequence[FoldedParameter]


class _Gathering(Mapping[str, V], Generic[V]):
    """Parameter -> value, gathered when it is asked for, a batch at a time.

    Holds one batch of every partition. Who must call: all replicas, in the same order.
    """

    def __init__(
        self,
        batches: Sequence[_Batch],
        gather: Callable[[_Batch], dict[str, V]],
        local: Mapping[str, V],
    ) -> None:
        self._batches = {member.name: batch for batch in batches for member in batch.members}
        self._gather, self._local = gather, local
        self._held: dict[int, tuple[_Batch, dict[str, V]]] = {}

    def __getitem__(self, name: str) -> V:
        if name in self._local:
            return self._local[name]
        batch = self._batches[name]
        held = self._held.get(id(batch.partition))
        if held is None or held[0] is not batch:
            self._held[id(batch.partition)] = held = (batch, self._gather(batch))
        return held[1][name]

    def __iter__(self) -> Iterator[str]:
        yield from self._batches
        yield from self._local

    def __len__(self) -> int:
        return len(self._batches) + len(self._local)


class Partitions:
    """The pieces behind one of DeepSpeed's optimizers that divide states over ranks."""

    def __init__(
        self, optimizer: Any, partitions: Sequence[Partition], numel: int = GATHER_NUMEL
    ) -> None:
        """Read `optimizer`, a ZeRO-1/2 or BF16 optimizer, `numel` entries at a time."""
        self._optimizer, self._inner = optimizer, optimizer.optimizer
        self._partitions = partitions
        self._batches = [
            _Batch(partition, members)
            for partition in partitions
            for members in _batches(partition.members, numel)
        ]
        self._linked = False

    @property
    def names(self) -> set[str]:
        """Parameters that are divided; the others are not trained."""
        return {member.name for batch in self._batches for member in batch.members}

    # ------------------------------------------------------------ reading

    def gradients(self) -> dict[str, Tensor]:
        """Give reduced gradients between the last backward of a step and the step, float32."""

        def piece(member: FoldedParameter, at: Any) -> Tensor:
            found: Tensor = at.get_lp_grad_fragment(member.parameter._index_in_param_group)  # type: ignore[attr-defined]
            return found

        return dict(_Gathering(self._batches, lambda batch: _whole(batch, piece), {}))

    def masters(self, local: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the float32 weights; `local` are those of parameters that are not trained."""

        def gather(batch: _Batch) -> dict[str, Tensor]:
            found = _whole(batch, _piece_of(batch.partition.masters))
            for member in batch.members:
                check_rounded(member, found[member.name])
            return found

        return _Gathering(self._batches, gather, local)

    def state(self, local: State) -> State:
        """Give the optimizer's state; `local` is that of parameters that are not trained."""
        return _Gathering(self._batches, self._state_of, local)

    def _state_of(self, batch: _Batch) -> dict[str, Mapping[str, StateValue]]:
        masters = batch.partition.masters
        whole: dict[str, Mapping[str, StateValue]] = {}
        for key, value in self._inner.state.get(masters, {}).items():
            if isinstance(value, Tensor) and value.shape == masters.shape:
                whole[key] = _whole(batch, _piece_of(value))
            else:
                whole[key] = {member.name: value for member in batch.members}
        return {
            member.name: {key: found[member.name] for key, found in whole.items()}
            for member in batch.members
        }

    # ------------------------------------------------------------ setting

    @torch.no_grad()
    def load_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's pieces of the float32 weights; the model's own are not touched."""
        for partition in self._partitions:
            for member in partition.members:
                _fill(partition.masters, member, weights[member.name])

    def check_state(self, state: State) -> None:
        """Refuse a state whose counters differ between parameters that are stepped as one.

        Raises:
            CheckpointError: names the first parameter that differs from the first of its group.
        """
        for partition in self._partitions:
            first = _counters(state[partition.members[0].name])
            for member in partition.members[1:]:
                if (found := _counters(state[member.name])) != first:
                    problem = "state unlike that of the parameters ZeRO steps with it"
                    raise CheckpointError(problem, f"optimizer: {member.name}", first, found)

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Replace the optimizer's state; entries that pad a piece are zero, as DeepSpeed's are."""
        for partition, group in zip(self._partitions, self._inner.param_groups, strict=True):
            masters = partition.masters
            self._inner.state.pop(masters, None)
            entries = state[partition.members[0].name]
            if not entries:
                continue
            made: dict[str, StateValue] = {}
            self._inner.state[masters] = made
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    made[key] = flat = torch.zeros_like(masters, dtype=value.dtype)
                    for member in partition.members:
                        _fill(flat, member, cast(Tensor, state[member.name][key]))
                else:
                    made[key] = on_device(value, masters.device, group)
        self._linked = False
        self.link()

    def link(self) -> None:
        """Make `deepspeed.utils.safe_get_full_optimizer_state` see what is there, for every group.

        DeepSpeed does it once, in the step of the first group.
        """
        if not self._linked and all(self._inner.state.get(p.masters) for p in self._partitions):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()
            self._linked = True


def check_rounded(member: FoldedParameter, master: Tensor) -> None:
    """Assert that the model's weight is its master, rounded."""
    weight = member.parameter.detach()
    assert torch.equal(master.to(weight.dtype), weight), f"{member.name} is not its master, rounded"


def _batches(members: Sequence[FoldedParameter], limit: int) -> Iterator[Sequence[FoldedParameter]]:
    """Cut a group into runs of parameters of at most `limit` entries, or one parameter."""
    start = numel = 0
    for index, member in enumerate(members):
        if index > start and numel + member.parameter.numel() > limit:
            yield members[start:index]
            start, numel = index, 0
        numel += member.parameter.numel()
    yield members[start:]


def _address(member: FoldedParameter) -> Any:
    """Give DeepSpeed's record of where this rank's piece of a parameter lies; None: it has none."""
    return getattr(member.parameter, "_hp_mapping", None)


@torch.no_grad()
def _whole(batch: _Batch, piece: Callable[[FoldedParameter, Any], Tensor]) -> dict[str, Tensor]:
    """Rebuild whole parts out of the pieces on the ranks.

    Forward: all-reduce (sum) over the partition's replicas, of bits: every entry lies on exactly
    one of them, the others add integer 0, so that even -0.0 comes through. Who must call: all
    replicas.
    """
    masters, replicas = batch.partition.masters, batch.partition.replicas
    sizes = [member.parameter.numel() for member in batch.members]
    flat = torch.zeros(sum(sizes), device=masters.device, dtype=torch.float32)
    parts = flat.split(sizes)
    for member, part in zip(batch.members, parts, strict=True):
        if (at := _address(member)) is not None:
            here = at.lp_fragment_address
            part.narrow(0, here.start, here.numel).copy_(piece(member, at).flatten())
    if replicas.size > 1:
        dist.all_reduce(flat.view(torch.int32), group=replicas.handle)
    return {
        member.name: part.view_as(member.parameter)
        for member, part in zip(batch.members, parts, strict=True)
    }


def _own(flat: Tensor, at: Any) -> Tensor:
    """Give a parameter's entries in this rank's piece."""
    there = at.hp_fragment_address
    return flat.detach().narrow(0, there.start, there.numel)


def _piece_of(flat: Tensor) -> Callable[[FoldedParameter, Any], Tensor]:
    return lambda _, at: _own(flat, at)


def _fill(flat: Tensor, member: FoldedParameter, whole: Tensor) -> None:
    """Set a parameter's entries in this rank's piece from the whole part."""
    if (at := _address(member)) is not None:
        here = at.lp_fragment_address
        _own(flat, at).copy_(whole.flatten().narrow(0, here.start, here.numel))


def _counters(entries: Mapping[str, StateValue]) -> dict[str, object]:
    """Give what parameters of one flat piece must have in common: keys, and values not cut."""
    return {
        key: "tensor" if isinstance(value, Tensor) and value.ndim > 0 else _number(value)
        for key, value in entries.items()
    }


def _number(value: StateValue) -> object:
    return value.item() if isinstance(value, Tensor) else value
