"""On every path every parameter is reduced once a step, seen on the process groups themselves.

Every parameter's gradient is one odd number of its own on every rank and micro-batch. What passes a
collective - summed, averaged, times tp, whatever power of two - still tells by its odd part whose
gradient it is, so that the elements of each parameter can be counted in what torch.distributed is
given, group by group.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl.config import FoldConfig
from fold_impl.engine import build_engine
from fold_impl.families import FoldedParameter
from parity import case, models
from parity.gang import GangPool
from parity.rank import RankRuntime

SPEC = case.Model(
    layers=1, hidden=48, heads=4, mlp_width=8, vocab=8, experts=4, expert_width=4,
    shared_width=4, biases=True,
)  # fmt: skip
SHAPE = {"tp": 2, "ep": 2, "etp": 1}
WORLD, GAS = 4, 2
LARGE = 1 << 20
DEADLINE_S = 120.0


class Path(NamedTuple):
    """One way through DeepSpeed's accumulation and reduction, or through the native engine."""

    zero: int | None
    dtype: str = "float32"
    accumulated: str | None = None
    overlap: bool = False
    bucket: int = LARGE
    coalesce: bool = False
    loop: str = "steps"
    """steps; boundary (set by hand, one step); no_sync; tiled (backward inside backward); twice."""

    @property
    def reductions(self) -> int:
        """Times a parameter is reduced in a step: ZeRO-2 keeps pieces, so every micro-batch."""
        return GAS if self.zero == 2 and not self.coalesce else 1


PATHS = {
    "native": Path(None),
    "zero-0": Path(0),
    "zero-0-bf16": Path(0, "bfloat16"),
    "zero-0-fp16": Path(0, "float16"),
    "zero-0-boundary": Path(0, loop="boundary"),
    "zero-0-no-sync": Path(0, loop="no_sync"),
    "zero-1": Path(1),
    "zero-1-overlap": Path(1, overlap=True),
    "zero-1-bucket": Path(1, bucket=97),
    "zero-1-coalesce": Path(1, coalesce=True),
    "zero-1-overlap-coalesce": Path(1, overlap=True, coalesce=True),
    "zero-1-boundary": Path(1, loop="boundary"),
    "zero-1-no-sync": Path(1, loop="no_sync"),
    "zero-1-tiled": Path(1, loop="tiled"),
    "zero-1-bf16": Path(1, "bfloat16"),
    "zero-1-bf16-fp32": Path(1, "bfloat16", "fp32"),
    "zero-1-fp16-fp32": Path(1, "float16", "fp32"),
    "zero-2": Path(2),
    "zero-2-overlap": Path(2, overlap=True),
    "zero-2-bucket": Path(2, bucket=97, overlap=True),
    "zero-2-coalesce": Path(2, coalesce=True),
    "zero-2-boundary": Path(2, loop="boundary"),
    "zero-2-tiled": Path(2, loop="tiled"),
    "zero-2-bf16-fp32": Path(2, "bfloat16", "fp32"),
    "zero-2-fp16": Path(2, "float16"),
}
FAMILIES = {
    "router", "layernorm", "dense", "attention", "embedding", "expert", "shared_expert"
}  # fmt: skip


# --- in the ranks --------------------------------------------------------------------------------


