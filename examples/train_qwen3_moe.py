"""Fold a tiny Qwen3-MoE over 4 CPU ranks and train it: torchrun --nproc-per-node 4 FILE."""

import torch
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fold_impl

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "tensor_parallel": {"autotp_size": 2},  # dense weights: tp 2 x dp 2
    "expert_parallel": {"enabled": True, "autoep_size": 4, "preset_model": "qwen3_moe"},
    "zero_optimization": {"stage": 1},
}
dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights on every rank
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=2, vocab_size=99))
engine, _, _, _ = fold_impl.initialize(model=model, config=config)
tokens = torch.Generator().manual_seed(dist.get_rank() // 2)  # lanes of a dp rank share data
for step in range(40):
    for _ in range(2):
        start = torch.randint(90, (4, 1), generator=tokens)
        ids = (start + torch.arange(9)) % 99  # counting: something to learn
        logits = engine(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
    if step % 10 == 9 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}, norm {engine.get_global_grad_norm():.3f}")
dist.destroy_process_group()
