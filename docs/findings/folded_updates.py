"""Updates of routed experts and routers, folded by DeepSpeed with SGD, against float64.

Usage: python folded_updates.py '{"tp": 2, "lr": 0.1, "steps": 2}' ...   (keys: folded.py)
The last step's update is not seen. Where gradients cannot be read (0028), (w0 - w1) / lr can.
"""

import json
import sys
import tempfile

import torch
from deepspeed import __version__
from deepspeed.utils import safe_get_full_fp32_param
from folded import GIVEN, start, steps
from folded_gradients import pairs


def flat(tensors):
    """Join tensors end to end, in float64."""
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def main(rank, case):
    """Print scale and residual of both families' updates, and how far two lanes' routers' are."""
    before = {}
    for number, (engine, true) in enumerate(steps(rank, case)):
        found = list(pairs(engine.module, true, case["ep"], rank % case["ep"]))
        now = {}
        for family in ("expert", "router"):
            own = flat(safe_get_full_fp32_param(p) for f, p, _ in found if f == family)
            now[family] = own, flat(g for f, _, g in found if f == family)
        said = f"{__version__} {type(engine.optimizer).__name__} {case} step {number}:"
        for family, (weights, expected) in before.items():
            g = (weights - now[family][0]) / case["lr"]
            sums = torch.stack([expected @ expected, expected @ g, g @ g])
            torch.distributed.all_reduce(sums)
            ee, eg, gg = sums.tolist()
            residual = max(0.0, gg / ee - (eg / ee) ** 2) ** 0.5
            said += f" {family} scale {eg / ee:.4f} residual {residual:.1e}"
        if before:
            own = before["router"][0] - now["router"][0]
            lanes = [torch.empty_like(own) for _ in range(4)]
            torch.distributed.all_gather(lanes, own)
            apart = float((lanes[0] - lanes[1]).norm() / lanes[0].norm())
            if rank == 0:
                print(f"{said} lanes apart {apart:.1e}", flush=True)
        before = now


def every(rank, store, texts):
    """Run all cases in one process group."""
    start(rank, store)
    for text in texts:
        main(rank, {**GIVEN, **json.loads(text)})


if __name__ == "__main__":
    torch.multiprocessing.spawn(every, (tempfile.mktemp(), sys.argv[1:]), nprocs=4)
