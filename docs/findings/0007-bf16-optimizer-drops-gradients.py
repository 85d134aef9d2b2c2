"""BF16_Optimizer loses gradients accumulated before the engine's backward, others keep them.

Stands for a tiled loss, which runs the backward of its tiles inside forward.
"""

import os

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
import deepspeed
import deepspeed.ops
import torch

vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class Sum(torch.nn.Module):
    """One weight per entry; loss = their sum, so that every gradient is 1."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))

    def forward(self):
        """Give the loss."""
        return self.w.sum()


for accumulated in ("fp32", "bf16"):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": accumulated},
    }
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loss = engine()
    model.w.ds_grad_is_ready = False  # how a tiled computation says that more is to come
    model.w.sum().backward()
    model.w.ds_grad_is_ready = True
    engine.backward(loss)
    engine.step()
    kind = type(engine.optimizer).__name__
    print(f"grad_accum_dtype {accumulated} ({kind}): w = {model.w[0].item()}, expected -2.0")
