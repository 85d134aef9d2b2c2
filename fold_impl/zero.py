"""DeepSpeed's own engine under a folded model: ZeRO 0, 1 and 2, mixed precision, from outside.

Owns what of DeepSpeed's engine is replaced because it is wrong for folded layouts (docs/findings),
and what a checkpoint holds of it. Must not know modules' forward. Easy to get wrong: DeepSpeed has
one table of groups for a process, so an engine puts its own in before each backward and step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch import distributed as dist

from fold_impl import states
from fold_impl.balance import CorrectionBias, broadcast_biases
from fold_impl.checkpoint import CheckpointError, Checkpointing, OptimizerState
from fold_impl.config import ConfigError, FoldConfig, Unsupported
from fold_impl.families import FoldedParameter
from fold_impl.groups import FoldGroups, NewGroup
from fold_impl.moe import FoldedMoE
from fold_impl.optimizers import Lion
from fold_impl.partitions import Partition, Partitions, check_rounded
from fold_impl.points import Points
from fold_impl.reduce import clip_coefficient, global_norm
from fold_impl.states import Grouping
from fold_impl.zero_optimizers import (
    StageZeroOptimizer,
    StepwiseScaleOptimizer,
    model_groups,
    paired,
)
from fold_impl.zero_plan import Plan, make_plan, split_groups

ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Lion)
"""Optimizers that may see a flat piece of several parameters: they treat each entry alone."""

SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scale remembers; ZeRO-0's has no hysteresis."""


# ---------------------------------------------------------------- what is refused


def check(
    model: nn.Module, config: FoldConfig, optimizer: torch.optim.Optimizer | None, schedule: Any
) -> None:
    """Refuse objects that DeepSpeed's engine cannot take here, before any group exists.

    Raises:
        Unsupported: an optimizer that does not work on flat pieces, or a model of another dtype.
        ConfigError: a schedule bound to parameter groups that are about to be split.
    """
    if optimizer is not None and type(optimizer) not in ELEMENTWISE:
        allowed = [kind.__name__ for kind in ELEMENTWISE]
        problem = "not known to work on flat pieces of several parameters"
        raise Unsupported(problem, "optimizer", type(optimizer).__name__, allowed)
    if schedule is not None and not callable(schedule):
        allowed_text = "a callable (optimizer) -> schedule, or the config's scheduler section"
        problem = "bound to parameter groups that DeepSpeed needs split by family"
        raise ConfigError(problem, "lr_scheduler", type(schedule).__name__, allowed_text)
    if config.dtype is None:
        other = {p.dtype for p in model.parameters()} - {torch.float32}
        if other:
            problem = "DeepSpeed without bf16 or fp16 runs in float32 (native runs in any dtype)"
            raise Unsupported(problem, "model's dtype", min(map(str, other)), ["torch.float32"])


# ---------------------------------------------------------------- the engine


