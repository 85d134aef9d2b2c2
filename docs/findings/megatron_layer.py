"""Megatron-Core's MoE layer with its DDP and finalize_model_grads on 4 CPU ranks, float64."""

import os

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
import torch
from megatron.core import distributed, parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

E, F, H, S, K = 4, 6, 8, 8, 2  # experts, width, hidden, tokens of a dp rank, top_k
GIVEN = {"tp": 2, "ep": 4, "etp": 1, "kind": "none", "aux": 0.0, "z": 0.0, "token": False, "pad": 0}


def start(rank, store, c):
    """Join the world of 4 and make Megatron's groups; give their sizes by its names."""
    torch.set_default_dtype(torch.float64)
    torch.cuda.current_device = lambda: "cpu"
    moe_utils.te_general_gemm = None  # 0019
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=4)
    names = ("tensor_model_parallel", "expert_model_parallel", "expert_tensor_parallel")
    sizes = {f"{name}_size": c[key] for name, key in zip(names, ("tp", "ep", "etp"), strict=True)}
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    return sizes


def layer(sizes, c):
    """Make the MoE layer, in Megatron's DDP."""
    made = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 4, "ffn_hidden_size": F}
    made |= {"num_moe_experts": E, "moe_router_topk": K, "moe_aux_loss_coeff": c["aux"]}
    made |= {"moe_router_load_balancing_type": c["kind"], "moe_z_loss_coeff": c["z"] or None}
    made |= {"calculate_per_token_loss": c["token"], "sequence_parallel": c["tp"] > 1}
    made |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    made |= {"params_dtype": torch.float64, "add_bias_linear": False, **c.get("options", {})}
    made |= {"use_cpu_initialization": True, "gradient_accumulation_fusion": False}
    spec = get_moe_module_spec(use_te=False, num_experts=E)
    config = TransformerConfig(**sizes, **made)
    moe = spec.module(config, spec.submodules)
    ddp_config = distributed.DistributedDataParallelConfig()
    return distributed.DistributedDataParallel(config, ddp_config, moe)


def gradients(rank, c, pieces, tokens, store):
    """Give this rank's gradients; pieces(ep rank, etp rank): the weights it holds, in order."""
    ddp = layer(start(rank, store, c), c)
    at = parallel_state.get_expert_model_parallel_rank(), rank % c["etp"]
    parameters = list(ddp.parameters())
    for parameter, piece in zip(parameters, pieces(*at), strict=True):
        parameter.data.copy_(piece)
    lane, width, count = rank % c["tp"], S // c["tp"], S - c["pad"]
    rows = slice(lane * width, (lane + 1) * width)  # sequence parallel: this lane's tokens
    padding = (torch.arange(S) >= count)[None, rows]
    x = tokens[rank // c["tp"], rows, None]
    y, _ = ddp(x, padding_mask=padding if c["pad"] else None)
    (y[~padding[0]].square().sum() / (1 if c["token"] else count)).backward()
    distributed.finalize_model_grads([ddp], torch.tensor(count) if c["token"] else None)
    return at, [parameter.main_grad for parameter in parameters]
