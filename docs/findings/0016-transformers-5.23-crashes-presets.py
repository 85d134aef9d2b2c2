"""With transformers 5.23 every AutoEP preset dies in deepspeed.initialize."""

import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_RANK="0")
import deepspeed
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {"vocab_size": 37, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 12, "num_local_experts": 8}

if __name__ == "__main__":
    print("deepspeed", deepspeed.__version__, "transformers", transformers.__version__, flush=True)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    store = f"file://{tempfile.mktemp()}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    config = {"train_micro_batch_size_per_gpu": 1}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    config["expert_parallel"] = {"enabled": True, "autoep_size": 1, "preset_model": "mixtral"}
    config["expert_parallel"]["use_grouped_mm"] = False
    deepspeed.initialize(model=MixtralForCausalLM(MixtralConfig(**SIZES)), config=config)
    print("initialized", flush=True)
