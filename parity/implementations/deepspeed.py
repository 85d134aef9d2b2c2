"""The expert and tensor parallelism inside the installed DeepSpeed, folded, as one under test.

Owns the translation between DeepSpeed's engine on a Hugging Face model and `parity.implementation`:
config, names, cuts, what is read where. Must not know verdicts. Easy to get wrong: gradients can be
read only between the last backward and the step, by calls that every rank makes in one order.

Without folding (tp = ep = 1) neither `tensor_parallel` nor `expert_parallel` is handed down: plain
ZeRO on the model as transformers made it. Folded, DeepSpeed replaces each MoE block: it renames
the gate to `mlp.router.gate` and splits `gate_up_proj` into `w1` and `w3`; both are undone here.

Options of a case are DeepSpeed's own config keys (`engine.options.zero_optimization.*`,
`engine.options.data_types.grad_accum_dtype`, ...), but for one table read here:

    [engine.options.adapter]
    partition = "sharded"   # attention and dense MLP cut over tp by a partition_config;
                            # "preset": by AutoTP's own preset of the model; "skip": nothing is cut
    reduction = "managed"   # DeepSpeed counts micro-batches; "coalesce": one
                            # coalesce_grad_reduction() a step; "no_sync": all but the last under
                            # no_sync(); "boundary": set_gradient_accumulation_boundary() by hand
    qk_norm = true          # the partition_config asks for q_norm and k_norm to be summed over tp
    shim = true             # work around the crash of AutoEP's presets with transformers 5.23

A step's refusal by DeepSpeed is a `Refusal` with its own words: ValueError, NotImplementedError or
a worded assertion while the engine is built or a mode entered. Anything later is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parity.hugging_face import HuggingFace
from parity.implementation import Batch, Family, Placement, RankContext, Refusal, Shard
from parity.implementations import deepspeed_state as state
from parity.implementations.refusals import refusals_of
from parity.layout import Layout

PARTITIONS = ("sharded", "preset", "skip")
REDUCTIONS = ("managed", "coalesce", "no_sync", "boundary")
_PREFIX = "model."
"""What the harness's wrapper puts before the names inside the Hugging Face model."""
_COLUMN = (r".*\.self_attn\.[qkv]_proj\.weight$", r".*\.mlp\.(gate|up)_proj\.weight$")
_ROW = (r".*\.self_attn\.o_proj\.weight$", r".*\.mlp\.down_proj\.weight$")
_QK_NORM = (r".*\.self_attn\.[qk]_norm\.weight$",)
_OURS = ("folding", "adapter", "tensor_parallel", "expert_parallel")
_FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"\.mlp\.gate\.weight$", "router"),
    (r"\.mlp\.experts\.", "expert"),
    (r"\.shared_experts?", "shared_expert"),
    (r"norm", "layernorm"),
    (r"embed", "embedding"),
    (r"\.self_attn\.", "attention"),
)


@dataclass(frozen=True)
class Switches:
    """The table `engine.options.adapter`, see the module's docstring."""

    partition: str = "sharded"
    reduction: str = "managed"
    qk_norm: bool = True
    shim: bool = True

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Switches:
        """Check and take over the table.

        Raises:
            ValueError: an unknown key or value.
        """
        unknown = set(table) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"engine.options.adapter: unknown {min(unknown)!r}; allowed: {known}")
        made = cls(**table)
        for key, value, allowed in (
            ("partition", made.partition, PARTITIONS),
            ("reduction", made.reduction, REDUCTIONS),
        ):
            if value not in allowed:
                text = f"engine.options.adapter.{key} = {value!r}; allowed: {', '.join(allowed)}"
                raise ValueError(text)
        return made


# ---------------------------------------------------------------- config


