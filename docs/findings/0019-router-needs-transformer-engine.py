"""Megatron-Core without Transformer Engine: the router's linear map names what was not imported."""

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear

x, weight = torch.randn(3, 8), torch.randn(4, 8)
try:
    print(router_gating_linear(x, weight, None, torch.float32).shape)
except NameError as error:
    print(f"NameError: {error}")
