"""Time a folded forward and backward on GPUs: fold_impl beside the folding inside DeepSpeed.

    torchrun --nproc-per-node 4 benchmarks/folded_step.py [--profile NAME]

Both fold one and the same Hugging Face Mixtral in bfloat16 with random weights. The number of
tokens of the step is the same for every layout: tp lanes share the tokens of their dp rank.
Prints, per model and layout, the median of CUDA-event times over steps on the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist


@dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark model."""

    hidden: int
    width: int
    experts: int
    top_k: int
    layers: int


SHAPES = {
    "mixtral": Shape(hidden=4096, width=14336, experts=8, top_k=2, layers=2),
    "fine": Shape(hidden=2048, width=1408, experts=64, top_k=8, layers=4),
}
TENSOR_PARALLEL = (1, 2, 4)
"""Sizes of tp to try, each with ep = world."""
TOKENS_PER_GPU = 8192
SEQUENCE = 2048


def model_of(shape: Shape) -> nn.Module:
    """Make the decoder on the GPU, equal on every rank."""
    config = transformers.MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 128,
        num_key_value_heads=shape.hidden // 128,
        vocab_size=1024,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


def ours(model: nn.Module, tp: int, ep: int) -> Callable[[Tensor], Tensor]:
    """Fold with fold_impl's native engine."""
    from fold_impl.config import FoldConfig
    from fold_impl.engine import build_engine

    config = FoldConfig.from_dict(
        {
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
            "tensor_parallel": {"autotp_size": tp},
            "expert_parallel": {"enabled": True, "autoep_size": ep, "preset_model": "mixtral"},
            "folding": {"engine": "native"},
        },
        world_size=dist.get_world_size(),
    )
    engine = build_engine(model, config, dist.get_rank())
    return lambda x: engine.module.model(inputs_embeds=x, use_cache=False).last_hidden_state


def deepspeeds(model: nn.Module, tp: int, ep: int) -> Callable[[Tensor], Tensor]:
    """Fold with the AutoTP + AutoEP of the installed DeepSpeed."""
    import deepspeed
    from deepspeed.utils import groups

    groups._release_process_group_references(None)
    _forgive_transformers()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ep,
            "preset_model": "mixtral",
            "use_grouped_mm": True,
        },
    }
    if tp > 1:
        config["tensor_parallel"] = {
            "autotp_size": tp,
            "partition_config": {
                "use_default_specs": False,
                "layer_specs": [
                    {"patterns": [r".*\.self_attn\.o_proj\.weight$"], "partition_type": "row"},
                    {
                        "patterns": [r".*\.self_attn\.[qkv]_proj\.weight$"],
                        "partition_type": "column",
                    },
                ],
            },
        }
    engine = deepspeed.initialize(
        model=model, config=config, model_parameters=list(model.parameters())
    )[0]
    return lambda x: engine.module.model(inputs_embeds=x, use_cache=False).last_hidden_state


def _forgive_transformers() -> None:
    """Let DeepSpeed 0.19.8 look strings up in a registry that transformers 5.2x keyed by class."""
    from transformers.utils import output_capturing

    registry = type(output_capturing._CAN_RECORD_REGISTRY)
    if registry is dict:
        return
    get, put = registry.get, registry.__setitem__
    registry.get = lambda self, key, default=None: (
        dict.get(self, key, default) if isinstance(key, str) else get(self, key)
    )
    registry.__setitem__ = lambda self, key, value: (
        dict.__setitem__(self, key, value) if isinstance(key, str) else put(self, key, value)
    )


def times_ms(
    step: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, steps: int
) -> list[float]:
    """Time forward and backward of each step in milliseconds, after three warm-up steps."""
    found = []
    for index in range(steps + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        start.record()
        step(x).backward(gradient)
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            found.append(start.elapsed_time(end))
    return found


@contextlib.contextmanager
def profiled(active: bool) -> Iterator[None]:
    """Print the kernels that take most time, on rank 0."""
    if not active:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        yield
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        table = profile.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70
        )
        print("\n".join(line[:72] + line[-60:] for line in table.splitlines()), flush=True)


def main() -> None:
    """Run every model and layout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(SHAPES))
    parser.add_argument("--engines", nargs="*", default=["fold_impl", "deepspeed"])
    parser.add_argument("--profile", default="", help="ENGINE/MODEL/tpN to print the kernels of")
    arguments = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    world = dist.get_world_size()
    makers = {"fold_impl": ours, "deepspeed": deepspeeds}
    for name in arguments.models:
        for tp in (size for size in TENSOR_PARALLEL if world % size == 0):
            for engine in arguments.engines:
                began = time.time()
                model = model_of(SHAPES[name])
                try:
                    step = makers[engine](model, tp, world)
                    sequences = TOKENS_PER_GPU * tp // SEQUENCE
                    size = (sequences, SEQUENCE, SHAPES[name].hidden)
                    x = torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                    dist.broadcast(x.data, 0)
                    gradient = torch.randn_like(x)
                    dist.broadcast(gradient, 0)
                    found = times_ms(step, x, gradient, arguments.steps)
                    key = f"{engine}/{name}/tp{tp}"
                    with profiled(arguments.profile == key):
                        step(x).backward(gradient)
                    worst = torch.tensor(statistics.median(found), device="cuda")
                    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                    text = f"{float(worst):8.1f} ms (min {min(found):.1f}, max {max(found):.1f})"
                except Exception as error:  # the other engine and layouts still run
                    text = f"failed: {type(error).__name__}: {str(error)[:300]}"
                if dist.get_rank() == 0:
                    peak = torch.cuda.max_memory_allocated() / 2**30
                    print(
                        f"{name:8s} tp{tp}/ep{world} {engine:10s} {text} peak {peak:.1f} GiB "
                        f"({time.time() - began:.0f} s)",
                        flush=True,
                    )
                step = model = x = gradient = None  # type: ignore[assignment]
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
