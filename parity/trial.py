"""One run of one implementation inside one rank: build, step, hand the tensors back.

Owns the config an implementation is given and what is read from it after each step. Must not know
verdicts. Easy to get wrong: gradients and weights are copied at once, an engine reuses its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity import batches, models, protocol
from parity.case import Case
from parity.implementation import (
    OPTIONAL,
    Implementation,
    Placement,
    RankContext,
    Refusal,
    find,
)
from parity.layout import Layout
from parity.pieces import Pieces, as_array

FP16_LOSS_SCALE = 128.0
"""Fixed: a dynamic scale begins with steps that overflow and are skipped. A power of two is exact,
and gradients of about 1e-4 leave float16's subnormal range."""


@dataclass(frozen=True)
class Planted:
    """A fault to plant before the build: point and a transformation the rank can import."""

    point: str
    transform: str
    """module:attr of a callable (value, **options, **context) -> value; of a class, made once per
    rank and run with the options, where it is one that remembers."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run saves, or what it begins from."""

    folder: str
    after: int
    """Steps before the save."""
    loads: bool
    """Begin there, from other weights and another learning rate, instead of saving there."""


@dataclass(frozen=True)
class Order:
    """What every rank of a gang is told to run."""

    case: Case
    implementation: str
    layout: Layout
    seed: int
    lr: float
    clip: float
    """Largest allowed global norm; 0: off."""
    replay: Sequence[Sequence[Sequence[Sequence[Any]]]] | None = None
    """[step][dp rank][micro-batch][layer] -> (T, K) experts to force, or None."""
    planted: tuple[Planted, ...] = ()
    taps: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None


@dataclass
class StepResult:
    """What one rank read after one step; NumPy arrays."""

    losses: list[float]
    before: Pieces
    gradients: Pieces
    after: Pieces
    grad_norm: float | None
    routing: list[list[Any]]


@dataclass
class KeptResult:
    """What one rank held at the checkpoint."""

    parameters: Pieces
    state: Pieces
    """Optimizer state by `name|key`."""
    notes: tuple[str, ...]


@dataclass
class RankResult:
    """What one rank hands back."""

    placements: dict[str, Placement]
    steps: list[StepResult]
    absent: tuple[str, ...]
    """Optional members the implementation does not offer."""
    taps: dict[str, list[Any]]
    weight_dtype: str
    """Of the weights an optimizer step changes: float32 master copies beside a 16-bit model."""
    kept: KeptResult | None = None


def run(runtime: Any, order: Order) -> RankResult:
    """Run the trial in this rank; `runtime` is `parity.rank.RankRuntime`.

    Raises:
        ProtocolError: the implementation gave what no comparison can be made of.
    """
    case, layout = order.case, order.layout
    dtype = getattr(torch, case.engine.dtype)
    context = RankContext(runtime.rank, layout, runtime.device, runtime.backend, runtime.new_group)
    implementation = find(order.implementation)()
    for fault in order.planted:
        _plant(implementation, fault)
    loads = order.checkpoint is not None and order.checkpoint.loads
    model = models.build_for(case, order.seed + loads)
    full = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    implementation.build(model.to(device=runtime.device, dtype=dtype), config(order), context)
    record = implementation.taps(order.taps) if order.taps else {}  # type: ignore[attr-defined]
    steps, kept = _steps(implementation, order, context)
    placements = protocol.placements(implementation.placements())
    for step in steps:
        answers = {"parameters()": (step.before, step.after), "gradients()": (step.gradients,)}
        for member, pieces in ((m, p) for m, found in answers.items() for p in found):
            protocol.check_shapes(member, pieces.shapes, placements, full, layout)
    weights = {tensor.dtype for tensor in implementation.parameters().values()}
    result = RankResult(
        placements=placements,
        steps=steps,
        absent=tuple(name for name in OPTIONAL if not hasattr(implementation, name)),
        taps={name: [as_array(t.clone()) for t in tensors] for name, tensors in record.items()},
        weight_dtype=str(min(weights, key=lambda kind: kind.itemsize)).removeprefix("torch."),
        kept=kept,
    )
    if hasattr(implementation, "close"):
        implementation.close()
    return result


def _steps(
    implementation: Implementation, order: Order, context: RankContext
) -> tuple[list[StepResult], KeptResult | None]:
    """Run all steps, saving on the way; or load and run those that are left.

    At another layout a routing to be replayed is of other tokens: there only the load is run.
    """
    point, last = order.checkpoint, order.case.steps
    offered = all(hasattr(implementation, name) for name in ("save", "load"))
    if point is None or not offered:
        return [_step(implementation, order, step, context) for step in range(1, last + 1)], None
    first = point.after + 1 if point.loads else 1
    if point.loads and order.replay is not None and order.layout != order.case.layout:
        last = point.after
    kept = None
    if point.loads:
        notes = implementation.load(point.folder)  # type: ignore[attr-defined]
        kept = _kept(implementation, notes)
    steps = []
    for step in range(first, last + 1):
        steps.append(_step(implementation, order, step, context))
        if step == point.after:
            implementation.save(point.folder)  # type: ignore[attr-defined]
            kept = _kept(implementation, None)
    return steps, kept


