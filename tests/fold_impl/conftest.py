"""Ranks with DeepSpeed, shared by the tests that need them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parity import gang, warm


@pytest.fixture(scope="session")
def deepspeed_ranks() -> Iterator[gang.GangPool]:
    """Give a pool whose ranks inherit an imported DeepSpeed."""
    preload = warm.preload("fold_impl", {"deepspeed"})
    with gang.GangPool(preload, max_live_ranks=8) as pool:
        yield pool
