"""Before 0.19.8: safe_get_full_grad gives this rank's own gradient under BF16_Optimizer.

Two processes, bf16, ZeRO-1, accumulated in float32: `python 0028-full-grad-not-reduced.py`. The
update is that of the mean over ranks; what is read before it is not.
"""

import os

import torch


def main(rank: int) -> None:
    """Let rank r's loss be w * (1 + 2 r): the reduced gradient is 2, the own ones are 1 and 3."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29582")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    deepspeed.init_distributed("gloo", verbose=False)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0, "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    engine.backward(engine(torch.full((1, 1), 1.0 + 2 * rank, dtype=torch.bfloat16)).float().sum())
    (weight,) = engine.module.parameters()
    read = float(safe_get_full_grad(weight))
    engine.step()
    moved = float(safe_get_full_fp32_param(weight))
    told = f"read {read}, expected 2.0; the step moved the weight by {moved}, expected -2.0"
    print(f"{deepspeed.__version__} rank {rank}: {told}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (), 2)
