"""ZeRO-0 in bf16 or fp16: the wrapper's constructor runs optimizer.step() on zero gradients."""

import os

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
import deepspeed
import deepspeed.ops
import torch

vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class Sum(torch.nn.Module):
    """Weights of 1; loss = their sum, so that every gradient is 1."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4))

    def forward(self):
        """Give the loss."""
        return self.w.sum()


def start(weight_decay):
    """Start an engine with AdamW, lr 0.1."""
    model = Sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=weight_decay)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


engine = start(weight_decay=0.5)
master = engine.optimizer.fp32_groups[0][0]
steps = float(engine.optimizer.optimizer.state[master]["step"])
print(f"before any step: master weight {master[0].item():.4f}, expected 1; Adam has done {steps:g}")
engine = start(weight_decay=0.0)
master = engine.optimizer.fp32_groups[0][0]
engine.backward(engine())
engine.step()
print(f"first update {master[0].item() - 1:.4f}, expected -0.1 (lr)")
