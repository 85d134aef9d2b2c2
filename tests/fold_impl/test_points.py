"""The table of planted transformations."""

from __future__ import annotations

import pytest

from fold_impl.points import POINTS, Points


def test_a_point_without_a_transformation_passes_its_value_on() -> None:
    """The same object, context or not."""
    value = object()
    assert Points()("router.logits", value, layer=3) is value


def test_transformations_run_in_the_order_they_were_planted() -> None:
    """Plus one, then times ten; at another point nothing happens."""
    points = Points()
    points.plant("router.logits", lambda x, **_: x + 1)
    points.plant("router.logits", lambda x, **_: 10 * x)
    assert points("router.logits", 1, layer=0) == 20
    assert points("router.weights", 1, layer=0) == 1


def test_a_transformation_is_given_the_context_of_its_point() -> None:
    """It can act on one layer only."""
    points = Points()
    points.plant("moe.entered", lambda x, layer: -x if layer == 1 else x)
    assert [points("moe.entered", 5, layer=layer) for layer in (0, 1)] == [5, -5]


def test_an_unknown_point_is_refused_with_the_list_of_points() -> None:
    """A fault planted nowhere would be a fault survived."""
    with pytest.raises(KeyError, match=r"no point 'router\.logit'; there are: .*router\.logits"):
        Points().plant("router.logit", lambda x: x)


def test_every_point_says_what_passes_there() -> None:
    """Names are dotted, descriptions are not empty."""
    assert all("." in name and text for name, text in POINTS.items())
