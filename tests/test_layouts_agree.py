"""The two halves derive the rank tables apart; here, and only here, they meet."""

from __future__ import annotations

from fold_impl.layout import FoldLayout, divisors
from parity.layout import AXES, Layout

LARGEST_WORLD = 36


def test_both_derivations_agree_on_every_shape_that_tiles() -> None:
    """Same groups in the same order, same derived sizes, with and without pipeline stages."""
    shapes = 0
    for world in range(1, LARGEST_WORLD + 1):
        for pp in (p for p in (1, 2, 3) if world % p == 0):
            for tp in divisors(world // pp):
                for etp in divisors(world // pp):
                    for ep in divisors(world // pp // etp):
                        ours = FoldLayout(world, tp, ep, etp, pp)
                        theirs = Layout(world=world, tp=tp, ep=ep, etp=etp, pp=pp)
                        assert (ours.dp_size, ours.edp_size) == (theirs.dp, theirs.edp)
                        for axis in AXES:
                            assert ours.groups(axis) == theirs.groups(axis), (ours, axis)
                        shapes += 1
    assert shapes > 1000  # the loops above did run
