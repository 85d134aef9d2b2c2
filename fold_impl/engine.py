"""`initialize()` and the native engine: plain torch, any dtype, the exact twin of the big one.

Owns the order of a training step: accumulate, reduce once, norm, clip, update. Must not know how a
layer is folded. Easy to get wrong: nothing is reduced before the last micro-batch of a step.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore

from fold_impl import states
from fold_impl.balance import CorrectionBias, broadcast_biases, check_rate
from fold_impl.checkpoint import CheckpointError, Checkpointing, OptimizerState
from fold_impl.checks import check
from fold_impl.config import ConfigError, FoldConfig
from fold_impl.convert import fold
from fold_impl.families import FoldedParameter, rule_of
from fold_impl.groups import FoldGroups, NewGroup, build_groups
from fold_impl.moe import FoldedMoE
from fold_impl.optimizers import make_optimizer
from fold_impl.points import Points
from fold_impl.presets import Preset, find_preset
from fold_impl.reduce import clip_coefficient, global_norm, reduce_gradients
from fold_impl.router import AuxiliaryOptions


class NativeEngine(Checkpointing):
    """Trains a folded module in the manner of a DeepSpeed engine.

    Per micro-batch: `loss = engine(...)`, `engine.backward(loss)`, `engine.step()`; parameters
    change at every `gradient_accumulation_steps`-th call of step.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[FoldedParameter],
        groups: FoldGroups,
        config: FoldConfig,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        points: Points,
    ) -> None:
        self.module, self.folded_parameters, self.groups = module, parameters, groups
        self.config, self.optimizer, self.lr_scheduler = config, optimizer, lr_scheduler
        self.points = points
        self.micro_steps = self.global_steps = 0
        self._norm: float | None = None
        self._reduced = False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._trained = [
            p for p in parameters if p.parameter.requires_grad and id(p.parameter) in held
        ]
        rate = config.correction_bias_rate
        self._correction = CorrectionBias(self.moe_layers(), groups, rate, points)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.module(*args, **kwargs)

    def gradient_accumulation_steps(self) -> int:
        """Give the micro-batches of one step."""
        return self.config.gradient_accumulation_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        """Tell whether the current micro-batch is the last of its step."""
        gas = self.gradient_accumulation_steps()
        last = (self.micro_steps + 1) % gas == 0
        ends: bool = self.points("step.boundary", last, micro_batch=self.micro_steps % gas, gas=gas)
        return ends

    def get_global_grad_norm(self) -> float | None:
        """Give the norm of the last step's whole gradient before clipping; None before a step."""
        return self._norm

    def moe_layers(self) -> list[FoldedMoE]:
        """List the folded MoE layers in forward order."""
        return [module for module in self.module.modules() if isinstance(module, FoldedMoE)]

    def auxiliary_loss(self) -> Tensor | float:
        """Give the routers' auxiliary losses of the last forward, to be added to the loss."""
        return sum(layer.auxiliary for layer in self.moe_layers())

    def train(self, mode: bool = True) -> NativeEngine:
        """Switch the module between training and evaluation."""
        self.module.train(mode)
        return self

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of loss / gas to what the step has accumulated.

        Several losses of one micro-batch may come one after another.

        Raises:
            RuntimeError: the step's gradients are reduced already.
        """
        if self._reduced:
            raise RuntimeError("backward() after allreduce_gradients(): call step() first")
        gas = self.gradient_accumulation_steps()
        micro_batch = self.micro_steps % gas
        self.points("batch.loss", loss / gas, micro_batch=micro_batch, gas=gas).backward()
        for member in self.folded_parameters:
            member.parameter.grad = self.points(
                "step.accumulate",
                member.parameter.grad,
                name=member.name,
                micro_batch=micro_batch,
                gas=gas,
            )

    def broadcast_weights(self) -> None:
        """Give every rank the weights and biases of the first rank that holds the same parts.

        Who must call: every rank of the stage.
        """
        kinds: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        for member in self.folded_parameters:
            axis = rule_of(member.placement, partial=member.partial).axis()
            weight = member.parameter.detach()
            kinds.setdefault((axis, weight.dtype), []).append(weight)
        for (axis, _), weights in kinds.items():
            getattr(self.groups, axis).broadcast(weights)
        broadcast_biases(self.moe_layers(), self.groups)

    def allreduce_gradients(self) -> None:
        """Reduce the accumulated gradients; `step` does so where it has not been done."""
        if not self._reduced:
            trained, size = self._trained, self.config.bucket_numel
            reduce_gradients(trained, self.groups, self.points, size)
            self._reduced = True

    def step(self) -> None:
        """End a micro-batch; at the boundary reduce, clip and update.

        Collective at the boundary: every rank of the stage.
        """
        gas = self.gradient_accumulation_steps()
        ends = self.is_gradient_accumulation_boundary()
        if self.points("reduce.due", ends, micro_batch=self.micro_steps % gas, gas=gas):
            self.allreduce_gradients()
        if ends:
            self.points("step.reduced", self.folded_parameters)
            self._norm = global_norm(self._trained, self.groups, self.points)
            actions: dict[str, Callable[[], object]] = {
                "clip": self._clip,
                "update": self._update,
            }
            for action in self.points("step.order", ("clip", "update")):
                actions[action]()
            self._forget_gradients()
            self._correction.update()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self.global_steps += 1
        self._reduced = False
        self.micro_steps += 1

    def _forget_gradients(self) -> None:
        """Drop all gradients, those of parameters the optimizer does not train too."""
        for member in self.folded_parameters:
            member.parameter.grad = None

    def _clip(self) -> None:
        assert self._norm is not None
        limit = self.config.gradient_clipping
        coefficient = self.points(
            "clip.coefficient", clip_coefficient(self._norm, limit), norm=self._norm, limit=limit
        )
        if coefficient != 1.0:
            gradients = [p.parameter.grad for p in self._trained]
            torch._foreach_mul_([g for g in gradients if g is not None], coefficient)

    def _update(self) -> None:
        for member in self._trained:
            member.parameter.grad = self.points(
                "step.gradient", member.parameter.grad, name=member.name, family=member.family
            )
        self.points("step.optimizer", self.optimizer).step()

    @property
    def master_dtype(self) -> None:
        """Every parameter is trained at its own precision."""

    def master_weights(self) -> dict[str, Tensor]:
        """Give this rank's part of every parameter."""
        return {member.name: member.parameter.detach() for member in self.folded_parameters}

    @torch.no_grad()
    def load_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's part of every parameter."""
        for member in self.folded_parameters:
            member.parameter.copy_(weights[member.name])

    def optimizer_state(self) -> OptimizerState:
        """Give the optimizer's state by parameter name."""
        return states.optimizer_state(self.optimizer, self.folded_parameters)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace the optimizer's state."""
        states.load_optimizer_state(self.optimizer, self.folded_parameters, state)

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Take any state: each parameter has its own."""

    def training_state(self) -> dict[str, Any]:
        """Give the step, optimizer options and schedule.

        Raises:
            CheckpointError: between two micro-batches of a step, whose gradients are not saved.
        """
        gas = self.gradient_accumulation_steps()
        if done := self.micro_steps % gas:
            found = f"after micro-batch {done} of {gas}"
            raise CheckpointError("not at", "engine", "the end of a step", found)
        return {"global_steps": self.global_steps, **self._trainer_state()}

    @property
    def _grouping(self) -> states.Grouping:
        return states.Grouping.whole(self.optimizer, self.folded_parameters)

    def _trainer_state(self) -> dict[str, Any]:
        return states.trainer_state(self.optimizer, self.lr_scheduler, self._grouping)

    def check_training_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another optimizer, other parameter groups or another schedule."""
        states.check_trainer_state(self._trainer_state(), state)

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Set the step, options and schedule, and drop what a step has accumulated."""
        self.global_steps = state["global_steps"]
        # whole steps: the saved run may have accumulated another number of micro-batches
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        states.load_trainer_state(self.optimizer, self.lr_scheduler, self._grouping, state)
        self._forget_gradients()
        self._correction.forget()
        self._norm, self._reduced = None, False


def initialize(
    model: nn.Module,
    config: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    lr_scheduler: Any = None,
) -> tuple[Any, torch.optim.Optimizer, None, Any]:
    """Fold a model over the ranks of the job and wrap it in an engine.

    Args:
        model: full model; changed in place. Ranks that hold the same part of a weight, or of a
            router's correction bias, begin with that of the first of them, however drawn.
        config: DeepSpeed-style config; folding is the coexistence of its sections
            `tensor_parallel` and `expert_parallel`.
        optimizer: optimizer over the model's parameters without state, or None to make the one
            of the config.
        model_parameters: parameters or parameter groups to train; default: all.
        lr_scheduler: stepped once per optimizer step; or a callable that makes it of the optimizer.

    Returns:
        (engine, optimizer, None, lr_scheduler), as `deepspeed.initialize` does.

    Raises:
        ConfigError: anything that cannot be run as asked, on every rank alike, before a process
            group exists.
    """
    parsed = FoldConfig.from_dict(config, world_size=_world_size())
    _check(model, parsed, optimizer, lr_scheduler)
    _join_world(parsed)
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine = build_engine(
        model, parsed, rank, optimizer, model_parameters, lr_scheduler=lr_scheduler
    )
    if isinstance(engine, NativeEngine):  # DeepSpeed's does so itself
        engine.broadcast_weights()
    return engine, engine.optimizer, None, engine.lr_scheduler


def build_engine(
    model: nn.Module,
    config: FoldConfig,
    rank: int,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    *,
    lr_scheduler: Any = None,
    new_group: NewGroup = dist.new_group,
    points: Points | None = None,
) -> Any:
    """Fold and wrap with everything passed in: rank, process groups, points.

    Returns:
        `NativeEngine`, or `fold_impl.zero.ZeroEngine` where the config asks for DeepSpeed's.
    """
    points = points or Points()
    preset = _check(model, config, optimizer, lr_scheduler)
    zero = _zero(config)
    before = dict(model.named_parameters())
    groups = build_groups(config.layout, rank, new_group, points)
    auxiliary = AuxiliaryOptions(config.load_balance_coef, config.z_loss_coef, config.aux_scope)
    parameters = fold(model, preset, groups, auxiliary, points)
    new = {id(before[member.name]): member.parameter for member in parameters}
    if optimizer is not None:
        _adopt(optimizer, new)
    else:
        trainable = [p.parameter for p in parameters if p.parameter.requires_grad]
        chosen = _renewed(model_parameters, new) or trainable
        assert config.optimizer is not None, "checked before"
        optimizer = make_optimizer(config.optimizer, chosen)
    if zero is not None:
        return zero.build_zero_engine(
            model, parameters, groups, config, optimizer, lr_scheduler, new_group, points
        )
    if callable(lr_scheduler) and not hasattr(lr_scheduler, "step"):
        lr_scheduler = lr_scheduler(optimizer)
    return NativeEngine(model, parameters, groups, config, optimizer, lr_scheduler, points)


def _check(model: nn.Module, config: FoldConfig, optimizer: Any, lr_scheduler: Any) -> Preset:
    """Make every refusal, before a process group exists or the model is touched."""
    preset = find_preset(config.preset_model, config.preset)
    check(model, preset, config.layout)
    check_rate(model, preset, config.correction_bias_rate)
    if optimizer is None and config.optimizer is None:
        raise ConfigError("missing", "optimizer", None, "a section, or an optimizer object")
    if getattr(optimizer, "state", None):
        kind = type(optimizer).__name__
        raise ConfigError("has state of the full model", "optimizer", kind, "a new optimizer")
    if (zero := _zero(config)) is not None:
        zero.check(model, config, optimizer, lr_scheduler)
    return preset


def _zero(config: FoldConfig) -> Any:
    """Import what drives DeepSpeed's engine, which takes seconds, only where it is asked for."""
    return importlib.import_module("fold_impl.zero") if config.engine == "deepspeed" else None


def _adopt(optimizer: torch.optim.Optimizer, new: Mapping[int, nn.Parameter]) -> None:
    """Point an optimizer made for the full model at this rank's parts."""
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]


def _renewed(parameters: Iterable[Any] | None, new: Mapping[int, nn.Parameter]) -> list[Any] | None:
    if parameters is None:
        return None

    def part(entry: Any) -> Any:
        """Give this rank's part of a parameter, a (name, parameter) pair or a group of them."""
        if isinstance(entry, dict):
            return {**entry, "params": [part(p) for p in entry["params"]]}
        if isinstance(entry, tuple):
            entry = entry[1]
        return new.get(id(entry), entry)

    return [part(entry) for entry in parameters]


def _join_world(config: FoldConfig) -> None:
    """Make the default process group where the launcher's program has not; one rank needs none.

    DeepSpeed's engine needs one even then, and the launcher's LOCAL_RANK.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_initialized():
        return
    if config.layout.world_size > 1:
        dist.init_process_group(backend)
    elif config.engine == "deepspeed":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
