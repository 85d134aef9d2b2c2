"""round_robin_gradients: safe_get_full_fp32_param reads other parameters' master weights."""

import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param


class Four(torch.nn.Module):
    """Four parameters filled with 1, 2, 3, 4."""

    def __init__(self):
        super().__init__()
        parts = [torch.nn.Parameter(torch.full((4,), float(i + 1))) for i in range(4)]
        self.parts = torch.nn.ParameterList(parts)


def main(rank, store):
    """Read every master weight before any step."""
    os.environ["LOCAL_RANK"] = str(rank)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    files = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=2)
    for round_robin in (False, True):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1, "round_robin_gradients": round_robin},
        }
        model = Four()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        masters = [safe_get_full_fp32_param(p)[0].item() for p in model.parts]
        if rank == 0:
            weights = [p[0].item() for p in model.parts]
            print(f"round_robin_gradients {round_robin}: weights {weights}, masters {masters}")


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (tempfile.mktemp(),), nprocs=2)
