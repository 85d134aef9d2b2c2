"""What fold_impl offers to a parity harness: build, step, read back, replay, taps, fault points.

Owns the translation between an engine and the harness's structural protocol. Must not import the
harness. Easy to get wrong: gradients are read after reduction and before clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fold_impl import checkpoint
from fold_impl.config import FoldConfig
from fold_impl.engine import NativeEngine, build_engine
from fold_impl.families import FoldedParameter, Placement
from fold_impl.moe import FoldedMoE
from fold_impl.points import POINTS, Points, Transform


class FoldImplementation:
    """One folded (or, with all sizes 1, plain) training engine under test."""

    name = "fold_impl"
    fault_points: Mapping[str, str] = POINTS

    def __init__(self) -> None:
        self._points = Points()
        self._engine: Any  # NativeEngine, or ZeroEngine, whose import takes seconds
        self._gradients: Mapping[str, Tensor | None] = {}
        self._routing: list[list[Tensor | None]] = []
        self._replay: Sequence[Sequence[Tensor]] | None = None
        self._taps: dict[str, list[Tensor]] = {}

    def build(self, model: nn.Module, config: Mapping[str, Any], context: Any) -> None:
        """Fold the model over the ranks of the context."""
        parsed = FoldConfig.from_dict(dict(config), world_size=context.layout.world)
        self._points.plant("step.reduced", self._keep_gradients)
        self._engine = build_engine(
            model, parsed, context.rank, new_group=context.new_group, points=self._points
        )

    def step(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[float]:
        """Accumulate the micro-batches and update once."""
        engine, losses = self._engine, []
        gas = engine.gradient_accumulation_steps()
        assert len(micro_batches) == gas, (
            f"a step has {gas} micro-batches, not {len(micro_batches)}"
        )
        self._routing = []
        for index, batch in enumerate(micro_batches):
            self._force(index)
            loss = engine(**self._points("batch.inputs", batch, micro_batch=index))
            engine.backward(loss)
            losses.append(float(loss.detach()))
            self._routing.append([layer.indices_TK for layer in self._layers()])
            if not self._is_native and engine.is_gradient_accumulation_boundary():
                self._gradients = engine.local_gradients()
            engine.step()
        return losses

    def _force(self, micro_batch: int) -> None:
        for index, layer in enumerate(self._layers()):
            layer.forced_TK = None if self._replay is None else self._replay[micro_batch][index]

    @property
    def _is_native(self) -> bool:
        return isinstance(self._engine, NativeEngine)

    def _layers(self) -> list[FoldedMoE]:
        return [m for m in self._engine.module.modules() if isinstance(m, FoldedMoE)]

    def _keep_gradients(self, parameters: Sequence[FoldedParameter], **_: Any) -> Any:
        """Read what the native engine's own step has reduced, before it clips."""
        self._gradients = {
            p.name: None if p.parameter.grad is None else p.parameter.grad.clone()
            for p in parameters
        }
        return parameters

    def placements(self) -> dict[str, Placement]:
        """Family and cuts of every parameter."""
        return {p.name: p.placement for p in self._engine.folded_parameters}

    def parameters(self) -> dict[str, Tensor]:
        """This rank's part of every parameter: master copies where there are any."""
        return dict(self._engine.master_weights())

    def gradients(self) -> Mapping[str, Tensor | None]:
        """This rank's part of every gradient of the last step, reduced, not clipped."""
        return self._gradients

    def grad_norm(self) -> float:
        """The engine's global norm of the last step."""
        norm: float | None = self._engine.get_global_grad_norm()
        assert norm is not None, "grad_norm() is asked for after a step"
        return norm

    def routing(self) -> list[list[Tensor | None]]:
        """[micro-batch][layer] -> (T, K) experts chosen in the last step."""
        return self._routing

    def close(self) -> None:
        """Release what an engine holds beside its tensors."""
        if not self._is_native:
            self._engine.close()

    def replay(self, routing: Sequence[Sequence[Tensor]] | None) -> None:
        """Force the experts of the next steps: [micro-batch][layer] -> (T, K); None: own choice."""
        self._replay = routing

    def save(self, path: str) -> None:
        """Write everything the run needs to go on."""
        self._engine.save_checkpoint(path)

    def load(self, path: str) -> tuple[str, ...]:
        """Go on from what `save` wrote, also at another layout; say what is not exact then."""
        return checkpoint.load(self._engine, path, reshard=True).notes

    def optimizer_state(self) -> Mapping[str, Mapping[str, Any]]:
        """This rank's part of the optimizer's state: parameter -> entry -> tensor or number."""
        state: Mapping[str, Mapping[str, Any]] = self._engine.optimizer_state()
        return state

    def plant(self, point: str, transform: Transform) -> None:
        """Transform the value that passes a named point, in forward, reduction or step."""
        self._points.plant(point, transform)

    def taps(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Start to record tensors at named points; the result fills as steps run."""
        for name in names:
            record = self._taps.setdefault(name, [])
            self._points.plant(name, _recorder(record))
        return self._taps


def _recorder(record: list[Tensor]) -> Transform:
    def watch(value: Any, **_: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # a rule, a function or a number passes here
        record.append(value.detach().clone())
        return value

    return watch
