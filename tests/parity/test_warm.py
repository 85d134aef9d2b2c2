"""What ranks inherit: named by implementation, engines and models; never a reason not to start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from parity import warm
from parity.case import Model
from parity.gang import GangPool
from parity.rank import RankRuntime

DEEPSPEED, MODELS = "parity.warm:deepspeed", "parity.warm:hugging_face"


def loaded(runtime: RankRuntime, modules: Sequence[str]) -> list[str]:
    """Name those of the modules that this rank has; this file imports none of them."""
    return [name for name in modules if name in sys.modules]


def test_ranks_inherit_the_implementation() -> None:
    """Imported by each rank of each gang, it was a tenth of what the ranks of a suite computed."""
    modules = ["fold_impl.adapter", "parity.trial", "no_such_module"]
    with GangPool(warm.preload("fold_impl", {"native", "tiny"}), max_live_ranks=2) as pool:
        assert pool.run(2, f"{__name__}:loaded", [modules] * 2, 60) == [modules[:2]] * 2


@pytest.mark.parametrize(
    ("implementation", "uses", "expected"),
    [
        ("fold_impl", ("native", "tiny"), ["parity.warm:fold_impl_adapter"]),
        ("fold_impl", ("deepspeed", "tiny"), [DEEPSPEED, "parity.warm:fold_impl_adapter"]),
        ("fold_impl", ("native", "mixtral"), [MODELS, "parity.warm:fold_impl_adapter"]),
        ("deepspeed", ("mixtral",), [DEEPSPEED, MODELS, "parity.warm:deepspeed_adapter"]),
        ("megatron_core", ("tiny",), ["parity.warm:megatron_core_adapter"]),
        ("theirs:Trainer", ("native", "tiny"), []),
    ],
)
def test_preload_is_what_the_cases_use(
    implementation: str, uses: Sequence[str], expected: list[str]
) -> None:
    """Nothing that no case needs, and no foreign module: its threads would not survive the fork."""
    names = warm.preload(implementation, uses)
    assert list(names[len(warm.COMMON) :]) == expected
    for name in expected:
        assert callable(getattr(warm, name.partition(":")[2]))


def test_every_model_a_case_may_name_is_inherited() -> None:
    """The tiny one needs nothing beside torch."""
    assert {"tiny", *warm.MODELS} == {*get_args(Model.model_fields["name"].annotation)}


def test_a_broken_module_is_left_to_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that does not compile, or is not there, costs the run nothing before its cases."""
    (tmp_path / "fold_impl_broken.py").write_text("def half(:\n")
    (tmp_path / "fold_impl_whole.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    warm._inherit("fold_impl_broken", "no_such_module", "fold_impl_whole")
    assert "fold_impl_broken" not in sys.modules
    assert sys.modules.pop("fold_impl_whole")
