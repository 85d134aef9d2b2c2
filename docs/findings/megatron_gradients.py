"""Expert gradients, and the auxiliary part of the router's: Megatron beside one process."""

import json
import sys
import tempfile

import torch
from megatron_layer import GIVEN, E, F, H, K, S, gradients

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
ROUTER, UP, DOWN = (torch.randn(s, requires_grad=True) for s in ((E, H), (E, 2, F, H), (E, H, F)))
TOKENS = torch.randn(4, S, H)


def objective(c):
    """Naively: mean over dp ranks of the token mean of |y|^2 and of their auxiliary losses."""
    x = TOKENS[: 4 // c["tp"], : S - c["pad"]]
    logits_DSE = x @ ROUTER.T
    value, chosen = logits_DSE.topk(K)
    weight_DSE = torch.zeros_like(logits_DSE).scatter(2, chosen, value.softmax(2))
    gate, up = torch.einsum("dsh,egfh->gdsef", x, UP)
    gated = torch.nn.functional.silu(gate) * up
    y = torch.einsum("dsef,ehf,dse->dsh", gated, DOWN, weight_DSE)
    load_DE, prob_DE = (weight_DSE > 0).double().mean(1) / K, logits_DSE.softmax(2).mean(1)
    if c["kind"] == "global_aux_loss":
        load_DE = load_DE.mean(0, keepdim=True)
    balance = c["aux"] * E * (load_DE * prob_DE).sum(1).mean()
    return y.square().sum(2).mean() + balance + c["z"] * logits_DSE.logsumexp(2).square().mean()


def compared(got, want):
    """Give error and scale of some gradients."""
    got, want = (torch.cat([t.flatten() for t in tensors]) for tensors in (got, want))
    return float((got - want).norm() / want.norm()), float(got @ want / (want @ want))


def run(rank, c, said, store):
    """Print how far the gradients of the worst rank are from its slices of the true ones."""

    def pieces(ep, etp, of=(ROUTER, UP, DOWN)):
        up, down = (t.chunk(c["ep"])[ep].chunk(c["etp"], 2)[etp] for t in of[1:])
        experts = zip(up.flatten(1, 2), down, strict=True)
        return [of[0], *(tensor for expert in experts for tensor in expert)]

    at, got = gradients(rank, c, pieces, TOKENS, store)
    want = pieces(*at, torch.autograd.grad(objective(c), (ROUTER, UP, DOWN)))
    main = torch.autograd.grad(objective({**c, "aux": 0.0, "z": 0.0}), ROUTER)[0]
    found = [compared(got[1:], want[1:]), compared([got[0] - main], [want[0] - main])]
    everybody = [None] * 4
    torch.distributed.all_gather_object(everybody, found)
    (error, scale), (auxiliary, part) = (max(each) for each in zip(*everybody, strict=True))
    words = f", auxiliary part of router x{part:.4f} error {auxiliary:.0e}"
    if rank == 0:
        print(f"{said}: experts x{scale:.4f} error {error:.0e}{words * bool(c['aux'] or c['z'])}")


for case in sys.argv[1:]:
    arguments = ({**GIVEN, **json.loads(case)}, case, tempfile.mktemp())
    torch.multiprocessing.start_processes(run, arguments, nprocs=4, start_method="fork")
