"""The implementation's rank tables: by hand, by invariant, and by three independent oracles.

The oracles are other people's code and need no process: Megatron-Core's rank generator,
DeepSpeed's folding tables (which know no etp) and torchtitan's meshes (no etp either), which do
need a process group but take torch's fake one. torchtitan asks for many packages that have
nothing to do with ranks, so no extra of ours can name it; `make oracles` installs it without
them, and without it that one test is skipped.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fold_impl.layout import FOLD_AXES, FoldAxis, FoldLayout, LayoutError, divisors

# importing an oracle warns on its authors' account
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

untimed = settings(deadline=None)  # a busy machine is no failure
LANES_OF_2 = "01 23 45 67"
LANES_OF_4 = "0123 4567"
PAIRS = "04 15 26 37"

TABLES = [
    ((4, 2, 4, 1), "01 23", "02 13", "0123", "0 1 2 3", "0 1 2 3"),
    ((4, 4, 4, 1), "0123", "0 1 2 3", "0123", "0 1 2 3", "0 1 2 3"),
    ((8, 2, 4, 1), LANES_OF_2, "0246 1357", LANES_OF_4, PAIRS, "0 1 2 3 4 5 6 7"),
    ((8, 4, 4, 1), LANES_OF_4, PAIRS, LANES_OF_4, PAIRS, "0 1 2 3 4 5 6 7"),
    ((8, 4, 2, 1), LANES_OF_4, PAIRS, LANES_OF_2, "0246 1357", "0 1 2 3 4 5 6 7"),
    ((8, 2, 2, 2), LANES_OF_2, "0246 1357", "02 13 46 57", PAIRS, LANES_OF_2),
]
"""(world, tp, ep, etp), then the groups of tp, dp, ep, edp, etp, written by hand."""


def table(text: str) -> tuple[tuple[int, ...], ...]:
    """Read "01 23" as ((0, 1), (2, 3))."""
    return tuple(tuple(map(int, group)) for group in text.split())


def every_layout(*, with_etp: bool, largest_world: int = 64) -> Iterator[FoldLayout]:
    """Give every shape that tiles, up to the largest world."""
    for world in range(1, largest_world + 1):
        for tp in divisors(world):
            for etp in divisors(world) if with_etp else (1,):
                for ep in divisors(world // etp):
                    yield FoldLayout(world, tp, ep, etp)


def oracle(module: str) -> Any:
    """Import an oracle or skip with the reason."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"oracle {module} is not installed ({error}); `make oracles` does so")


@st.composite
def layouts(draw: st.DrawFn) -> FoldLayout:
    """Draw sizes first and the world from them, so that nothing is filtered."""
    small = st.integers(1, 4)
    ep, etp, pp = draw(small), draw(small), draw(st.integers(1, 2))
    stage = ep * etp * draw(small)
    tp = draw(st.sampled_from(divisors(stage)))
    return FoldLayout(stage * pp, tp, ep, etp, pp)


@pytest.mark.parametrize(("sizes", "tp", "dp", "ep", "edp", "etp"), TABLES)
def test_tables_equal_those_written_by_hand(
    sizes: tuple[int, int, int, int], tp: str, dp: str, ep: str, edp: str, etp: str
) -> None:
    """Lane fastest in the dense view; etp, then ep, then edp in the expert view."""
    layout = FoldLayout(*sizes)
    by_hand: dict[FoldAxis, str] = {"tp": tp, "dp": dp, "ep": ep, "edp": edp, "etp": etp}
    for axis, text in by_hand.items():
        assert layout.groups(axis) == table(text), axis


def test_stage_and_expert_model_are_blocks_of_neighbours() -> None:
    """World 16, pp 2, ep 2, etp 2: stages of eight, expert models of four."""
    layout = FoldLayout(16, tp_size=4, ep_size=2, etp_size=2, pp_size=2)
    assert layout.groups("stage") == (tuple(range(8)), tuple(range(8, 16)))
    assert layout.groups("expert_model") == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9, 10, 11),
        (12, 13, 14, 15),
    )
    assert layout.groups("edp")[4:6] == ((8, 12), (9, 13))


