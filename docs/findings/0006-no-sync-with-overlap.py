"""ZeRO-1 with overlap_comm: the hooks reduce inside no_sync, too."""

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


for overlap in (False, True):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, "overlap_comm": overlap},
    }
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        with engine.no_sync():
            engine.backward(engine())
        engine.backward(engine())
        engine.step()
        found = f"w = {model.w[0].item()}"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:100]}"
    print(f"overlap_comm {overlap}: {found}, expected w = -2.0")