def _kept(implementation: Implementation, notes: Sequence[str] | None) -> KeptResult:
    """Copy weights and, where it is shown, optimizer state."""
    show = getattr(implementation, "optimizer_state", dict)
    state = {
        f"{name}|{key}": torch.as_tensor(value)
        for name, entries in show().items()
        for key, value in entries.items()
        if value is not None
    }
    return KeptResult(_parameters(implementation), Pieces.copied(state), tuple(notes or ()))


def _plant(implementation: Implementation, fault: Planted) -> None:
    import importlib

    module, _, attribute = fault.transform.partition(":")
    transform = getattr(importlib.import_module(module), attribute)
    if isinstance(transform, type):
        implementation.plant(fault.point, transform(**fault.options))  # type: ignore[attr-defined]
        return

    def bound(value: Any, **context: Any) -> Any:
        return transform(value, **fault.options, **context)

    implementation.plant(fault.point, bound)  # type: ignore[attr-defined]


def _step(
    implementation: Implementation, order: Order, step: int, context: RankContext
) -> StepResult:
    case, at = order.case, order.layout.coordinate(context.rank)
    dtype = getattr(torch, case.engine.dtype)
    drawn = batches.make(case, order.layout.dp, step, order.seed)[at.dp]
    folded = order.layout.tp == case.shape.tp
    fed = [
        _on(batch.for_lane(at.tp) if folded else batch.for_mean(dtype), context.device)
        for batch in drawn
    ]
    if order.replay is not None:
        if not hasattr(implementation, "replay"):
            raise Refusal("the implementation cannot replay a routing, which low precision needs")
        forced = [
            [torch.as_tensor(t, device=context.device) for t in layers]
            for layers in order.replay[step - 1][at.dp]
        ]
        implementation.replay(forced)
    before = _parameters(implementation)
    losses = protocol.losses(implementation.step(fed), len(fed))
    routing = protocol.routing(implementation.routing())
    return StepResult(
        losses=losses,
        before=before,
        gradients=Pieces.copied(protocol.tensors("gradients()", _gradients(implementation))),
        after=_parameters(implementation),
        grad_norm=protocol.norm(getattr(implementation, "grad_norm", _no_norm)()),
        routing=[[as_array(t.clone()) for t in layers] for layers in routing],
    )


def _parameters(implementation: Implementation) -> Pieces:
    return Pieces.copied(protocol.tensors("parameters()", implementation.parameters()))


def _gradients(implementation: Implementation) -> Mapping[str, Tensor | None]:
    if not hasattr(implementation, "gradients"):
        return {name: tensor.grad for name, tensor in implementation.parameters().items()}
    found: Mapping[str, Tensor | None] = implementation.gradients()
    return found


def _no_norm() -> None:
    """Stand for the norm of an engine that has none."""


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def config(order: Order) -> dict[str, Any]:
    """Write the DeepSpeed-style config of a run."""
    case, layout, engine = order.case, order.layout, order.case.engine
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.data.sequences,
        "gradient_accumulation_steps": engine.gas,
        "gradient_clipping": order.clip,
        "optimizer": _optimizer(order),
        "tensor_parallel": {"autotp_size": layout.tp},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        },
        "folding": {
            "engine": engine.name,
            "strategy": engine.strategy,
            "load_balance_coef": case.auxiliary.load_balance,
            "z_loss_coef": case.auxiliary.z_loss,
            "aux_scope": case.auxiliary.scope,
        },
    }
    if case.model.name == "tiny":
        written["folding"]["preset"] = models.preset(case.model)
    else:
        written["expert_parallel"]["preset_model"] = case.model.name
    if engine.sequence_parallel_size > 1:
        written["sequence_parallel_size"] = engine.sequence_parallel_size
    if engine.zero is not None:
        written["zero_optimization"] = {"stage": engine.zero}
    if engine.name == "deepspeed" and engine.dtype == "bfloat16":
        written["bf16"] = {"enabled": True}
    if engine.name == "deepspeed" and engine.dtype == "float16":
        written["fp16"] = {"enabled": True, "loss_scale": FP16_LOSS_SCALE}
    for key, value in engine.options.items():
        both = isinstance(value, dict) and key in written
        written[key] = {**written[key], **value} if both else value
    return written


def _optimizer(order: Order) -> dict[str, Any]:
    spec = order.case.optimizer
    loads = order.checkpoint is not None and order.checkpoint.loads
    lr = 2 * order.lr if loads else order.lr  # the saved one must come back
    options: dict[str, Any] = {"lr": lr, "weight_decay": spec.weight_decay}
    if spec.name == "momentum":
        options["momentum"] = spec.momentum
    if spec.name in ("adam", "adamw", "lion"):
        options["betas"] = list(spec.betas)
    if spec.name in ("adam", "adamw"):
        options["eps"] = spec.eps
        options["adam_w_mode"] = spec.name == "adamw"
    kinds = {"sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "lion": "Lion"}
    return {"type": kinds[spec.name], "params": options}