def config(path: Path) -> FoldConfig:
    """Write the config of a path."""
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "tensor_parallel": {"autotp_size": SHAPE["tp"]},
        "expert_parallel": {"enabled": True, "autoep_size": SHAPE["ep"]},
        "folding": {"engine": "native", "preset": models.preset(SPEC)},
    }
    if path.zero is not None:
        written["folding"] |= {"engine": "deepspeed", "coalesce_grad_reduction": path.coalesce}
        written["zero_optimization"] = {
            "stage": path.zero, "overlap_comm": path.overlap, "reduce_bucket_size": path.bucket,
        }  # fmt: skip
        written["data_types"] = {"grad_accum_dtype": path.accumulated}
    if path.dtype == "bfloat16":
        written["bf16"] = {"enabled": True}
    if path.dtype == "float16":
        written["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return FoldConfig.from_dict(written, WORLD)


class Told(NamedTuple):
    """One collective as torch.distributed was given it: ranks of its group, odd parts counted."""

    ranks: tuple[int, ...]
    odd: Counter[int]
    numel: int


@contextlib.contextmanager
def overheard() -> Iterator[list[Told]]:
    """Record what is given to the collectives that reduce."""
    told: list[Told] = []
    names = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_reduce_coalesced")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def listening(name: str) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(originals[name]).bind(*args, **kwargs).arguments
            tensors = next(given[key] for key in ("input", "tensors", "tensor") if key in given)
            ranks = tuple(dist.get_process_group_ranks(given.get("group") or dist.group.WORLD))
            for tensor in tensors if isinstance(tensors, list) else [tensors]:
                told.append(Told(ranks, odd_parts(tensor), tensor.numel()))
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, listening(name))
    try:
        yield told
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def odd_parts(tensor: Tensor) -> Counter[int]:
    """Count entries by |entry| without its power of two, where that is a small odd number."""
    values, counts = tensor.detach().double().abs().unique(return_counts=True)
    found: Counter[int] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value == 0.0 or value > 1e9:
            continue
        while value != int(value):
            value *= 2
        while value % 2 == 0:
            value /= 2
        found[int(value)] += count
    return found


class Tiles(torch.autograd.Function):
    """Run the backward of two halves inside backward, as tiled computations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, engine: Any, numbers: dict[str, int]) -> Tensor:
        """Remember what to run."""
        ctx.engine, ctx.numbers = engine, numbers
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Run it, and say of the first half that more is to come."""
        (gradient,) = gradients
        for ready in (False, True):
            for member in ctx.engine.folded_parameters:
                member.parameter.ds_grad_is_ready = ready
            with torch.enable_grad():
                half = marked(ctx.engine, ctx.numbers) / 2
            torch.autograd.backward(half, gradient.to(half.dtype))
        return None, None, None


def marked(engine: Any, numbers: dict[str, int]) -> Tensor:
    """Give a loss whose gradient is the parameter's own number everywhere."""
    total = torch.zeros(())
    for member in engine.folded_parameters:
        total = total + numbers[member.name] * member.parameter.sum()
    return total


def step_once(engine: Any, numbers: dict[str, int], loop: str) -> None:
    """Run the micro-batches of one step in the manner of a trainer."""
    engine.module.forward = lambda: marked(engine, numbers)
    if loop == "tiled":
        one = torch.ones((), requires_grad=True)
        engine.module.forward = lambda: Tiles.apply(one, engine, numbers)
    for index in range(GAS):
        last = index == GAS - 1
        if loop in ("boundary", "no_sync"):
            engine.set_gradient_accumulation_boundary(last)
        quiet = engine.no_sync() if loop == "no_sync" and not last else contextlib.nullcontext()
        with quiet:
            engine.backward(engine())
        if loop == "twice" and last:
            engine.allreduce_gradients()
        if last or loop not in ("boundary", "no_sync"):
            engine.step()


REPLICAS = {"expert": "edp"}


def cut_or_not(member: FoldedParameter) -> str:
    """Name the ranks that hold the same part of a dense parameter."""
    return "dp" if member.placement.shards else "stage"


class Seen(NamedTuple):
    """What one rank reports of one step."""

    told: list[Told]
    numbers: dict[str, int]
    families: dict[str, str]
    numels: dict[str, int]
    replicas: dict[str, tuple[int, ...]]
    norm: float


def count(runtime: RankRuntime, order: tuple[Path, int]) -> Seen:
    """Run two steps on a path and listen to the second."""
    path, layers = order
    spec = SPEC.model_copy(update={"layers": layers})
    model = models.build(spec, 0, idle_expert=True).to(getattr(torch, path.dtype))
    engine = build_engine(model, config(path), runtime.rank, new_group=runtime.new_group)
    groups = engine.groups
    members = engine.folded_parameters
    numbers = {m.name: 2 * i + 1 for i, m in enumerate(members)}
    step_once(engine, numbers, path.loop)
    with overheard() as told:
        step_once(engine, numbers, path.loop)
    norm = engine.get_global_grad_norm()
    if path.zero is not None:
        engine.close()
    return Seen(
        [Told(t.ranks, t.odd, t.numel) for t in told],
        numbers,
        {m.name: m.family for m in members},
        {m.name: m.parameter.numel() for m in members},
        {m.name: getattr(groups, REPLICAS.get(m.family, cut_or_not(m))).ranks for m in members},
        norm,
    )


