"""Gradients below the MoE layers, folded by DeepSpeed, against one process in float64.

Usage: python 0025-input-gradient-of-one-lane.py '{"zero": 1, "tp": 2}'   (keys: folded.py)
"""

from deepspeed import __version__
from deepspeed.utils import safe_get_full_grad
from folded import run, steps

NORM = "post_attention_layernorm"  # right below the MoE layer
REPLICATED = ("model.norm", f"1.{NORM}", f"0.{NORM}", "embed_tokens")


def main(rank, case):
    """Print the scale and the error of replicated weights, from the top of the model down."""
    for engine, true in steps(rank, case):
        expected = dict(true.named_parameters())
        found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        said = f"{__version__} {case}:"
        for part in REPLICATED:
            (name,) = (n for n in expected if part in n)
            e, g = expected[name].grad.flatten(), found[name].double().flatten()
            error = float((g - e).norm() / e.norm())
            said += f"\n  {name} scale {float(e @ g / (e @ e)):.4f} error {error:.1e}"
        if rank == 0:
            print(said, flush=True)


if __name__ == "__main__":
    run(main)
