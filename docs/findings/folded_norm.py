"""Global gradient norm, and clipping by it, folded by DeepSpeed, against float64.

Usage: python folded_norm.py '{"zero": 1, "tp": 2, "clip": 0.1}' ...   (keys: folded.py)
"""

import json
import sys
import tempfile

import torch
from deepspeed.utils import safe_get_full_fp32_param
from folded import GIVEN, start, steps


def main(rank, case):
    """Print the norm told and the true one, and a clipped update as a multiple of the true one."""
    run = steps(rank, case)
    engine, true = next(run)
    weight, reference = engine.module.lm_head.weight, true.lm_head.weight

    def master():
        full = safe_get_full_fp32_param(weight)
        return (weight if full is None else full).detach().double().clone()

    norm = torch.stack([p.grad.norm() for p in true.parameters()]).norm()
    before = master()
    next(run, None)  # the engine's step
    told = engine.get_global_grad_norm()
    update = (before - master()) / 1e-2
    expected = reference.grad * min(1.0, case["clip"] / float(norm))
    factor = float((update * expected).sum() / expected.square().sum())
    if rank == 0:
        name = type(engine.optimizer).__name__
        told = "None" if told is None else f"{float(told):.5f}"
        print(f"{name} {case}: norm told {told}, true {norm:.5f}; update x{factor:.4f}", flush=True)


def every(rank, store, texts):
    """Run all cases in one process group."""
    start(rank, store)
    for text in texts:
        main(rank, {**GIVEN, **json.loads(text)})


if __name__ == "__main__":
    torch.multiprocessing.spawn(every, (tempfile.mktemp(), sys.argv[1:]), nprocs=4)
