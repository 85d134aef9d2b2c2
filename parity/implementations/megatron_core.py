"""Megatron-Core's folding - TP x DP for dense weights, EP x ETP x EDP for experts - as one judged.

Owns the translation between Megatron's modules and `parity.implementation`: config, names, cuts,
what is read where. Must not know verdicts. Easy to get wrong: `main_grad` holds the objective's
gradient only between `finalize_model_grads` and the optimizer's step.

The tiny model of `parity.models` is built anew as a `GPTModel` of Megatron's local spec, without
Transformer Engine, and given the same weights. Megatron's own are: embedding, attention, dense and
shared MLP, head and cross entropy (all cut over tp), router with its auxiliary losses, dispatcher,
`SequentialMLP` experts, the schedule without pipelining, `DistributedDataParallel`,
`finalize_model_grads`, and the optimizer with its norm and clipping. Ours are:

- the LayerNorm: torch's, its weight marked `sequence_parallel` as Megatron marks its fused norms.
  Megatron's own for want of Apex (`WrappedTorchNorm`) refuses sequence parallelism, without which
  its MoE refuses to train under tp;
- what a training script does: sequences are padded to a multiple of tp, padding is masked out of
  the loss and, by `padding_mask`, out of the auxiliary losses; the loss of a micro-batch is the sum
  of its token losses times `loss_scale`;
- the shim of `parity.implementations.megatron_state`.

A block of the tiny model (attention, dense MLP, MoE) makes two of Megatron's layers, the second of
which has no attention, as in its hybrid models. Megatron divides the load f of its load-balance
loss by top_k as well: its coefficient is top_k times the case's.

Options of a case, checked by Megatron itself:

    [engine.options.megatron.transformer]   # fields of TransformerConfig
    moe_token_dispatcher_type = "alltoall"  # or "allgather", for equally many tokens on every rank
    sequence_parallel = true                # left out: wherever tp > 1

    [engine.options.megatron.ddp]           # fields of DistributedDataParallelConfig
    overlap_grad_reduce = true
    use_distributed_optimizer = true

bfloat16 is trained as its scripts do: `Float16Module`, gradients added up in float32, float32
masters. The routing is then replayed, by Megatron's own `RouterReplay`.

With `calculate_per_token_loss` the schedule, not `loss_scale`, divides by the number of tokens: one
objective, as long as `data.step_scale` is 1.

What Megatron refuses while it is built or in the first forward (MoE under tp without sequence
parallelism) is a `Refusal` with its own words. Anything later is an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from parity import case as cases
from parity.implementation import Batch, Placement, RankContext, Refusal
from parity.implementations import megatron_state as state
from parity.implementations.megatron_names import Entry, entries, piece_of
from parity.implementations.refusals import refusals_of
from parity.layout import Layout
from parity.models import Tiny

_OWN_TABLES = ("transformer", "ddp")


class Norm(nn.LayerNorm):
    """LayerNorm without bias whose gradient `finalize_model_grads` sums over sequence shards."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


# ---------------------------------------------------------------- configs


def transformer_fields(
    spec: cases.Model, config: Mapping[str, Any], layout: Layout, dtype: torch.dtype
) -> dict[str, Any]:
    """Write the fields of TransformerConfig.

    Raises:
        Refusal: Megatron has no such router or parameters.
    """
    if spec.biases:
        raise Refusal("with add_bias_linear Megatron gives its experts biases, too")
    if spec.score == "sigmoid" and spec.normalize != (spec.top_k > 1):
        raise Refusal("Megatron divides sigmoid scores by their sum if top_k > 1, and only then")
    folding = config["folding"]
    kind = "aux_loss" if folding["aux_scope"] == "rank" else "global_aux_loss"
    return {
        "num_layers": 2 * spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "ffn_hidden_size": spec.mlp_width,
        "num_moe_experts": spec.experts,
        "moe_ffn_hidden_size": spec.expert_width,
        "moe_shared_expert_intermediate_size": spec.shared_width or None,
        "moe_router_topk": spec.top_k,
        "moe_router_score_function": spec.score,
        "moe_router_pre_softmax": spec.score == "softmax" and not spec.normalize,
        "moe_router_load_balancing_type": kind if folding["load_balance_coef"] else "none",
        "moe_aux_loss_coeff": folding["load_balance_coef"] * spec.top_k,
        "moe_z_loss_coeff": folding["z_loss_coef"] or None,
        "moe_token_dispatcher_type": "alltoall",
        "tensor_model_parallel_size": layout.tp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "moe_enable_routing_replay": dtype is torch.bfloat16,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        **dict.fromkeys(_CUDA_FUSIONS, False),
        **config.get("megatron", {}).get("transformer", {}),
    }


