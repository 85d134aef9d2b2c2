"""A hand-written tensor parallelism over two ranks, put under the harness: docs/bring-your-own.md.

parity run examples/two_rank_mlp.toml --implementation examples.two_rank_mlp:Forgetful
"""

import re

from torch import distributed as dist

from parity.implementation import Placement, Shard

COLUMN, ROW = r"attention\.[qkv]\.|mlp\.w[13]\.", r"attention\.o\.|mlp\.w2\."  # (out, in) weights
FAMILIES = ("layernorm", "router", "expert", "attention", "embedding")  # the first that fits


class TwoRankMLP:
    sums_in_backward = True

    def build(self, model, config, context):
        self.model, self.lr = model, config["optimizer"]["params"]["lr"]
        self.tp = context.layout.tp  # 1 in the baseline, which runs on one rank
        self.group = context.new_group(range(self.tp))
        self.placed = {}
        for name, weight in model.named_parameters():
            dim = 0 if re.search(COLUMN, name) else 1 if re.search(ROW, name) else None
            shards = () if dim is None else (Shard("tp", dim),)
            for shard in shards:
                weight.data = weight.data.chunk(self.tp, shard.dim)[context.rank].clone()
            family = next((f for f in FAMILIES if f.removeprefix("layer") in name), "dense")
            self.placed[name] = Placement(family, shards)
        for block in model.blocks():
            self.share(block.attention, self.sum_over_lanes)
            self.share(block.mlp, self.sum_over_lanes if self.sums_in_backward else None)

    def share(self, region, in_backward):
        """Let each lane compute its part of a region: heads, or columns of the MLP."""

        def forward(x, inside=region.forward):
            x = x.view_as(x)
            if in_backward:  # a lane's backward gives its part of the gradient of the input
                x.register_hook(in_backward)
            y = inside(x)
            y.data = self.sum_over_lanes(y.data)  # not recorded: its backward is the identity
            return y

        region.forward = forward

    def sum_over_lanes(self, tensor):
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def step(self, micro_batches):
        self.model.zero_grad()
        losses, self.chosen = [], []
        for batch in micro_batches:
            loss = self.model(**batch)
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
            self.chosen.append([block.moe.indices_TK for block in self.model.blocks()])
        for name, weight in self.model.named_parameters():
            if not self.placed[name].shards:  # the mean over the lanes keeps replicas equal
                weight.grad = self.sum_over_lanes(weight.grad) / self.tp
            weight.data -= self.lr * weight.grad
        return losses

    def placements(self):
        return self.placed

    def parameters(self):
        return dict(self.model.named_parameters())

    def routing(self):
        return self.chosen


class Forgetful(TwoRankMLP):
    """The planted bug: the lanes' parts of the gradient that leaves the MLP are not summed."""

    sums_in_backward = False
