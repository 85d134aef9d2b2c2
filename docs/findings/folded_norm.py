"""Global gradient norm, and clipping by it, folded by DeepSpeed, against float64.

Usage: python folded_norm.py '{"zero": 1, "tp": 2, "clip": 0.1}' ...   (keys: folded.py)
"""

import torch
from deepspeed.utils import safe_get_full_fp32_param
from folded import run, steps


def main(rank, case):
    """Print the norm told and the true one, and a clipped update as a multiple of the true one."""
    taken = steps(rank, case)
    engine, true = next(taken)
    weight, reference = engine.module.lm_head.weight, true.lm_head.weight

    def master():
        full = safe_get_full_fp32_param(weight)
        return (weight if full is None else full).detach().double().clone()

    norm = torch.stack([p.grad.norm() for p in true.parameters()]).norm()
    before = master()
    next(taken, None)  # the engine's step
    told = engine.get_global_grad_norm()
    update = (before - master()) / 1e-2
    expected = reference.grad * min(1.0, case["clip"] / float(norm))
    factor = float((update * expected).sum() / expected.square().sum())
    if rank == 0:
        name = type(engine.optimizer).__name__
        told = "None" if told is None else f"{float(told):.5f}"
        print(f"{name} {case}: norm told {told}, true {norm:.5f}; update x{factor:.4f}", flush=True)


if __name__ == "__main__":
    run(main)
