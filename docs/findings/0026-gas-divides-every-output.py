"""Before 0.19.6: gas divides the gradient once for every forward output on its way.

One process: `python 0026-gas-divides-every-output.py [gas]`. Two linear layers that give back the
first one's output beside the second's, as `output_hidden_states` and `output_router_logits` do.
"""

import os
import sys

import torch

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29573"))
import deepspeed


class Two(torch.nn.Module):
    """y = w2 (w1 x); gives y, and w1 x beside it if asked to."""

    def __init__(self, with_hidden: bool) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        self.with_hidden = with_hidden

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the outputs."""
        hidden = self.first(x)
        y = self.second(hidden)
        return (y, hidden) if self.with_hidden else (y,)


def main(gas: int) -> None:
    """Print the scale of each weight's gradient against the mean over micro-batches."""
    for with_hidden in (False, True):
        torch.manual_seed(0)
        model, xs = Two(with_hidden), torch.randn(gas, 3, 4)
        loss = sum(model(x)[0].square().mean() for x in xs) / gas
        names, weights = zip(*model.named_parameters(), strict=True)
        true = torch.autograd.grad(loss, weights)
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": gas,
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(
            model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
        )
        for number, x in enumerate(xs, start=1):
            engine.backward(engine(x)[0].square().mean())
            if number < gas:
                engine.step()
        for name, weight, expected in zip(names, weights, true, strict=True):
            scale = float((weight.grad * expected).sum() / expected.square().sum())
            print(
                f"{deepspeed.__version__} gas {gas} hidden given: {with_hidden} {name} {scale:.4f}"
            )


main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