def test_tables_equal_megatrons_rank_generator() -> None:
    """Two generators: dense, and expert with tp := etp and dp := edp (order tp-ep-dp)."""
    generator = oracle("megatron.core.parallel_state").RankGenerator

    @functools.cache
    def ranks(tp: int, ep: int, dp: int, axes: str) -> list[tuple[int, ...]]:
        return sorted(map(tuple, generator(tp, ep, dp, 1, 1, "tp-cp-ep-dp-pp").get_ranks(axes)))

    for layout in every_layout(with_etp=True):
        dense = (layout.tp_size, 1, layout.dp_size)
        expert = (layout.etp_size, layout.ep_size, layout.edp_size)
        views: dict[FoldAxis, Any] = {
            "tp": ranks(*dense, "tp"),
            "dp": ranks(*dense, "dp"),
            "etp": ranks(*expert, "tp"),
            "ep": ranks(*expert, "ep"),
            "edp": ranks(*expert, "dp"),
            "expert_model": ranks(*expert, "tp-ep"),
        }
        for axis, groups in views.items():
            assert sorted(layout.groups(axis)) == groups, (layout, axis)


def test_tables_equal_deepspeeds_own_at_etp_1() -> None:
    """DeepSpeed derives the same groups from the same sizes."""
    folding = oracle("deepspeed.module_inject.auto_ep_folding")
    for layout in every_layout(with_etp=False):
        spec = folding.build_folding_spec(
            world_size=layout.world_size,
            pp_size=1,
            tp_size=layout.tp_size,
            ep_size=layout.ep_size,
        )
        expected = folding.expected_folding_group_tables(spec)
        assert layout.groups("tp") == expected.tp_groups, layout
        assert layout.groups("dp") == expected.dense_dp_groups, layout
        assert layout.groups("ep") == expected.ep_groups, layout
        assert layout.groups("edp") == expected.edp_groups, layout


@pytest.fixture
def torchtitan_meshes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give (layout) -> torchtitan's global meshes, on torch's fake process group."""
    dims = oracle("torchtitan.distributed.parallel_dims")
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist = importlib.import_module("torch.distributed")
    monkeypatch.setattr(dims, "device_type", "cpu")

    def meshes(layout: FoldLayout) -> dict[str, Any]:
        if dist.is_initialized():
            dist.destroy_process_group()
        store = fake.FakeStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=layout.world_size)
        tp, ep = layout.tp_size, layout.ep_size
        built = dims.ParallelDims(1, layout.dp_size, 1, tp, 1, ep, layout.world_size)
        built.build_mesh()
        return dict(built._global_meshes)

    yield meshes
    if dist.is_initialized():
        dist.destroy_process_group()


def test_tables_equal_torchtitans_meshes_at_etp_1(torchtitan_meshes: Any) -> None:
    """Its dense mesh has tp as the fastest axis, its sparse mesh ep, over the same ranks.

    Up to 24 ranks; to 64, which agreed too, its meshes take a minute to build.
    """
    for layout in every_layout(with_etp=False, largest_world=24):
        meshes = torchtitan_meshes(layout)
        dense = meshes["dense"].mesh.reshape(layout.dp_size, layout.tp_size)
        sparse = meshes["sparse"].mesh.reshape(layout.edp_size, layout.ep_size)
        views: dict[FoldAxis, Any] = {
            "tp": dense,
            "dp": dense.T,
            "ep": sparse,
            "edp": sparse.T,
        }
        for axis, mesh in views.items():
            assert layout.groups(axis) == tuple(map(tuple, mesh.tolist())), (layout, axis)


@untimed
@given(layouts())
def test_every_rank_is_in_exactly_one_group_per_axis(layout: FoldLayout) -> None:
    """The groups of an axis partition the world into equal parts."""
    for axis in FOLD_AXES:
        groups = layout.groups(axis)
        assert sorted(r for group in groups for r in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {layout.strided(axis).size}


@untimed
@given(layouts())
def test_both_views_count_the_same_ranks(layout: FoldLayout) -> None:
    """tp * dp == ep * etp * edp == stage size, pp times that the world."""
    assert layout.tp_size * layout.dp_size == layout.stage_size
    assert layout.ep_size * layout.etp_size * layout.edp_size == layout.stage_size
    assert layout.stage_size * layout.pp_size == layout.world_size


@untimed
@given(layouts())
def test_tables_are_invertible(layout: FoldLayout) -> None:
    """A rank stands in `group_of` at `rank_in`, and that group is the table's."""
    for axis in FOLD_AXES:
        for group in layout.groups(axis):
            for place, rank in enumerate(group):
                assert layout.rank_in(axis, rank) == place
                assert layout.group_of(axis, rank) == group


