"""fp16 with ZeRO-0: the loss is never scaled, the step divides by the scale."""

import os

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
import deepspeed
import deepspeed.ops
import torch

vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class Sum(torch.nn.Module):
    """One weight w per entry; loss = sum of them, so that every gradient is 1."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))

    def forward(self):
        """Give the loss."""
        return self.w.sum()


for scale in (1, 64, 1024):
    for stage in (0, 1):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "fp16": {"enabled": True, "loss_scale": scale},
        }
        model = Sum()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine())
        engine.step()
        print(f"stage {stage}, loss_scale {scale}: w = {model.w[0].item():.6f}, expected -1")
