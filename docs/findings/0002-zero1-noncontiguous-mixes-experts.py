"""ZeRO-1 with contiguous_gradients=false averages the gradients of different experts."""

import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
import deepspeed
import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import safe_get_full_grad


class Net(torch.nn.Module):
    """Linear layer, then DeepSpeed's MoE: two experts, one on each rank."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(4, 4)
        expert = torch.nn.Linear(4, 4, bias=False)
        self.moe = MoE(4, expert, num_experts=2, ep_size=2, k=1, min_capacity=8, use_rts=False)

    def forward(self, x):
        """Give the loss."""
        return self.moe(self.dense(x))[0].pow(2).sum()


def main(rank, store):
    """Compare the expert's gradient on both settings of contiguous_gradients."""
    os.environ["LOCAL_RANK"] = str(rank)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    files = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=2)
    found = {}
    for contiguous in (True, False):
        torch.manual_seed(0)
        net = Net()
        groups = {"params": list(net.parameters()), "name": "all"}
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1, "contiguous_gradients": contiguous},
        }
        optimizer = torch.optim.SGD(groups, lr=0.1)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        generator = torch.Generator().manual_seed(5 + rank)
        engine.backward(engine(torch.randn(8, 4, generator=generator)))
        expert = next(p for n, p in net.named_parameters() if "deepspeed_experts" in n)
        found[contiguous] = safe_get_full_grad(expert).clone()
    error = float((found[False] - found[True]).norm() / found[True].norm())
    print(f"expert of rank {rank}: relative difference {error:.3f}, expected 0", flush=True)


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (tempfile.mktemp(),), nprocs=2)