_CUDA_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
)


def optimizer_fields(config: Mapping[str, Any], distributed: bool) -> dict[str, Any]:
    """Write the fields of OptimizerConfig.

    Raises:
        Refusal: Megatron has no such optimizer.
    """
    kind, options = config["optimizer"]["type"], config["optimizer"]["params"]
    if kind not in ("SGD", "Adam", "AdamW"):
        raise Refusal(f"Megatron has no optimizer {kind}")
    betas = options.get("betas", (0.9, 0.999))
    return {
        "optimizer": "sgd" if kind == "SGD" else "adam",
        "lr": options["lr"],
        "weight_decay": options["weight_decay"],
        "decoupled_weight_decay": kind == "AdamW",
        "sgd_momentum": options.get("momentum", 0.0),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_eps": options.get("eps", 1e-8),
        "clip_grad": config["gradient_clipping"],
        "use_distributed_optimizer": distributed,
    }


# ---------------------------------------------------------------- the implementation


_refusals = functools.partial(refusals_of, ("megatron",))


class MegatronCoreImplementation:
    """The installed Megatron-Core on the tiny model, folded or, with all sizes 1, plain."""

    name = "megatron_core"

    def __init__(self) -> None:
        self._gpt: Any
        self._ddp: Any
        self._optimizer: Any
        self._context: RankContext
        self._spec: cases.Model
        self._dtype: torch.dtype
        self._entries: dict[str, Entry] = {}
        self._gradients: dict[str, Tensor | None] = {}
        self._norm: float | None = None
        self._routing: list[list[Tensor]] = []
        self._replay: Sequence[Sequence[Tensor]] | None = None

    # building

    def build(self, model: nn.Module, config: Mapping[str, Any], context: RankContext) -> None:
        """Make Megatron's model, give it the weights, wrap it and make its optimizer.

        Raises:
            Refusal: Megatron refuses the options or is not installed; or the model is not the tiny
                one, or not on a CPU.
        """
        if state.installed() is None:
            raise Refusal("megatron-core is not installed: pip install 'foldparity[megatron]'")
        if not isinstance(model, Tiny):
            raise Refusal("Megatron-Core is judged on the tiny model only")
        if context.device.type != "cpu":
            raise Refusal("Megatron-Core is judged on CPU ranks only")
        if config.get("sequence_parallel_size", 1) > 1:
            raise Refusal("Megatron-Core has no Ulysses (engine.sequence_parallel_size)")
        options = config.get("megatron", {})
        unknown = set(options) - set(_OWN_TABLES)
        if unknown:
            known = ", ".join(_OWN_TABLES)
            raise ValueError(f"engine.options.megatron: unknown {min(unknown)!r}; allowed: {known}")
        if options.get("ddp", {}).get("overlap_param_gather"):
            key = "engine.options.megatron.ddp.overlap_param_gather"
            raise ValueError(f"{key}: weights are read before the forward that gathers them")
        self._context, self._spec = context, model.spec
        self._dtype = model.embedding.weight.dtype
        asked = transformer_fields(model.spec, config, context.layout, self._dtype)
        with self._running():
            state.enter(context)
            with _refusals(ValueError, NotImplementedError, AssertionError):
                self._make_model(asked)
            self._write(dict(model.named_parameters()))
            with _refusals(ValueError, NotImplementedError, AssertionError):
                self._wrap(options.get("ddp", {}), config)
            self._watch_routers()

    def _make_model(self, asked: dict[str, Any]) -> None:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer import TransformerConfig

        self._gpt = GPTModel(
            config=TransformerConfig(**asked),
            transformer_layer_spec=_layer_specs(self._spec),
            vocab_size=self._spec.vocab,
            max_sequence_length=1,  # of learned positions, which there are none of
            position_embedding_type="none",
            share_embeddings_and_output_weights=self._spec.tied,
        ).to(self._dtype)

    def _write(self, full: Mapping[str, Tensor]) -> None:
        """Give the model its pieces of the weights, before masters are copied from them."""
        self._entries = entries(self._gpt, self._spec)
        assert full.keys() == self._entries.keys(), full.keys() ^ self._entries.keys()
        layout, rank = self._context.layout, self._context.rank
        for name, entry in self._entries.items():
            entry.write(piece_of(full[name].detach(), entry.placement, layout, rank))

    def _wrap(self, ddp: dict[str, Any], config: Mapping[str, Any]) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        transformer = self._gpt.config
        low = transformer.bf16
        self._ddp = DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(**{"grad_reduce_in_fp32": low, **ddp}),
            Float16Module(transformer, self._gpt) if low else self._gpt,
        )
        made = optimizer_fields(config, self._ddp.ddp_config.use_distributed_optimizer)
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(**made, params_dtype=self._dtype, bf16=low),
            [self._ddp],
            config_overrides={},  # weight decay on every weight, as the harness's optimizers do
            use_gloo_process_groups=False,
        )
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = self._optimizer.scale_loss
        if self._ddp.ddp_config.overlap_grad_reduce:
            transformer.no_sync_func = self._ddp.no_sync

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return state.running(self._dtype)

    def _watch_routers(self) -> None:
        for index in range(self._spec.layers):

            def watch(
                _module: nn.Module, _inputs: Any, answer: tuple[Tensor, Tensor], at: int = index
            ) -> None:
                probs, chosen = answer
                order = probs.detach().masked_fill(~chosen, -1.0).sort(descending=True, stable=True)
                self._routing[-1][at] = order.indices[:, : self._spec.top_k]
                if self._replay is not None:  # near ties are in another order in 16 bit
                    asked = self._gpt.decoder.layers[2 * at + 1].mlp.router.router_replay
                    assert chosen.gather(1, asked.target_topk_idx).all(), "the replay was ignored"
                    self._routing[-1][at] = asked.target_topk_idx

            self._gpt.decoder.layers[2 * index + 1].mlp.router.register_forward_hook(watch)

    # stepping

    def step(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Run the schedule, which ends in `finalize_model_grads`; read the gradients; step."""
        from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

        self._routing = []
        with self._running():
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            losses: list[float] = forward_backward_no_pipelining(
                forward_step_func=self._forward,
                data_iterator=iter(micro_batches),
                model=[self._ddp],
                num_microbatches=len(micro_batches),
                seq_length=1,  # for pipelines
                micro_batch_size=1,
                forward_only=False,
            )
            self._gather_gradients()
            self._gradients = {
                name: entry.read(lambda p: p.main_grad) for name, entry in self._entries.items()
            }
            _, self._norm, _ = self._optimizer.step()
        return losses

    def _forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
        from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

        batch = next(batches)
        ids, labels = batch["input_ids"], batch["labels"]
        if batch["probe"] is not None:
            raise Refusal("Megatron's model has no consumer that varies from lane to lane")
        length = ids.shape[1]
        extra = -length % self._context.layout.tp
        ids, labels = F.pad(ids, (0, extra)), F.pad(labels, (0, extra))
        future = torch.ones(length + extra, length + extra, dtype=torch.bool).triu(1)
        padding = torch.arange(length + extra).expand_as(ids) >= length
        self._routing.append([torch.empty(0)] * self._spec.layers)
        clear_aux_losses_tracker()
        if self._replay is not None:
            self._force(self._replay[len(self._routing) - 1], ids.shape)
        with _refusals(ValueError) if self._norm is None else contextlib.nullcontext():
            token_losses = model(
                input_ids=ids,
                position_ids=None,
                attention_mask=future[None, None],
                labels=labels,
                padding_mask=padding if extra else None,
            )
        self._routing[-1] = [self._whole(chosen, ids.shape, length) for chosen in self._routing[-1]]
        auxiliary = self._auxiliary()

        def loss_of(token_losses: Tensor) -> tuple[Any, ...]:
            total = token_losses[:, :length].sum()
            report = float(total.detach()) * batch["loss_scale"] + auxiliary
            if self._gpt.config.calculate_per_token_loss:
                return total, torch.tensor(labels[:, :length].numel(), dtype=torch.int), report
            return total * batch["loss_scale"], report

        return token_losses, loss_of

    def _whole(self, chosen: Tensor, shape: Sequence[int], length: int) -> Tensor:
        """Put the lanes' (own S * B, K) choices together as (B * S, K), without padding.

        all-gather over tp; no gradient; every lane calls it.
        """
        lanes = _gathered(chosen, self._gpt.pg_collection.tp)
        grid = torch.cat(lanes).view(shape[1], shape[0], -1)
        return grid[:length].transpose(0, 1).flatten(0, 1)

    def _force(self, layers: Sequence[Tensor], shape: Sequence[int]) -> None:
        """Set the experts of this lane's tokens, the inverse of `_whole`; padding has the first."""
        from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

        at = self._context.layout.coordinate(self._context.rank)
        targets = []
        for indices in layers:
            grid = torch.arange(indices.shape[1]).repeat(shape[1], shape[0], 1)
            given = indices.view(shape[0], -1, indices.shape[1]).transpose(0, 1)
            grid[: len(given)] = given
            targets.append(grid.chunk(self._context.layout.tp)[at.tp].flatten(0, 1))
        RouterReplay.set_replay_data(targets)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def _auxiliary(self) -> float:
        """Add up the auxiliary losses that Megatron has logged of this micro-batch.

        It logs each lane's share without its coefficient: of the load balance a summand, of the
        z-loss one that is to be averaged. all-reduce over the group of the loss; every rank calls.
        """
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        config, total = self._gpt.config, 0.0
        for name, logged in get_moe_layer_wise_logging_tracker().items():
            values = logged["values"].sum()
            group = logged.get("reduce_group") or self._gpt.pg_collection.tp
            dist.all_reduce(values, group=group)
            if name == "z_loss":
                total += config.moe_z_loss_coeff * float(values) / group.size()
            else:
                total += config.moe_aux_loss_coeff * float(values)
        return total

    def _gather_gradients(self) -> None:
        """Complete the buckets where each rank holds its reduced share only.

        all-gather over (expert) dp; no gradient; every rank calls it.
        """
        if not self._ddp.ddp_config.use_distributed_optimizer:
            return
        for buffer in (*self._ddp.buffers, *self._ddp.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()]
                bucket.grad_data.copy_(torch.cat(_gathered(own, group)))

    # reading

    def placements(self) -> Mapping[str, Placement]:
        """Family and cut of every parameter."""
        return {name: entry.placement for name, entry in self._entries.items()}

    def parameters(self) -> Mapping[str, Tensor]:
        """This rank's piece of every parameter: float32 masters beside a 16-bit model.

        Collective: gathers masters that the distributed optimizer has divided.
        """
        return {name: entry.read(self._weight) for name, entry in self._entries.items()}

    def _weight(self, parameter: Any) -> Tensor:
        """Give a weight, or its master; of a divided one zeros and the own range are added up.

        all-reduce over (expert) dp; no gradient; every rank calls it.
        """
        if not self._gpt.config.bf16:
            return parameter.data  # type: ignore[no-any-return]
        if not self._ddp.ddp_config.use_distributed_optimizer:
            return parameter.main_param.data  # type: ignore[no-any-return]
        whole = torch.zeros(parameter.numel())
        if parameter.main_param is not None:
            owners = self._optimizer.chained_optimizers
            owner = next(o for o in owners if parameter in o.model_param_gbuf_map)
            own = owner._get_model_param_range_map(parameter)["param"]
            whole[own.start : own.end] = parameter.main_param.data
        dense = getattr(parameter, "allreduce", True)
        dist.all_reduce(whole, group=self._ddp.dp_group if dense else self._ddp.expt_dp_group)
        return whole.view_as(parameter)

    def gradients(self) -> Mapping[str, Tensor | None]:
        """This rank's piece of every gradient of the last step, finalized, not clipped."""
        return self._gradients

    def grad_norm(self) -> float | None:
        """Megatron's own global norm of the last step."""
        return self._norm

    def routing(self) -> list[list[Tensor]]:
        """[micro-batch][layer] -> (T, K) experts that the routers chose in the last step."""
        return self._routing

    def replay(self, routing: Sequence[Sequence[Tensor]] | None) -> None:
        """Force the experts of the next step by Megatron's own `RouterReplay` (bfloat16 alone)."""
        self._replay = routing


def _gathered(own: Tensor, group: Any) -> list[Tensor]:
    """All-gather tensors of one size over a group."""
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts


def _layer_specs(spec: cases.Model) -> Any:
    """Describe two layers to a block: attention and dense MLP, then the MoE alone."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    dense = get_gpt_layer_local_spec()
    dense.submodules.input_layernorm = dense.submodules.pre_mlp_layernorm = Norm
    moe = get_gpt_layer_local_spec(num_experts=spec.experts).submodules
    alone = TransformerLayerSubmodules(pre_mlp_layernorm=Norm, mlp=moe.mlp, mlp_bda=moe.mlp_bda)
    sparse = ModuleSpec(module=TransformerLayer, submodules=alone)
    return TransformerBlockSubmodules(layer_specs=[dense, sparse] * spec.layers, layer_norm=Norm)
