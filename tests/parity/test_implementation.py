"""How an implementation is found, and what it must offer."""

from __future__ import annotations

from typing import Any

import pytest

from parity import registry
from parity.errors import UsageError
from parity.implementation import (
    OPTIONAL,
    REQUIRED,
    Implementation,
    Placement,
    Refusal,
    Shard,
    find,
)

COMPLETE: Any = type("Complete", (), dict.fromkeys(REQUIRED, lambda *_: None))
LACKING: Any = type("Lacking", (), {n: max for n in REQUIRED if n != "routing"})
OBJECT = COMPLETE()
HERE = "tests.parity.test_implementation"


def test_a_registered_name_gives_a_factory() -> None:
    """fold_impl is registered by this package's own entry point; each call makes another one."""
    factory = find("fold_impl")
    first, second = factory(), factory()
    assert isinstance(first, Implementation)
    assert first is not second


def test_a_class_is_made_anew_and_an_object_given_as_it_is() -> None:
    """`module:attr` may name either."""
    assert isinstance(find(f"{HERE}:COMPLETE")(), COMPLETE)
    assert isinstance(find(f"{HERE}:OBJECT")(), COMPLETE)
    assert find(f"{HERE}:OBJECT")() is find(f"{HERE}:OBJECT")()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fold_imp", r"'fold_imp'.*; allowed: .*fold_impl.*, module:attr"),
        ("no.such.module:X", "No module named 'no'"),
        (f"{HERE}:Missing", "has no attribute 'Missing'"),
        (f"{HERE}:LACKING", "lacks routing"),
    ],
)
def test_what_cannot_be_found_is_a_usage_error_that_says_why(name: str, words: str) -> None:
    """Unknown name, module or attribute, or a member missing."""
    with pytest.raises(UsageError, match=words):
        find(name)


def test_a_checkout_on_the_path_alone_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come from the installed package's metadata: without them no name is allowed at all."""
    monkeypatch.setattr(registry, "registered", dict)
    with pytest.raises(UsageError, match=r"allowed: module:attr; .* pip install -e"):
        find("fold_impl")


def test_optional_members_are_not_asked_for() -> None:
    """An implementation without replay, taps, fault points, save and load is one."""
    assert not any(hasattr(COMPLETE, name) for name in OPTIONAL)
    assert isinstance(COMPLETE(), Implementation)
    assert not isinstance(LACKING(), Implementation)


def test_a_refusal_is_known_by_its_attribute() -> None:
    """Any exception with a true `refusal` counts, so no import is needed."""
    assert Refusal.refusal is True


def test_placements_compare_by_value() -> None:
    """Ranks are held to equal placements: family, axis, dimension, segments."""
    one = Placement("expert", (Shard("ep", 0), Shard("etp", 1, 2)))
    assert one == Placement("expert", (Shard("ep", 0), Shard("etp", 1, 2)))
    assert one != Placement("expert", (Shard("ep", 0), Shard("etp", 1)))
    assert hash(one) == hash(Placement("expert", one.shards))
