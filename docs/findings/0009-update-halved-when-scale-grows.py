"""fp16 with a dynamic loss scale: the update of every step on which the scale grows is halved."""

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
    """One weight per entry; loss = their sum, so that every gradient is 1."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))

    def forward(self):
        """Give the loss."""
        return self.w.sum()


for stage in (1, 2, 3):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2},
    }
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    weight, said = 0.0, []
    for _ in range(6):
        scale = engine.optimizer.loss_scale
        engine.backward(engine())
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            now = model.w[0].item()
        said.append(f"{now - weight:.2f} ({scale:g} -> {engine.optimizer.loss_scale:g})")
        weight = now
    print(f"stage {stage}: updates (scale): {', '.join(said)}; expected -1.00 each")
