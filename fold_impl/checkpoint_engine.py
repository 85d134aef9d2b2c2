"""What an engine offers to be saved and loaded, and how its ranks go on together or not at all.

Owns the contract between an engine and its checkpoints. Must not know files. Easy to get wrong: a
rank that fails alone must not leave the others waiting, so every stage ends in one exchange of
outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fold_impl.archive import CheckpointError
from fold_impl.families import FoldedParameter, Placement
from fold_impl.groups import FoldGroups
from fold_impl.points import Points
from fold_impl.states import StateValue

T = TypeVar("T")
S = TypeVar("S")
OptimizerState = Mapping[str, Mapping[str, StateValue]]
"""parameter name -> {entry: part shaped like this rank's of the parameter, 0-d tensor, number}."""


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

    @property
    def master_dtype(self) -> torch.dtype | None:
        """Precision that is trained; None: each parameter's own."""

    def master_weights(self) -> Mapping[str, Tensor]:
        """Give this rank's part of every parameter, at the precision that is trained.

        A lazy mapping may gather on access: every rank asks for every parameter once, in the order
        of `folded_parameters`.
        """

    def load_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's part of every parameter; the parts are on the CPU."""

    def optimizer_state(self) -> OptimizerState:
        """Give the optimizer's state; lazily, if so, as `master_weights` does."""

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Raise CheckpointError where `load_optimizer_state` could not take a state over."""

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
class Ranks:
    """The ranks of a stage, which go on together or fail together."""

    groups: FoldGroups

    @property
    def first(self) -> bool:
        """Tell whether this rank does what is done once."""
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


def placement_of(
    engine: CheckpointedEngine, member: FoldedParameter, state: str | None = None
) -> Placement:
    """Give the placement a weight, or an entry of its state, is saved and loaded by."""
    placed: Placement = engine.points(
        "checkpoint.placement",
        member.placement,
        name=member.name,
        family=member.family,
        state=state,
        layout=engine.groups.layout,
    )
    return placed


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Give the persistent buffers by name: a router's correction bias is one."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    }


def aliases_of(engine: CheckpointedEngine) -> dict[str, str]:
    """Give the further names of tied weights."""
    names = {id(m.parameter): m.name for m in engine.folded_parameters}
    state = engine.module.state_dict(keep_vars=True)
    found = {alias: names[id(value)] for alias, value in state.items() if id(value) in names}
    return {alias: name for alias, name in found.items() if alias != name}


def device_of(engine: CheckpointedEngine) -> torch.device:
    """Give the device the run's generator is on."""
    return next((m.parameter.device for m in engine.folded_parameters), torch.device("cpu"))