# --- in the test ---------------------------------------------------------------------------------


def counted(seen: Seen, name: str) -> dict[tuple[int, ...], int]:
    """Group -> elements of one parameter that were given to its reductions."""
    found: Counter[tuple[int, ...]] = Counter()
    for told in seen.told:
        if told.numel > 1:  # the norm is one number
            found[told.ranks] += told.odd[seen.numbers[name]]
    return {ranks: count for ranks, count in found.items() if count}


@pytest.mark.parametrize("name", PATHS)
def test_every_parameter_is_reduced_once_over_its_replicas(
    deepspeed_ranks: GangPool, name: str
) -> None:
    """World 4, tp 2, ep 2: numel elements over stage, dp or edp, and none over another group.

    ZeRO-2 without coalescing reduces every micro-batch once.
    """
    path = PATHS[name]
    task = "tests.fold_impl.test_exactly_once:count"
    results = deepspeed_ranks.run(WORLD, task, [(path, 1)] * WORLD, DEADLINE_S)
    for seen in results:
        assert set(seen.families.values()) == FAMILIES
        for parameter, numel in seen.numels.items():
            expected = {seen.replicas[parameter]: path.reductions * numel}
            assert counted(seen, parameter) == expected, parameter


@pytest.mark.parametrize("name", PATHS)
def test_the_norm_of_numbered_gradients_is_that_of_the_whole_model(
    deepspeed_ranks: GangPool, name: str
) -> None:
    """sqrt(sum n^2 number^2) over the full model: what is reduced is also neither scaled nor lost.

    Every rank's local gradient is the number; the lane mean of an expert's is 1/tp of the sum over
    lanes of what its tp * dp / edp sources give: hand-made gradients lack the restore's factor tp.
    """
    path = PATHS[name]
    task = "tests.fold_impl.test_exactly_once:count"
    results = deepspeed_ranks.run(WORLD, task, [(path, 1)] * WORLD, DEADLINE_S)
    square = 0.0
    for parameter, number in results[0].numbers.items():
        replicas = len(results[0].replicas[parameter])
        family = results[0].families[parameter]
        # the sum over replicas is divided by dp (2), and for experts and replicated ones by tp (2)
        divisor = 2 if family != "expert" and replicas == 2 else 4
        entry = number * replicas / divisor
        copies = WORLD / replicas
        square += copies * results[0].numels[parameter] * entry**2
    bound = 1e-6 if path.dtype == "float32" else 1e-2
    for seen in results:
        assert seen.norm == pytest.approx(square**0.5, rel=bound)


@pytest.mark.parametrize(
    "name", ["native", "zero-0", "zero-0-bf16", "zero-1", "zero-1-bf16-fp32", "zero-2"]
)
def test_collectives_do_not_grow_with_the_number_of_parameters(
    deepspeed_ranks: GangPool, name: str
) -> None:
    """One layer or three in large buckets: the same number of reductions in a step."""
    task = "tests.fold_impl.test_exactly_once:count"
    counts = []
    for layers in (1, 3):
        orders = [(PATHS[name], layers)] * WORLD
        results = deepspeed_ranks.run(WORLD, task, orders, DEADLINE_S)
        counts.append([len(seen.told) for seen in results])
    assert counts[0] == counts[1]


def test_a_second_reduction_is_seen(deepspeed_ranks: GangPool) -> None:
    """Reducing by hand once more shows as twice the elements of every parameter."""
    path = Path(0, loop="twice")
    task = "tests.fold_impl.test_exactly_once:count"
    for seen in deepspeed_ranks.run(WORLD, task, [(path, 1)] * WORLD, DEADLINE_S):
        for parameter, numel in seen.numels.items():
            assert counted(seen, parameter) == {seen.replicas[parameter]: 2 * numel}


def test_entries_are_told_by_their_odd_part() -> None:
    """6 = 2 * 3, 0.75 = 3 / 4, 5; zeros are padding."""
    assert odd_parts(torch.tensor([6.0, 0.75, 0.0, 5.0])) == {3: 2, 5: 1}
