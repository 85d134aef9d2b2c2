"""Gradients of routed experts and routers, folded by DeepSpeed, against float64.

Usage: python folded_gradients.py '{"zero": 1, "tp": 2, "coalesce": true}' ...   (keys: folded.py)
"""

import torch
from deepspeed.utils import safe_get_full_grad
from folded import run, steps

FAMILIES = ("expert", "router")


def pairs(model, true, ep, k):
    """Yield family, parameter of EP rank k, and its gradient in float64."""
    own = slice(k * 8 // ep, (k + 1) * 8 // ep)
    for a, b in zip(model.model.layers, true.model.layers, strict=True):
        up, down = b.mlp.experts.gate_up_proj.grad[own], b.mlp.experts.down_proj.grad[own]
        yield "expert", a.mlp.experts.w1, up[:, :24]
        yield "expert", a.mlp.experts.w3, up[:, 24:]
        yield "expert", a.mlp.experts.w2, down
        yield "router", a.mlp.router.gate.weight, b.mlp.gate.weight.grad


def joined(tensors):
    """Put tensors end to end, in float64."""
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def compared(found, expected):
    """Say scale and residual of each family over all ranks, and how far two lanes' routers are."""
    said = ""
    for family in FAMILIES:
        e, g = expected[family], found[family]
        sums = torch.stack([e @ e, e @ g, g @ g])
        torch.distributed.all_reduce(sums)
        ee, eg, gg = sums.tolist()
        residual = max(0.0, gg / ee - (eg / ee) ** 2) ** 0.5
        said += f" {family} scale {eg / ee:.4f} residual {residual:.1e}"
    lanes = [torch.empty_like(found["router"]) for _ in range(4)]
    torch.distributed.all_gather(lanes, found["router"])
    return f"{said} lanes apart {float((lanes[0] - lanes[1]).norm() / lanes[0].norm()):.1e}"


def main(rank, case):
    """Compare each step's gradients."""
    for number, (engine, true) in enumerate(steps(rank, case), start=1):
        scale = getattr(engine.optimizer, "loss_scale", 1.0)
        held = list(pairs(engine.module, true, case["ep"], rank % case["ep"]))
        own = {f: joined(safe_get_full_grad(p) for g, p, _ in held if f == g) for f in FAMILIES}
        found = {family: gradient / scale for family, gradient in own.items()}
        said = compared(found, {f: joined(e for g, _, e in held if f == g) for f in FAMILIES})
        if rank == 0:
            print(f"{type(engine.optimizer).__name__} {case} step {number}:{said}", flush=True)


if __name__ == "__main__":
    run(main)