@untimed
@given(layouts())
def test_a_dense_and_an_expert_coordinate_each_name_one_rank(layout: FoldLayout) -> None:
    """Within a stage (tp, dp) and (ep, etp, edp) are both complete addresses."""
    views: tuple[tuple[FoldAxis, ...], ...] = (("tp", "dp"), ("ep", "etp", "edp"))
    for view in views:
        addresses = {
            tuple(layout.rank_in(axis, rank) for axis in view) for rank in range(layout.stage_size)
        }
        assert len(addresses) == layout.stage_size


@pytest.mark.parametrize(
    ("sizes", "key", "value", "allowed"),
    [
        ((8, 3), "tp_size", 3, (1, 2, 4, 8)),
        ((8, 2, 3), "ep_size", 3, (1, 2, 4, 8)),
        ((12, 2, 4, 2), "ep_size", 4, (1, 2, 3, 6)),
        ((12, 1, 1, 5), "etp_size", 5, (1, 2, 3, 4, 6, 12)),
        ((9, 1, 1, 1, 2), "pp_size", 2, (1, 3, 9)),
        ((0,), "world_size", 0, "1, 2, 3, ..."),
        ((8, True), "tp_size", True, "1, 2, 3, ..."),
        ((8, 2.0), "tp_size", 2.0, "1, 2, 3, ..."),
    ],
)
def test_sizes_that_do_not_tile_are_refused_with_what_would(
    sizes: tuple[Any, ...], key: str, value: object, allowed: object
) -> None:
    """The error names the size, what was given, and every value that would do."""
    with pytest.raises(LayoutError) as caught:
        FoldLayout(*sizes)
    error = caught.value
    assert (error.key, error.value, error.allowed) == (key, value, allowed)
    assert f"{key} = {value!r}" in str(error)


def test_sizes_that_are_not_given_are_one() -> None:
    """A world alone is data parallel, in both views."""
    layout = FoldLayout(6)
    assert (layout.tp_size, layout.ep_size, layout.etp_size, layout.pp_size) == (1, 1, 1, 1)
    assert (layout.dp_size, layout.edp_size, layout.stage_size) == (6, 6, 6)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((9, 1, 1, 1, 2), "pp_size = 2: does not tile the world of 9 ranks; allowed: 1, 3, 9"),
        ((8, 2, 3), "ep_size = 3: does not tile the stage of 8 ranks; allowed: 1, 2, 4, 8"),
        (
            (12, 2, 4, 2),
            "ep_size = 4: does not tile the stage of 12 ranks beside etp 2; allowed: 1, 2, 3, 6",
        ),
        ((6, 4), "tp_size = 4: does not tile the stage of 6 ranks; allowed: 1, 2, 3, 6"),
        ((12, 4, 1, 1, 2), "tp_size = 4: does not tile the stage of 6 ranks; allowed: 1, 2, 3, 6"),
        ((12, 1, 1, 4, 2), "etp_size = 4: does not tile the stage of 6 ranks; allowed: 1, 2, 3, 6"),
        ((12, 1, 4, 1, 2), "ep_size = 4: does not tile the stage of 6 ranks; allowed: 1, 2, 3, 6"),
        ((4, -1), "tp_size = -1: not a positive integer; allowed: 1, 2, 3, ..."),
    ],
)
def test_a_refusal_reads_as_a_sentence(sizes: tuple[Any, ...], text: str) -> None:
    """Which size, what of it is wrong, beside what, and what would do."""
    with pytest.raises(LayoutError) as caught:
        FoldLayout(*sizes)
    assert str(caught.value) == text


def test_unknown_axis_and_rank_are_refused() -> None:
    """A typing slip must not read as an empty table."""
    with pytest.raises(LayoutError) as caught:
        FoldLayout(4).groups("cp")  # type: ignore[arg-type]
    axes = "tp, dp, ep, etp, edp, stage, expert_model"
    assert str(caught.value) == f"axis = 'cp': no such axis; allowed: {axes}"
    for rank in (4, -1):
        with pytest.raises(LayoutError, match=f"rank = {rank}: no such rank; allowed: 0 to 3"):
            FoldLayout(4).rank_in("tp", rank)
