"""Before 0.19.8: ZeRO-1 with contiguous_gradients false updates by gradients that are not reduced.

Two processes, three linear layers, plain SGD, no experts:
`python 0027-zero1-noncontiguous-unreduced.py '{"contiguous_gradients": false}'`.
"""

import json
import os
import sys

import torch


def main(rank: int, switches: dict) -> None:
    """Step with lr 1; compare each weight's change with the gradient of all micro-batches."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29581")
    import deepspeed
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = {}  # compile nothing
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(3)))
    xs = torch.randn(2, 2, 3, 6)  # [rank][micro-batch]: other data on every rank
    before = [p.detach().double().requires_grad_() for p in model.parameters()]

    def loss(weights: list, x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = x @ w.T
        return x.square().mean()

    whole = sum(loss(before, x) for mine in xs.double() for x in mine) / 4
    true = torch.autograd.grad(whole, before)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1, **switches},
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for x in xs[rank]:
        engine.backward(engine(x).square().mean())
        engine.step()
    for (name, after), w, g in zip(model.named_parameters(), before, true, strict=True):
        step = w.detach() - after.detach().double()
        scale, error = (step * g).sum() / g.square().sum(), (step - g).norm() / g.norm()
        if rank == 0:
            print(f"{deepspeed.__version__} {switches} {name} scale {scale:.4f} error {error:.1e}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1] if len(sys.argv) > 1 else '{"contiguous_gradients": false}')
    torch.multiprocessing.spawn(main, (given,), 2)
