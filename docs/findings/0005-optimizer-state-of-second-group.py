"""ZeRO-1/2 with two parameter groups: the second group's optimizer state cannot be read."""

import os

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_optimizer_state

vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class Two(torch.nn.Module):
    """Two weights; loss = the sum of both."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(4))
        self.b = torch.nn.Parameter(torch.zeros(4))

    def forward(self):
        """Give the loss."""
        return self.a.sum() + self.b.sum()


model = Two()
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1},
}
optimizer = torch.optim.Adam([{"params": [model.a]}, {"params": [model.b]}])
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for step in range(2):
    engine.backward(engine())
    engine.step()
    for name, weight in model.named_parameters():
        try:
            state = safe_get_full_optimizer_state(weight, "exp_avg")
            found = f"exp_avg {state[0].item():.3f}"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(f"after step {step + 1}, group of {name}: {found}")
