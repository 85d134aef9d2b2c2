"""Before 0.19.8: ZeRO-1 updates by gradients that are not reduced, with either of two options.

Two processes, three linear layers, plain SGD, no experts:
`python 0027-zero1-unreduced.py noncontiguous`, or `accumulation` (fp16, in float32), or `plain`.
"""

import os
import sys

import torch

OPTIONS = {
    "plain": {},
    "noncontiguous": {"zero_optimization": {"stage": 1, "contiguous_gradients": False}},
    "accumulation": {
        "fp16": {"enabled": True, "loss_scale": 1.0}, "data_types": {"grad_accum_dtype": "fp32"}
    },
}  # fmt: skip


def main(rank: int, name: str) -> None:
    """Step with lr 1; compare each weight's change with the gradient."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29581")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_fp32_param

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(3)))
    xs = torch.randn(2, 2, 3, 6)  # [rank][micro-batch]: other data on every rank
    before = [p.detach().double().requires_grad_() for p in model.parameters()]

    a, b, c = before
    whole = (xs.double() @ a.T @ b.T @ c.T).square().mean()  # equal sizes: the mean of the means
    true = torch.autograd.grad(whole, before)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1}, **OPTIONS[name],
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for x in xs[rank].to(next(engine.module.parameters()).dtype):
        engine.backward(engine(x).float().square().mean())
        engine.step()
    for layer, (p, w, g) in enumerate(zip(engine.module.parameters(), before, true, strict=True)):
        step = w.detach() - safe_get_full_fp32_param(p).double()
        scale, error = (step * g).sum() / g.square().sum(), (step - g).norm() / g.norm()
        if rank == 0:
            print(
                f"{deepspeed.__version__} {name} layer {layer} scale {scale:.4f} error {error:.1e}"
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "noncontiguous"
    torch.multiprocessing.spawn(main, (chosen,), 2)