def engine_config(
    config: Mapping[str, Any], layout: Layout, model_type: str, gas: int, switches: Switches
) -> dict[str, Any]:
    """Write the config DeepSpeed gets.

    Whatever its releases have different defaults for, and what its CPU build lacks, is set unless
    the case says otherwise: no overlap, float32 on the wire, torch's Adam, no grouped product.

    Args:
        config: of the harness, the options of the case merged in.
        layout: sizes.
        model_type: name transformers and DeepSpeed's presets have for the model.
        gas: micro-batches of a step.
        switches: of the adapter.
    """
    made: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000,
        **{key: value for key, value in config.items() if key not in _OURS},
    }
    zero = {"stage": 0, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True}
    made["zero_optimization"] = {**zero, **config.get("zero_optimization", {})}
    made["optimizer"] = _optimizer(config["optimizer"])
    counts = switches.reduction in ("managed", "boundary")
    made["gradient_accumulation_steps"] = gas if counts else 1
    if layout.tp > 1:
        made["tensor_parallel"] = {**_partition(model_type, switches), **config["tensor_parallel"]}
    if layout.tp > 1 or layout.ep * layout.etp > 1:
        experts = {"use_grouped_mm": False, "preset_model": model_type}
        made["expert_parallel"] = {**experts, **config["expert_parallel"]}
    return made


def _optimizer(spec: Mapping[str, Any]) -> dict[str, Any]:
    fused = {"torch_adam": True} if spec["type"] in ("Adam", "AdamW") else {}
    return {"type": spec["type"], "params": {**spec["params"], **fused}}


def _partition(model_type: str, switches: Switches) -> dict[str, Any]:
    """Say which weights AutoTP cuts.

    Qwen3's norms inside a head see only this lane's heads: replicated, yet their gradients are
    partial sums. DeepSpeed averages over tp unless `grad_allreduce` is said of them.
    """
    if switches.partition == "preset":
        return {"preset_model": model_type}
    if switches.partition == "skip":
        specs: list[dict[str, Any]] = [{"patterns": [".*"], "partition_type": "skip"}]
    else:
        specs = [
            {"patterns": list(_ROW), "partition_type": "row"},
            {"patterns": list(_COLUMN), "partition_type": "column"},
        ]
        if switches.qk_norm:
            asked = {"partition_type": "skip", "grad_allreduce": True}
            specs.append({"patterns": list(_QK_NORM), **asked})
    return {"partition_config": {"use_default_specs": False, "layer_specs": specs}}


# ---------------------------------------------------------------- names and cuts


def logical_name(name: str) -> str:
    """Give the name a parameter of DeepSpeed's model has in the harness's.

    `w1` and `w3` are halves of one; both give its name.
    """
    name = name.replace(".mlp.router.gate.", ".mlp.gate.")
    name = re.sub(r"\.experts\.w[13]$", ".experts.gate_up_proj", name)
    name = re.sub(r"\.experts\.w2$", ".experts.down_proj", name)
    return _PREFIX + name


def family_of(name: str) -> Family:
    """Give the family of a logical name."""
    return next((family for pattern, family in _FAMILIES if re.search(pattern, name)), "dense")


