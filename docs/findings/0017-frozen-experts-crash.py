"""Frozen experts: AutoEP under ZeRO-1 and 2 dies in deepspeed.initialize; ZeRO-0 works."""

import os
import sys
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_RANK="0")
import deepspeed
import torch
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {"vocab_size": 37, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 12, "num_local_experts": 8}

if __name__ == "__main__":
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    store = f"file://{tempfile.mktemp()}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    for stage in map(int, sys.argv[1:] or "012"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES))
        for module in model.modules():
            module._can_record_outputs = None  # else initialize dies with transformers 5.23 (0016)
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter.requires_grad_(False)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        config["zero_optimization"] = {"stage": stage}
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
        config["expert_parallel"] = {"enabled": True, "autoep_size": 1, "preset_model": "mixtral"}
        config["expert_parallel"]["use_grouped_mm"] = False
        try:
            deepspeed.initialize(model=model, config=config)
            print(f"ZeRO-{stage}: initialized", flush=True)
        except (IndexError, RuntimeError) as error:
            print(f"ZeRO-{stage}: {type(error).__name__}: {error}", flush=True)