def build_zero_engine(
    model: nn.Module,
    parameters: Sequence[FoldedParameter],
    groups: FoldGroups,
    config: FoldConfig,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    new_group: NewGroup,
    points: Points,
) -> ZeroEngine:
    """Start DeepSpeed's engine on an already folded model.

    Collective: every rank of the world, with the same arguments but its own parts.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # it asks for oneDNN's float16 (AVX-512 FP16), where torch's own kernels run on any CPU
        accelerator.is_fp16_supported = lambda: True
    if not comm.is_initialized():
        if dist.get_backend() == "gloo":
            # ranks race for compiling an operator that Gloo does without, and the losers fail
            known = getattr(deepspeed.ops, "__compatible_ops__", {})
            vars(deepspeed.ops)["__compatible_ops__"] = {**known, "deepspeed_shm_comm": False}
        comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    plan = make_plan(parameters, groups, new_group, points)
    for member in plan.members:
        if member.kind.name is not None:
            member.folded.parameter.allreduce = False  # type: ignore[attr-defined]
            member.folded.parameter.group_name = member.kind.name  # type: ignore[attr-defined]
    grouping = split_groups(optimizer, plan.members)
    plan.register()
    return ZeroEngine(model, plan, config, optimizer, grouping, schedule, points)


class ZeroEngine(Checkpointing, DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine on a folded model; the training loop is DeepSpeed's.

    Per micro-batch: `loss = engine(...)`, `engine.backward(loss)`, `engine.step()`.
    """

    _global_grad_norm: float | None

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        config: FoldConfig,
        optimizer: torch.optim.Optimizer,
        grouping: Grouping,
        schedule: Any,
        points: Points,
    ) -> None:
        """Start DeepSpeed's engine and put the owed factors on the leaves.

        Args:
            model: folded.
            plan: groups and factors; registered.
            config: whole config.
            optimizer: over the folded parameters, its groups split by kind.
            grouping: of the optimizer.
            schedule: callable (optimizer) -> schedule, or None.
            points: of the engine; those in the forward, `reduce.rule` and of checkpoints act here.
        """
        self.plan, self.fold_config, self.points = plan, config, points
        self.groups = plan.groups
        self.folded_parameters = [member.folded for member in plan.members]
        self._grouping = grouping
        self._window: contextlib.ExitStack | None = None
        self._accumulating = False
        passed = {**config.for_deepspeed(), "zero_allow_untested_optimizer": True}
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            mpu=plan.unit,
            config=passed,
            config_class=DeepSpeedConfig(passed, plan.unit),
        )
        held = {id(p) for group in model_groups(self.optimizer) for p in group}
        self._trained = [m.folded for m in plan.members if id(m.folded.parameter) in held]
        self._partitions = self._read_partitions()
        masters = self._copies()
        self._stepped = [
            replace(p, parameter=cast(nn.Parameter, masters.get(id(p.parameter), p.parameter)))
            for p in self.folded_parameters
        ]
        rate = config.correction_bias_rate
        self._correction = CorrectionBias(self.moe_layer_modules(), self.groups, rate, points)
        self._hooks = [
            member.folded.parameter.register_hook(_times(member.factor))
            for member in plan.members
            if member.factor != 1.0 and member.folded.parameter.requires_grad
        ]

    # ------------------------------------------------------------ what DeepSpeed is told

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # DeepSpeed looks for its own MoE layer; ours makes it reduce by family all the same
        self.has_moe_layers = any(kind.name is not None for kind in self.plan.kinds())

    def _broadcast_model(self) -> None:
        """Give every rank the weights and biases of the first rank that holds the same parts.

        In few messages, where DeepSpeed sends parameter by parameter. Who must call: all ranks.
        """
        for kind in self.plan.kinds():
            members = [m for m in self.plan.members if m.kind.name == kind.name]
            kind.replicas.broadcast([m.folded.parameter.detach() for m in members])
        broadcast_biases(self.moe_layer_modules(), self.groups)

    def _configure_fp16_optimizer(self, optimizer: Any, low_precision_dtype: torch.dtype) -> Any:
        scales = LossScaleConfig(
            low_precision_dtype=low_precision_dtype,
            dynamic_loss_scale=self.dynamic_loss_scale(),
            static_loss_scale=self.loss_scale(),
            dynamic_loss_args=self.dynamic_loss_scale_args(),
            profile=LossScaleProfile.UNFUSED,
        )
        made = StageZeroOptimizer(
            optimizer,
            deepspeed=self,
            loss_scale_config=scales,
            low_precision_dtype=low_precision_dtype,
            mpu=self.mpu,
            clip_grad=self.gradient_clipping(),
        )
        made.global_norm_of = self._norm_of_masters
        return made

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        made = super()._configure_zero_optimizer(optimizer)
        if type(made) is DeepSpeedZeroOptimizer:
            made.__class__ = StepwiseScaleOptimizer  # made by name inside, and without own state
        return made

    # ------------------------------------------------------------ one step

    def moe_layer_modules(self) -> list[FoldedMoE]:
        """List the folded MoE layers in forward order (`moe_layers` is DeepSpeed's own list)."""
        return [module for module in self.module.modules() if isinstance(module, FoldedMoE)]

    def auxiliary_loss(self) -> Tensor | float:
        """Give the routers' auxiliary losses of the last forward, to be added to the loss."""
        return sum(layer.auxiliary for layer in self.moe_layer_modules())

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """Add the gradient of loss / gas to what the step has accumulated.

        Gradients are reduced where DeepSpeed does: in hooks (ZeRO-2, overlap_comm) or after the
        last micro-batch; with `folding.coalesce_grad_reduction` always only after the last.
        """
        self.plan.register()
        self._accumulating = True
        if self.fold_config.coalesce_grad_reduction and self._window is None:
            self._window = contextlib.ExitStack()
            self._window.enter_context(self.coalesce_grad_reduction())
        scale = self.optimizer.scale_missed_by_backward if self._is_stage_zero_low() else 1.0
        scaled = loss.float() * scale if scale != 1.0 else loss
        out = super().backward(scaled, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        if self._window is not None and self.is_gradient_accumulation_boundary():
            self._window.close()
            self._window = None
        return out / scale if scale != 1.0 else out

    def step(self, lr_kwargs: Any = None) -> None:
        """End a micro-batch; at the boundary clip by the true global norm and update.

        Collective at the boundary: every rank of the stage.
        """
        if self._window is not None:  # nothing is reduced yet: DeepSpeed would refuse
            self.micro_steps += 1
            return
        self.plan.register()
        super().step(lr_kwargs)

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self._is_plain():
            self._global_grad_norm = global_norm(self._trained, self.plan.groups, self.points)
        super()._take_model_step(lr_kwargs)
        self._accumulating = False
        if self.was_step_applied():
            self._correction.update()
        else:
            self._correction.forget()
        if self._partitions is not None:
            self._partitions.link()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm of the whole gradient, every distinct shard counted once."""
        assert self._global_grad_norm is not None
        coefficient = clip_coefficient(float(self._global_grad_norm), self.gradient_clipping())
        if coefficient != 1.0:
            gradients = [p.parameter.grad for p in self._trained]
            torch._foreach_mul_([g for g in gradients if g is not None], coefficient)

    def get_global_grad_norm(self) -> float | None:
        """Give the norm of the last step's whole gradient before clipping; None before a step."""
        return None if self._global_grad_norm is None else float(self._global_grad_norm)

    def _norm_of_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> float:
        """Compute the norm of the gradients held by float32 copies of the parameters."""
        copies = {id(parameter): master for parameter, master in masters}
        members = [
            replace(p, parameter=cast(nn.Parameter, copies[id(p.parameter)])) for p in self._trained
        ]
        return global_norm(members, self.plan.groups, self.points)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate without reducing, as in DeepSpeed.

        Raises:
            Unsupported: ZeRO-1 with overlap_comm, whose hooks reduce all the same.
        """
        if self.zero_optimization() and self.zero_overlap_comm():
            problem = "its hooks reduce inside no_sync, and again after it"
            raise Unsupported(problem, "zero_optimization.overlap_comm", True, [False])
        with super().no_sync():
            yield

    def deepspeed_io(self, *_: Any, **__: Any) -> Any:
        """Refuse DeepSpeed's loader.

        Raises:
            Unsupported: it would give the lanes of one dp rank different samples.
        """
        problem = "DeepSpeed's sampler would give lanes different samples"
        raise Unsupported(problem, "training_data", "a data set", "a loader sharded over dp only")

    def save_16bit_model(self, *_: Any, **__: Any) -> Any:
        """Refuse DeepSpeed's export.

        Raises:
            Unsupported: it would write the parts of rank 0 as if they were the model.
        """
        problem = "DeepSpeed would write the parts of one rank"
        allowed = "save_checkpoint, then fold_impl.checkpoint.export"
        raise Unsupported(problem, "save_16bit_model", "a call", allowed)

    def close(self) -> None:
        """Take every hook off the model and release DeepSpeed's buffers."""
        for hook in self._hooks:
            hook.remove()
        self.destroy()

    # ------------------------------------------------------------ reading

    def _is_plain(self) -> bool:
        """Tell whether a torch optimizer works on the parameters themselves (ZeRO-0, float32)."""
        return isinstance(self.optimizer, torch.optim.Optimizer)

    def _is_stage_zero_low(self) -> bool:
        return isinstance(self.optimizer, StageZeroOptimizer)

    def local_gradients(self) -> dict[str, Tensor | None]:
        """Give this rank's part of every gradient: reduced, unscaled, not yet clipped.

        To be called between the backward of the last micro-batch and `step`. Collective under
        ZeRO-1/2: one all-reduce per kind over the ranks that hold the same parts.
        """
        scale = float(self.optimizer.loss_scale) if self.fp16_enabled() else 1.0
        found: Mapping[str, Tensor | None]
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            assert self._partitions is not None
            found = self._partitions.gradients()
        elif isinstance(self.optimizer, BF16_Optimizer):
            found = self._by_name(paired(self.optimizer.fp32_groups_gradients, self.optimizer))
        else:
            found = {
                p.name: None if p.parameter.grad is None else _copied(p.parameter.grad)
                for p in self._trained
            }
        whole = {n: g if g is None or scale == 1.0 else g / scale for n, g in found.items()}
        return {p.name: whole.get(p.name) for p in self.folded_parameters}

    def _by_name(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> dict[str, Tensor]:
        held = {id(p): _copied(tensor.view_as(p)) for p, tensor in pairs}
        return {member.name: held[id(member.parameter)] for member in self._trained}

    # ------------------------------------------------------------ what a checkpoint holds

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """Torch's optimizer inside DeepSpeed's."""
        inner: torch.optim.Optimizer = (
            self.optimizer if self._is_plain() else self.optimizer.optimizer
        )
        return inner

    def _read_partitions(self) -> Partitions | None:
        """Find the pieces of ZeRO-1/2; None where every rank steps whole parameters."""
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            pieces = self.optimizer.single_partition_of_fp32_groups
        elif isinstance(self.optimizer, BF16_Optimizer):
            pieces = self.optimizer.fp32_groups_flat_partition
        else:
            return None
        members = {id(member.folded.parameter): member for member in self.plan.members}
        found = []
        for parameters, masters in zip(model_groups(self.optimizer), pieces, strict=True):
            group = [members[id(parameter)] for parameter in parameters]
            folded = [member.folded for member in group]
            found.append(Partition(folded, group[0].kind.replicas, masters))
        return Partitions(self.optimizer, found)

    def _copies(self) -> dict[int, Tensor]:
        """Give the float32 copies that are stepped in the place of parameters (ZeRO-0, 16 bit)."""
        if not self._is_stage_zero_low():
            return {}
        pairs = paired(self.optimizer.fp32_groups, self.optimizer)
        return {id(parameter): master for parameter, master in pairs}

    @property
    def master_dtype(self) -> torch.dtype:
        """float32, whatever the model runs in."""
        return torch.float32

    def master_weights(self) -> Mapping[str, Tensor]:
        """Give this rank's part of every parameter, float32: the master copy where there is one.

        Collective under ZeRO-1/2 in 16 bit, where all replicas ask in the same order.
        """
        gathers = self.fp16_enabled() or self.bfloat16_enabled()
        partitions = self._partitions if gathers else None
        divided = set() if partitions is None else partitions.names
        local = {
            p.name: p.parameter.detach().float() for p in self._stepped if p.name not in divided
        }
        if partitions is not None:
            return partitions.masters(local)
        for member in self.folded_parameters:
            check_rounded(member, local[member.name])
        return local

    @torch.no_grad()
    def load_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set this rank's part of every parameter and of its master copy."""
        for member in (*self.folded_parameters, *self._stepped):
            member.parameter.copy_(weights[member.name])
        if self._partitions is not None:
            self._partitions.load_masters(weights)

    def optimizer_state(self) -> OptimizerState:
        """Give the optimizer's state by parameter name.

        Collective under ZeRO-1/2, where all replicas ask in the same order.
        """
        if self._partitions is None:
            return states.optimizer_state(self._inner, self._stepped)
        divided = self._partitions.names
        return self._partitions.state(
            {p.name: {} for p in self.folded_parameters if p.name not in divided}
        )

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Refuse, under ZeRO-1/2, counters that differ between parameters stepped as one."""
        if self._partitions is not None:
            self._partitions.check_state(state)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace the optimizer's state."""
        if self._partitions is None:
            states.load_optimizer_state(self._inner, self._stepped, state)
        else:
            self._partitions.load_state(state)

    def training_state(self) -> dict[str, Any]:
        """Give counters, optimizer options, schedule and dynamic loss scale.

        Raises:
            CheckpointError: between two micro-batches of a step, whose gradients are not saved.
        """
        self._check_boundary()
        return {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "loss_scale": self._scale_state(),
            **self._trainer_state(),
        }

    def _check_boundary(self) -> None:
        if self._accumulating:
            found = "accumulated gradients"
            raise CheckpointError("not at", "engine", "the end of a step", found)

    def _trainer_state(self) -> dict[str, Any]:
        return states.trainer_state(self._inner, self.lr_scheduler, self._grouping)

    def _scaler(self) -> Any:
        """Give what holds a dynamic loss scale, None where there is none or it is fixed."""
        if self._is_stage_zero_low():
            scales = self.optimizer.loss_scale_config
            return scales if scales.dynamic_loss_scale else None
        dynamic = self.fp16_enabled() and self.dynamic_loss_scale()
        return self.optimizer.loss_scaler if dynamic else None

    def _scale_state(self) -> dict[str, Any] | None:
        scaler = self._scaler()
        if scaler is None:
            return None
        return {key: getattr(scaler, key) for key in SCALE_STATE if hasattr(scaler, key)}

    def check_training_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another optimizer, other parameter groups or another schedule.

        Raises:
            CheckpointError: also inside a step: DeepSpeed's buffers cannot be emptied there.
        """
        self._check_boundary()
        states.check_trainer_state(self._trainer_state(), state)

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Set counters, options, schedule and, where it is dynamic here too, the loss scale.

        The native engine counts steps only; what it does not know is what DeepSpeed would assume.
        """
        self.global_steps = state["global_steps"]
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        samples = self.global_steps * self.train_batch_size()
        self.global_samples = state.get("global_samples", samples)
        self.skipped_steps = state.get("skipped_steps", 0)
        scaler, saved = self._scaler(), state.get("loss_scale") or {}
        for key in saved if scaler is not None else ():
            if hasattr(scaler, key):
                setattr(scaler, key, saved[key])
        states.load_trainer_state(self._inner, self.lr_scheduler, self._grouping, state)
        self._correction.forget()
        self._global_grad_norm = None


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor
