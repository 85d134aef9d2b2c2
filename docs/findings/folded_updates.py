"""Updates of routed experts and routers, folded by DeepSpeed with SGD, against float64.

Usage: python folded_updates.py '{"tp": 2, "lr": 0.1, "steps": 2}' ...   (keys: folded.py)
The last step's update is not seen. Where gradients cannot be read (0028), (w0 - w1) / lr can.
"""

from deepspeed import __version__
from deepspeed.utils import safe_get_full_fp32_param
from folded import run, steps
from folded_gradients import FAMILIES, compared, joined, pairs


def main(rank, case):
    """Compare each step's update with its gradient."""
    weights = expected = {}
    for number, (engine, true) in enumerate(steps(rank, case)):
        before, held = weights, list(pairs(engine.module, true, case["ep"], rank % case["ep"]))
        weights = {
            f: joined(safe_get_full_fp32_param(p) for g, p, _ in held if f == g) for f in FAMILIES
        }
        if before:
            found = {f: (before[f] - weights[f]) / case["lr"] for f in FAMILIES}
            said = compared(found, expected)
            if rank == 0:
                name = f"{__version__} {type(engine.optimizer).__name__}"
                print(f"{name} {case} step {number}:{said}", flush=True)
        expected = {f: joined(e for g, _, e in held if f == g) for f in FAMILIES}


if __name__ == "__main__":
    run(main)
