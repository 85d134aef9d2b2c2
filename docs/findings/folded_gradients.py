"""Gradients of routed experts and routers, folded by DeepSpeed, against float64.

Usage: python folded_gradients.py '{"zero": 1, "tp": 2, "coalesce": true}' ...   (keys: folded.py)
"""

import json
import sys
import tempfile

import torch
from deepspeed.utils import safe_get_full_grad
from folded import GIVEN, start, steps


def pairs(model, true, ep, k):
    """Yield family, parameter of EP rank k, and its gradient in float64."""
    own = slice(k * 8 // ep, (k + 1) * 8 // ep)
    for a, b in zip(model.model.layers, true.model.layers, strict=True):
        up, down = b.mlp.experts.gate_up_proj.grad[own], b.mlp.experts.down_proj.grad[own]
        yield "expert", a.mlp.experts.w1, up[:, :24]
        yield "expert", a.mlp.experts.w3, up[:, 24:]
        yield "expert", a.mlp.experts.w2, down
        yield "router", a.mlp.router.gate.weight, b.mlp.gate.weight.grad


def main(rank, case):
    """Print scale and residual of both families, and how far two lanes' routers are apart."""
    for number, (engine, true) in enumerate(steps(rank, case), start=1):
        found, expected = {}, {}
        scale = getattr(engine.optimizer, "loss_scale", 1.0)
        compared = pairs(engine.module, true, case["ep"], rank % case["ep"])
        for family, parameter, gradient in compared:
            own = safe_get_full_grad(parameter).double().flatten() / scale
            found[family] = torch.cat([found.get(family, own[:0]), own])
            flat = gradient.flatten()
            expected[family] = torch.cat([expected.get(family, flat[:0]), flat])
        said = f"{type(engine.optimizer).__name__} {case} step {number}:"
        for family, g in found.items():
            e = expected[family]
            sums = torch.stack([e @ e, e @ g, g @ g])
            torch.distributed.all_reduce(sums)
            ee, eg, gg = sums.tolist()
            residual = max(0.0, gg / ee - (eg / ee) ** 2) ** 0.5
            said += f" {family} scale {eg / ee:.4f} residual {residual:.1e}"
        lanes = [torch.empty_like(found["router"]) for _ in range(4)]
        torch.distributed.all_gather(lanes, found["router"])
        apart = float((lanes[0] - lanes[1]).norm() / lanes[0].norm())
        if rank == 0:
            print(f"{said} lanes apart {apart:.1e}", flush=True)


def every(rank, store, texts):
    """Run all cases in one process group."""
    start(rank, store)
    for text in texts:
        main(rank, {**GIVEN, **json.loads(text)})


if __name__ == "__main__":
    torch.multiprocessing.spawn(every, (tempfile.mktemp(), sys.argv[1:]), nprocs=4)
