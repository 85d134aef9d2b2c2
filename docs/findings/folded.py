"""A tiny Mixtral on 4 CPU ranks, folded by DeepSpeed, beside one process in float64.

Before 0.19.8 DeepSpeed cannot forget the groups of a case: give such a release cases of one shape.
"""

import contextlib
import json
import os
import sys
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
import deepspeed
import torch
from deepspeed.utils import groups
from transformers import MixtralConfig, MixtralForCausalLM

forget_groups = getattr(groups, "_release_process_group_references", lambda: None)  # since 0.19.8
GIVEN = {"zero": 1, "tp": 2, "ep": 4, "gas": 1, "clip": 0.0, "steps": 1, "dtype": "float32"}
SIZES = {"vocab_size": 37, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_local_experts": 8, "num_attention_heads": 12, "num_key_value_heads": 12}
SIZES |= {"attn_implementation": "eager", "experts_implementation": "eager"}
EXPERTS = {"enabled": True, "preset_model": "mixtral", "use_grouped_mm": False}


def run(main):
    """Call main(rank, case) on 4 ranks for every case of the command line."""
    torch.multiprocessing.spawn(_join, (tempfile.mktemp(), main, sys.argv[1:]), nprocs=4)


def _join(rank, store, main, texts):
    os.environ["LOCAL_RANK"] = str(rank)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=4)
    for text in texts:
        main(rank, {**GIVEN, **json.loads(text)})


def config(c):
    """Write DeepSpeed's config; `options` of the case come on top."""
    made = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": c["clip"]}
    made["gradient_accumulation_steps"] = 1 if "coalesce" in c else c["gas"]
    lr = c.get("lr", 1e-2 if c["clip"] else 0.0)
    made["optimizer"] = {"type": "SGD", "params": {"lr": lr}}
    made |= {"zero_allow_untested_optimizer": True, "communication_data_type": "fp32"}
    made["zero_optimization"] = {"stage": c["zero"], "overlap_comm": "overlap" in c}
    made["expert_parallel"] = {**EXPERTS, "autoep_size": c["ep"]}
    made["tensor_parallel"] = {"autotp_size": c["tp"], "preset_model": "mixtral"}
    return {**made, **c.get("options", {})}


def steps(rank, c):
    """Yield engine and reference of each step, gradients reduced, the engine's step not done."""
    forget_groups()
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, initializer_range=c.get("init", 0.3)))
    true = MixtralForCausalLM(model.config).double()
    true.load_state_dict(model.to(getattr(torch, c["dtype"])).state_dict())
    for module in model.modules():
        module._can_record_outputs = None  # else initialize dies with transformers 5.23 (0016)
    ids = torch.randint(37, (c["steps"], 4 // c["tp"], c["gas"], 1, 16))
    engine = deepspeed.initialize(model=model, config=config(c))[0]
    for batch in ids:
        with engine.coalesce_grad_reduction() if "coalesce" in c else contextlib.nullcontext():
            for m, x in enumerate(batch[rank // c["tp"]], start=1):
                loss = engine(input_ids=x, labels=x).loss
                engine.backward(loss / c["gas"] if "coalesce" in c else loss)
                if m < c["gas"] and "coalesce" not in c:
                    engine.step()
        true.zero_grad()
        for x in batch.flatten(0, 1):
            (true(input_ids=x, labels=x).loss / batch.shape[0] / c["gas"]).backward()
        yield engine, true
        engine.step()
