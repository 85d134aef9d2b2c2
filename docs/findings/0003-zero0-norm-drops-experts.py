"""ZeRO-0 with experts: the global norm and the clipping by it leave experts out."""

import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
import deepspeed
import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups

TRUE = (4 * 1.0**2 + 4 * 1.5**2 + 4 * 2.5**2) ** 0.5  # dense 1; experts 3/2 and 5/2, mean over dp 2


class Known(MoE):
    """Four dense weights and four of one expert a rank, with gradients known by hand."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.num_experts = 2
        self.dense = torch.nn.Parameter(torch.zeros(4))
        self.expert = torch.nn.Parameter(torch.zeros(4))
        self.expert.allreduce, self.expert.group_name = False, "ep_size_2"

    def set_deepspeed_parallelism(self, *_):
        """Make the groups that DeepSpeed's layer would."""
        groups._create_expert_and_data_parallel(2)

    def forward(self, expert_gradient):
        """Give the loss."""
        return self.dense.sum() + expert_gradient * self.expert.sum()


def main(rank, store):
    """Clip to 0.01 with lr 1: the step of a dense weight tells the norm that was used."""
    os.environ["LOCAL_RANK"] = str(rank)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
    files = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=2)
    for dtype in ("fp32", "bf16", "fp16"):
        model = Known()
        expert = {"params": [model.expert], "name": "ep_size_2", "moe": True}
        optimizer = torch.optim.SGD([{"params": [model.dense], "name": "dense"}, expert], lr=1.0)
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.01}
        if dtype != "fp32":
            config[dtype] = {"enabled": True}
        if dtype == "fp16":
            config[dtype]["loss_scale"] = 1
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(3.0 + 2.0 * rank))
        engine.step()
        used = 0.01 / abs(model.dense[0].item())
        told = engine.get_global_grad_norm()
        print(f"rank {rank} {dtype}: norm told {told}, used {used:.3f}, true {TRUE:.3f}")


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (tempfile.mktemp(),), nprocs=2)
