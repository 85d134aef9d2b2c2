"""Checkpoints of a folded training run: what engines and their users call.

Owns the calls in DeepSpeed's manner. Must not know how a file is written or what an engine holds.
Easy to get wrong: DeepSpeed's own engine brings methods of these names that write its own format,
so `Checkpointing` stands first among the bases of a class.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from fold_impl.archive import CheckpointError
from fold_impl.checkpoint_engine import CheckpointedEngine, OptimizerState
from fold_impl.checkpoint_export import export, state_dict
from fold_impl.checkpoint_load import Loaded, load
from fold_impl.checkpoint_save import save

__all__ = [
    "CheckpointError",
    "CheckpointedEngine",
    "Checkpointing",
    "Loaded",
    "OptimizerState",
    "export",
    "load",
    "save",
    "state_dict",
]


class Checkpointing:
    """`save_checkpoint` and `load_checkpoint` of a `CheckpointedEngine`."""

    if TYPE_CHECKING:
        global_steps: int

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write a checkpoint as `save_dir/tag` and make it the latest, as DeepSpeed's engine does.

        Args:
            save_dir: directory of the run's checkpoints, shared by the ranks.
            tag: default `global_step<N>`.
            client_state: JSON of the caller's, given back by `load_checkpoint`.

        Who must call: every rank.

        Raises:
            CheckpointError: on every rank alike; earlier checkpoints are as they were.
        """
        tag = f"global_step{self.global_steps}" if tag is None else tag
        save(cast(CheckpointedEngine, self), save_dir, tag, client_state)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        reshard: bool = False,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Go on from a checkpoint; see `checkpoint.load`, which also gives its notes as values.

        Args:
            load_dir: directory it was saved to.
            tag: default: the latest.
            reshard: accept a checkpoint of another layout and cut it anew; warns, on rank 0,
                about what cannot be exact then.
            load_module_only: weights and buffers only.

        Returns:
            (path of the checkpoint, client state).

        Raises:
            CheckpointError: on every rank alike; the engine is as it was.
        """
        engine = cast(CheckpointedEngine, self)
        loaded = load(engine, load_dir, tag, reshard=reshard, module_only=load_module_only)
        for note in loaded.notes if engine.groups.rank == 0 else ():
            warnings.warn(note, stacklevel=2)
        return str(loaded.path), loaded.client_state