def joined(parts: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Rename, and put the halves of each `gate_up_proj` (E, F, H) on top of one another."""
    made: dict[str, Tensor | None] = {}
    for name, tensor in parts.items():
        if name.endswith(".experts.w3"):
            continue
        if name.endswith(".experts.w1"):
            other = parts[name[:-1] + "3"]
            tensor = None if tensor is None or other is None else torch.cat([tensor, other], dim=1)
        made[logical_name(name)] = tensor
    return made


def placement_of(name: str, local: Sequence[int], full: Sequence[int], layout: Layout) -> Placement:
    """Read the cut of a parameter off its shapes.

    Raises:
        AssertionError: the shapes do not fit any even cut over ep or tp.
    """
    family = family_of(name)
    cut = [dim for dim, (a, b) in enumerate(zip(local, full, strict=True)) if a != b]
    if not cut:
        whole_experts = family == "expert" and layout.ep > 1
        assert not whole_experts, f"{name}: every rank holds all experts, ep = {layout.ep}"
        return Placement(family)
    axis: Literal["ep", "tp"] = "ep" if family == "expert" else "tp"
    size = layout.ep if axis == "ep" else layout.tp
    text = f"{name}: a piece of {tuple(local)} out of {tuple(full)} is no cut over {axis} = {size}"
    (dim, *others) = cut
    assert not others, text
    assert local[dim] * size == full[dim], text
    return Placement(family, (Shard(axis, dim),))


# ---------------------------------------------------------------- the implementation


class DeepSpeedImplementation:
    """DeepSpeed's engine on a model of transformers, folded or not."""

    name = "deepspeed"

    def __init__(self) -> None:
        self._wrapper: HuggingFace
        self._engine: Any
        self._switches = Switches()
        self._gas = 1
        self._placements: dict[str, Placement] = {}
        self._masters: list[tuple[str, Tensor]] | None = None
        self._gradients: dict[str, Tensor | None] = {}
        self._routing: list[list[Tensor]] = []
        self._hooks: list[Any] = []

    # building

    def build(self, model: nn.Module, config: Mapping[str, Any], context: RankContext) -> None:
        """Hand the Hugging Face model inside the wrapper to `deepspeed.initialize`.

        Raises:
            Refusal: DeepSpeed refuses the options, or has no folding; or the model is not one of
                transformers.
        """
        if not isinstance(model, HuggingFace):
            raise Refusal("DeepSpeed's AutoEP is judged on models of transformers only")
        if importlib.util.find_spec("deepspeed.module_inject.auto_ep_folding") is None:
            raise Refusal(f"DeepSpeed {state.installed()} has no folding")
        if config.get("sequence_parallel_size", 1) > 1:
            raise Refusal("models of transformers are fed whole sequences: no Ulysses "
                          "(engine.sequence_parallel_size)")  # fmt: skip
        self._switches = Switches.read(config.get("adapter", {}))
        state.enter(context)
        self._gas = int(config["gradient_accumulation_steps"])
        self._wrapper, layout = model, context.layout
        made = engine_config(config, layout, model.spec.name, self._gas, self._switches)
        full = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._engine = self._initialized(model.model, made)
        model.model = self._engine
        self._placements = self._read_placements(full, layout)
        if layout.tp > 1 and self._switches.partition != "skip":
            cut = [n for n, p in self._placements.items() if p.family == "attention" and p.shards]
            assert cut, "no attention weight is cut over tp: a folded case must have some"
        self._masters = self._find_masters()
        self._watch_gates()

    def _initialized(self, model: nn.Module, config: dict[str, Any]) -> Any:
        import deepspeed

        with contextlib.ExitStack() as stack:
            if self._switches.shim:
                stack.callback(state.let_presets_read_transformers())
            stack.enter_context(_refusals(ValueError, NotImplementedError, AssertionError))
            # a generator: of a list the releases before 0.19.7 optimize the parameters that AutoEP
            # has replaced, and at ZeRO 0 say nothing
            return deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=config
            )[0]

    def _read_placements(
        self, full: Mapping[str, tuple[int, ...]], layout: Layout
    ) -> dict[str, Placement]:
        local = joined({name: torch.empty(_shape(p)) for name, p in self._named()})
        missing = full.keys() ^ local.keys()
        assert not missing, f"names without a partner after initialize: {sorted(missing)[:4]}"
        return {
            name: placement_of(name, tensor.shape, full[name], layout)
            for name, tensor in local.items()
            if tensor is not None
        }

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._engine.module.named_parameters()

    def _find_masters(self) -> list[tuple[str, Tensor]] | None:
        """Pair names with float32 masters where no public call gives them: 16 bit, ZeRO 0."""
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "fp32_groups") or not hasattr(optimizer, "fp16_groups"):
            return None
        names = {id(parameter): name for name, parameter in self._named()}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        if not all(id(p) in names for low, _ in pairs for p in low):
            return None
        return [
            (names[id(p)], master)
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for p, master in zip(low, high, strict=True)
        ]

    def _watch_gates(self) -> None:
        for index, name in enumerate(_gate_names(self._wrapper)):
            block = self._engine.module.get_submodule(name)
            gate = block.router if hasattr(block, "router") else block.gate

            def watch(
                _module: nn.Module, _inputs: Any, answer: Sequence[Tensor], at: int = index
            ) -> None:
                self._routing[-1][at] = _indices(answer)

            self._hooks.append(gate.register_forward_hook(watch))

    # stepping

    def step(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Run every micro-batch, read the reduced gradients, step.

        Where DeepSpeed does not count the micro-batches the division by gas is ours.
        """
        engine, reduction = self._engine, self._switches.reduction
        losses: list[float] = []
        self._routing = []
        with self._whole_step():
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                self._routing.append([torch.empty(0)] * len(self._hooks))
                if reduction == "boundary":
                    engine.set_gradient_accumulation_boundary(last)
                with self._one_backward(last):
                    loss = self._wrapper(**batch)
                    counted = reduction in ("managed", "boundary")
                    engine.backward(loss if counted else loss / self._gas)
                losses.append(float(loss.detach()))
                if not last and reduction == "managed":
                    engine.step()
        self._gradients = self._read_gradients()
        engine.step()
        return losses

    def _whole_step(self) -> AbstractContextManager[Any]:
        if self._switches.reduction != "coalesce":
            return nullcontext()
        if not hasattr(self._engine, "coalesce_grad_reduction"):
            raise Refusal(f"DeepSpeed {state.installed()} has no coalesce_grad_reduction()")
        return _Entered(self._engine.coalesce_grad_reduction())

    def _one_backward(self, last: bool) -> AbstractContextManager[Any]:
        if self._switches.reduction != "no_sync" or last:
            return nullcontext()
        return _Entered(self._engine.no_sync())

    # reading

    def placements(self) -> Mapping[str, Placement]:
        """Family and cut of every parameter, read off the shapes after initialize."""
        return self._placements

    def parameters(self) -> Mapping[str, Tensor]:
        """This rank's piece of every parameter: float32 masters where DeepSpeed keeps some.

        Collective: gathers what ZeRO has divided.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        if self._masters is not None:
            found: dict[str, Tensor | None] = dict(self._masters)
            ordered = {name: found[name] for name, _ in self._named()}
            return _present(joined(ordered))
        read: dict[str, Tensor | None] = {}
        for name, parameter in self._named():
            divided = hasattr(parameter, "ds_id")  # ZeRO 3 leaves an empty tensor behind
            wide = parameter.dtype is torch.float32 and not divided
            full = None if wide else safe_get_full_fp32_param(parameter)
            read[name] = parameter.detach() if full is None else full.detach()
        return _present(joined(read))

    def _read_gradients(self) -> dict[str, Tensor | None]:
        """Gather this rank's piece of every reduced gradient, without the loss scale.

        Collective: between the last backward and the step.
        """
        from deepspeed.runtime.base_optimizer import ZeROOptimizer
        from deepspeed.utils import safe_get_full_grad

        optimizer = self._engine.optimizer
        scaled = isinstance(optimizer, ZeROOptimizer) and hasattr(optimizer, "loss_scale")
        scale = float(optimizer.loss_scale) if scaled else 1.0
        read: dict[str, Tensor | None] = {}
        for name, parameter in self._named():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                gradient = gradient.detach().float().reshape(_shape(parameter)) / scale
            read[name] = gradient
        return joined(read)

    def gradients(self) -> Mapping[str, Tensor | None]:
        """This rank's piece of every gradient of the last step, reduced, not clipped."""
        return self._gradients

    def grad_norm(self) -> float | None:
        """DeepSpeed's own global norm; None where it has none (ZeRO 0 in float32)."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def routing(self) -> list[list[Tensor]]:
        """[micro-batch][layer] -> (T, K) experts that the gates chose in the last step."""
        return self._routing

    def close(self) -> None:
        """Remove hooks and let the engine release what it holds in DeepSpeed's modules."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()


def _present(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Give the shape before ZeRO 3 divided the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gate_names(wrapper: HuggingFace) -> list[str]:
    from parity.hugging_face import moe_names

    return [name.removeprefix(_PREFIX) for name in moe_names(wrapper.spec)]


def _indices(answer: Sequence[Tensor]) -> Tensor:
    """Find the (T, K) choice in a gate's answer: the two-dimensional integer tensor."""
    found = [t for t in answer if isinstance(t, Tensor) and t.dtype is torch.int64 and t.dim() == 2]
    assert len(found) == 1, f"{len(found)} integer tensors in the answer of a gate"
    return found[0].detach().clone()


# ---------------------------------------------------------------- refusals

_refusals = functools.partial(refusals_of, ("deepspeed", "pydantic"))
"""DeepSpeed's own words, and pydantic's about its config."""


class _Entered(AbstractContextManager[Any]):
    """A mode of the engine; DeepSpeed's assertion on entering it is a refusal, later ones not."""

    def __init__(self, mode: AbstractContextManager[Any]) -> None:
        self._mode = mode

    def __enter__(self) -> Any:
        with _refusals(NotImplementedError, AssertionError):
            return self._mode.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._mode.__exit__(*error)
