"""Checkpoints of DeepSpeed's engine: resumed, resharded, at another stage, from and to native."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fold_impl import archive
from fold_impl.archive import CheckpointError
from fold_impl.config import FoldConfig
from fold_impl.engine import build_engine
from parity import models
from parity.gang import GangPool
from parity.rank import RankRuntime
from tests.fold_impl.test_checkpoint import everything
from tests.fold_impl.test_zero import BF16, DEADLINE_S, FP32_SUM, SPEC, ZERO, written

# `deepspeed` warns on its own account when it is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:deepspeed.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]

ROOT = Path(__file__).parents[2]
HERE = "tests.fold_impl.test_zero_checkpoint"
MICRO_BATCHES = 4
"""Micro-batches of one step over all dp ranks, whatever the layout: each has its own length."""
STEPS, HALF = 10, 5
SGD = {"type": "SGD", "params": {"lr": 0.1}}
MOMENTUM = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
ADAM = {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-3, "adam_w_mode": False}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01}}
GROWING = {"enabled": True, "loss_scale": 0, "initial_scale_power": 6, "loss_scale_window": 2}
"""Doubles after steps 3, 5, 7 and 9."""
FP16 = {"fp16": GROWING}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8}}}


# --- jobs: they run in the ranks -----------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One engine: what it is, what it loads, the steps it runs, what it saves."""

    fold: tuple[int, int, int, int]
    """World, tp, ep, etp."""
    stage: int | None = 1
    """None: the native engine."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=lambda: ADAMW)
    source: Path | None = None
    reshard: bool = False
    module_only: bool = False
    steps: tuple[int, int] = (1, STEPS)
    """First and last."""
    target: Path | None = None
    """Saved to after step `HALF`; a loaded one at once, unchanged, as `as-loaded` too."""
    schedule: bool = False
    frozen: tuple[str, ...] = ()
    """Weights that are not trained."""
    fault: str | None = None
    """Planted at `checkpoint.part`."""


Kept = dict[str, Any]


@dataclass
class Done:
    """What one rank reports."""

    losses: list[float]
    kept: Kept
    """As loaded, or as saved."""
    end: Kept
    notes: list[str]
    refusal: str
    rates: list[float]


def config(job: Job) -> FoldConfig:
    """Write the config of a job."""
    world, tp, ep, etp = job.fold
    sections = dict(job.sections)
    given = written(tp, ep, etp, optimizer=job.optimizer, gradient_clipping=0.5, **sections)
    given["train_micro_batch_size_per_gpu"] = 1
    given["gradient_accumulation_steps"] = MICRO_BATCHES // (world // tp)
    if job.stage is None:
        given["folding"]["engine"] = "native"
    else:
        given[ZERO] = {"stage": job.stage}
    return FoldConfig.from_dict(given, world)


def build(job: Job, runtime: RankRuntime) -> Any:
    """Make an engine; one that loads begins with other weights."""
    model = models.build(SPEC, 0 if job.source is None else 9, idle_expert=True).float()
    for name in job.frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer, schedule = None, None
    if job.schedule:
        named = dict(model.named_parameters())
        router = [weight for name, weight in named.items() if "router" in name]
        rest = [weight for name, weight in named.items() if "router" not in name]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": router, "lr": 0.03}]
        optimizer, schedule = torch.optim.AdamW(groups, lr=0.01, eps=1e-3), halving
    return build_engine(
        model, config(job), runtime.rank, optimizer,
        new_group=runtime.new_group, lr_scheduler=schedule,
    )  # fmt: skip


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Halve both learning rates after steps 2 and 6."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 6], gamma=0.5)


def batch(step: int, number: int) -> dict[str, Any]:
    """Draw a micro-batch of 3 to 6 tokens."""
    generator = torch.Generator().manual_seed(100 * step + number)
    ids, labels = torch.randint(8, (2, 1, 3 + number), generator=generator)
    return {"input_ids": ids, "labels": labels, "loss_scale": 0.2}


def train(engine: Any, first: int, last: int) -> list[float]:
    """Run steps; give this dp rank's part of each step's loss."""
    layout, losses = engine.groups.layout, []
    gas, dp = engine.gradient_accumulation_steps(), layout.rank_in("dp", engine.groups.rank)
    for step in range(first, last + 1):
        total = 0.0
        for number in range(dp * gas, (dp + 1) * gas):
            loss = engine(**batch(step, number))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / MICRO_BATCHES
        losses.append(total)
    return losses


def snapshot(engine: Any) -> Kept:
    """Copy everything a checkpoint restores on this rank, as bytes where it is a tensor."""

    def copied(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        array = value.detach().cpu().numpy()
        return (str(value.dtype), array.shape, array.tobytes())

    return {
        "weights": {name: copied(t) for name, t in engine.master_weights().items()},
        "model": {name: copied(t.detach().float()) for name, t in engine.module.named_parameters()},
        "optimizer": {
            name: {key: copied(value) for key, value in entries.items()}
            for name, entries in engine.optimizer_state().items()
        },
        "training": json.loads(json.dumps(engine.training_state())),
    }


def lose_state(value: Tensor, *, state: str | None, **_: Any) -> Tensor:
    """Plant: momenta do not come back."""
    return torch.zeros_like(value) if state == "exp_avg" else value


def roll_experts(value: Tensor, *, family: str, state: str | None, **_: Any) -> Tensor:
    """Plant: an expert gets the second moments of its neighbour."""
    return value.roll(1, 0) if family == "expert" and state == "exp_avg_sq" else value


FAULTS: Mapping[str, Callable[..., Tensor]] = {"lost": lose_state, "rolled": roll_experts}


def run(runtime: RankRuntime, job: Job) -> Done:
    """Do a job."""
    engine = build(job, runtime)
    if job.fault is not None:
        engine.points.plant("checkpoint.part", FAULTS[job.fault])
    kept, notes, refusal, losses = {}, [], "", []
    first, last = job.steps
    if job.source is not None:
        before = snapshot(engine)
        try:
            loaded = checkpoint_of(engine, job)
            notes = list(loaded.notes)
        except CheckpointError as error:
            refusal = str(error)
            assert snapshot(engine) == before, "a refused load has touched the engine"
        kept = snapshot(engine)
        if job.target is not None:
            engine.save_checkpoint(job.target, tag="as-loaded")
    if refusal == "":
        middle = HALF if job.source is None else last
        losses = train(engine, first, middle)
        if job.target is not None:
            engine.save_checkpoint(job.target)
        if job.source is None:
            kept = snapshot(engine)
            losses += train(engine, middle + 1, last)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    done = Done(losses, kept, snapshot(engine), notes, refusal, rates)
    if job.stage is not None:
        engine.close()
    return done


def checkpoint_of(engine: Any, job: Job) -> Any:
    """Load what a job begins from."""
    from fold_impl import checkpoint

    assert job.source is not None
    return checkpoint.load(engine, job.source, reshard=job.reshard, module_only=job.module_only)


# --- in the test ---------------------------------------------------------------------------------


def do(ranks: GangPool, job: Job) -> list[Done]:
    """Run a job on its world."""
    world = job.fold[0]
    done: list[Done] = ranks.run(world, f"{HERE}:run", [job] * world, DEADLINE_S)
    return done


def curve(job: Job, done: Sequence[Done]) -> list[float]:
    """Add up the dp ranks' parts of the losses, each lane's being the same."""
    return [sum(values) for values in zip(*(d.losses for d in done[:: job.fold[1]]), strict=True)]


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare full tensors bit for bit."""
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        same = actual[key].numpy().tobytes() == tensor.numpy().tobytes()
        assert same, key


W4 = (4, 2, 4, 1)
KINDS: dict[str, Job] = {
    "z0-sgd": Job(W4, 0, optimizer=SGD),
    "z0-adamw": Job(W4, 0),
    "z1-momentum": Job(W4, 1, optimizer=MOMENTUM),
    "z1-adam": Job(W4, 1, optimizer=ADAM),
    "z2-adamw": Job(W4, 2),
    "z0-bf16": Job(W4, 0, BF16),
    "z1-bf16": Job(W4, 1, BF16, MOMENTUM),
    "z1-bf16-fp32": Job(W4, 1, {**BF16, **FP32_SUM}),
    "z2-bf16-fp32": Job(W4, 2, {**BF16, **FP32_SUM}),
    "z0-fp16": Job(W4, 0, FP16),
    "z1-fp16": Job(W4, 1, FP16),
    "z2-fp16": Job(W4, 2, FP16, SGD),
    "z1-warmup": Job(W4, 1, WARM_UP, MOMENTUM),
    "z2-bf16-frozen": Job(W4, 2, BF16, frozen=("embedding.weight", "layers.0.moe.experts.w1")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(
    deepspeed_ranks: GangPool, tmp_path: Path, kind: str
) -> None:
    """Masters, optimizer state, counters and loss scale come back; so do the five steps after."""
    job = KINDS[kind]
    saved = do(deepspeed_ranks, replace(job, target=tmp_path))
    resumed = do(deepspeed_ranks, replace(job, source=tmp_path, steps=(HALF + 1, STEPS)))
    for one, other in zip(saved, resumed, strict=True):
        assert other.refusal == ""
        assert other.kept == one.kept
        assert other.losses == one.losses[HALF:]
        assert other.end == one.end
        assert other.rates == one.rates
        assert one.kept["training"]["global_steps"] == HALF
        scale = one.kept["training"]["loss_scale"]
        assert (scale is not None) == ("fp16" in kind)
        assert scale is None or (scale["cur_scale"], scale["cur_iter"]) == (256.0, 5)


def reference_curve() -> list[float]:
    """Train the model itself in float64, neither folded nor wrapped, with torch alone."""
    model = models.build(SPEC, 0, idle_expert=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.01)
    losses = []
    for step in range(1, STEPS + 1):
        micro = [model(**batch(step, n)) / MICRO_BATCHES for n in range(MICRO_BATCHES)]
        optimizer.zero_grad()
        sum(micro).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(sum(micro).detach()))
    return losses


def assert_close(actual: Sequence[float], expected: Sequence[float]) -> None:
    """Allow what a float32 run of ten steps may be away from float64."""
    for step, (one, other) in enumerate(zip(actual, expected, strict=True), start=1):
        assert abs(one / other - 1) <= 3e-6, f"step {step}: {one} against {other}"


CHAINS: dict[str, tuple[Job, ...]] = {
    "stages": (Job(W4, 1), Job((2, 1, 2, 1), 2), Job((4, 4, 2, 1), 0)),
    "native-zero": (Job((4, 2, 2, 1), None), Job((4, 2, 2, 2), 2), Job((1, 1, 1, 1), None)),
    "zero-native": (Job((4, 4, 2, 2), 2), Job((2, 2, 1, 1), None), Job((2, 1, 2, 1), 1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_saved_at_step_5_and_resharded_twice_keeps_its_curve(
    deepspeed_ranks: GangPool, tmp_path: Path, name: str
) -> None:
    """float32, AdamW, clipped: other layouts, stages and engines, against one float64 process.

    What each saves as loaded is, tensor by tensor and bit by bit, what it was given.
    """
    first, second, third = CHAINS[name]
    folders = [tmp_path / str(number) for number in range(3)]
    expected = reference_curve()
    jobs = (
        replace(first, target=folders[0]),
        replace(second, source=folders[0], target=folders[1], reshard=True, steps=(6, 8)),
        replace(third, source=folders[1], target=folders[2], reshard=True, steps=(9, STEPS)),
    )
    for job in jobs:
        done = do(deepspeed_ranks, job)
        assert [each.refusal for each in done] == [""] * job.fold[0]
        assert_close(curve(job, done), expected[job.steps[0] - 1 : job.steps[1]])
        if job.source is not None and job.target is not None:
            assert_same_tensors(everything(job.target, "as-loaded"), everything(job.source))


@pytest.mark.parametrize("fault", FAULTS)
def test_state_that_is_lost_or_another_s_bends_the_curve(
    deepspeed_ranks: GangPool, tmp_path: Path, fault: str
) -> None:
    """The comparison of curves is shown to fail: the step after the first feels it."""
    first, second, _ = CHAINS["stages"]
    expected = reference_curve()
    do(deepspeed_ranks, replace(first, target=tmp_path))
    job = replace(second, source=tmp_path, reshard=True, steps=(6, 8), fault=fault)
    actual = curve(job, do(deepspeed_ranks, job))
    assert_close(actual[:1], expected[5:6])
    with pytest.raises(AssertionError, match="step 2"):
        assert_close(actual, expected[5:8])


def test_masters_and_moments_survive_a_change_of_precision(
    deepspeed_ranks: GangPool, tmp_path: Path
) -> None:
    """bf16 ZeRO-1 -> native float32 -> fp16 ZeRO-2: float32 masters bit for bit at each.

    The loss scale of a run that had none is the config's, and the model's weights are the masters
    rounded (asserted whenever they are read).
    """
    folders = [tmp_path / name for name in ("bf16", "fp32", "fp16")]
    jobs = (
        Job(W4, 1, {**BF16, **FP32_SUM}, target=folders[0]),
        Job((2, 2, 2, 1), None, source=folders[0], target=folders[1], reshard=True, steps=(6, 6)),
        Job(W4, 2, FP16, source=folders[1], target=folders[2], reshard=True, steps=(7, 7)),
    )
    found = [do(deepspeed_ranks, job) for job in jobs]
    assert [each.refusal for done in found for each in done] == [""] * 10
    for source, target in itertools.pairwise(folders):
        assert_same_tensors(everything(target, "as-loaded"), everything(source))
    assert found[2][0].kept["training"]["loss_scale"]["cur_scale"] == 64.0
    assert found[2][0].kept["training"]["global_samples"] == 6 * MICRO_BATCHES


def test_parameter_groups_and_a_schedule_follow_to_other_families(
    deepspeed_ranks: GangPool, tmp_path: Path
) -> None:
    """Two groups are split to four at tp 2 and three at tp 1: 0.01, 0.03 halved twice.

    torch's schedule keeps one rate per group of the optimizer it has met.
    """
    folders = [tmp_path / name for name in ("tp2", "tp1", "native")]
    chain = (
        Job(W4, 1, schedule=True, target=folders[0]),
        Job((2, 1, 2, 1), 2, schedule=True, source=folders[0], target=folders[1], steps=(6, 8)),
        Job((2, 2, 2, 1), None, schedule=True, source=folders[1], target=folders[2], steps=(9, 9)),
        Job(W4, 0, schedule=True, source=folders[2], steps=(10, 10)),
    )
    rates = []
    for job in chain:
        done = do(deepspeed_ranks, replace(job, reshard=True))
        assert {each.refusal for each in done} == {""}
        rates.append(done[0].rates)
    quarter = [0.01 / 4, 0.03 / 4]
    assert rates[0] == [quarter[0]] * 3 + [quarter[1]]
    assert rates[1] == [quarter[0]] * 2 + [quarter[1]]
    assert rates[2] == quarter
    assert rates[3] == rates[0]


def test_weights_alone_can_be_taken_by_a_run_with_another_optimizer(
    deepspeed_ranks: GangPool, tmp_path: Path
) -> None:
    """load_module_only sets masters and model, and leaves counters and optimizer."""
    saved = do(deepspeed_ranks, Job(W4, 1, BF16, target=tmp_path, steps=(1, HALF)))
    job = Job(W4, 2, BF16, MOMENTUM, source=tmp_path, module_only=True, steps=(1, 1))
    for one, other in zip(saved, do(deepspeed_ranks, job), strict=True):
        for what in ("weights", "model"):
            assert other.kept[what] == one.kept[what]
        assert other.kept["training"]["global_steps"] == 0
        assert set(map(len, other.kept["optimizer"].values())) == {0}


# --- refusals ------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    """Lose the last byte of a shard of rank 3."""
    file = path / "model/shard-00004-model-00001-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and give it the checksum of what it then says: a wrong writer."""
    body = json.loads((path / archive.INDEX).read_text())
    body.pop("sha256")
    change(body)
    (path / archive.INDEX).write_text(json.dumps({"sha256": archive.digest(body), **body}))


def swap_family(path: Path) -> None:
    """Record an expert weight by the dense placement."""

    def change(body: dict[str, Any]) -> None:
        placement = body["tensors"]["model/layers.0.moe.experts.w1"]["placement"]
        placement |= {"family": "dense", "shards": [{"axis": "tp", "dim": 0, "segments": 1}]}

    rewrite(path, change)


def untouched(_: Path) -> None:
    """Leave the checkpoint as it is."""


REFUSALS: dict[str, tuple[Callable[[Path], None], dict[str, Any], tuple[str, ...]]] = {
    "truncated": (cut_off, {}, ("shard-00004", "truncated; expected")),
    "swapped family": (
        swap_family,
        {},
        ("layers.0.moe.experts.w1: another family or placement", "found dense cut dim 0 over tp"),
    ),
    "other layout": (
        untouched,
        {"fold": (4, 2, 2, 1)},
        ("another layout", "expected world 4, tp 2, ep 2, etp 1, found world 4, tp 2, ep 4"),
    ),
    "other optimizer": (
        untouched,
        {"optimizer": MOMENTUM},
        ("of another optimizer; expected SGD, found AdamW",),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_engine_stays(
    deepspeed_ranks: GangPool, tmp_path: Path, what: str
) -> None:
    """Four ranks say the same, and no bit of masters, model, optimizer or counters has moved."""
    damage, changes, said = REFUSALS[what]
    do(deepspeed_ranks, Job(W4, 1, {**BF16, **FP32_SUM}, target=tmp_path, steps=(1, HALF)))
    damage(tmp_path / "global_step5")
    job = replace(Job(W4, 1, {**BF16, **FP32_SUM}, source=tmp_path), **changes)
    refusals = {done.refusal for done in do(deepspeed_ranks, job)}
    assert len(refusals) == 1
    refusal = refusals.pop()
    assert [text for text in said if text not in refusal] == [], refusal


def step_apart(runtime: RankRuntime, folder: Path) -> None:
    """Save a native run in which one weight has been stepped more often than the others."""
    engine = build(Job((2, 2, 2, 1), None), runtime)
    train(engine, 1, 1)
    weight = engine.module.get_parameter("norm.weight")
    engine.optimizer.state[weight]["step"] += 1
    engine.save_checkpoint(folder)


@pytest.mark.parametrize(("stage", "refused"), [(0, False), (1, True), (2, True)])
def test_weights_that_zero_steps_as_one_need_one_counter(
    deepspeed_ranks: GangPool, tmp_path: Path, stage: int, refused: bool
) -> None:
    """A flat piece has one Adam counter; ZeRO-0 keeps one for each weight."""
    deepspeed_ranks.run(2, f"{HERE}:step_apart", [tmp_path] * 2, DEADLINE_S)
    job = Job((2, 2, 2, 1), stage, source=tmp_path, steps=(2, 2))
    said = "state unlike that of the parameters ZeRO steps with it"
    for done in do(deepspeed_ranks, job):
        assert (said in done.refusal) == refused, done.refusal
        assert ("norm.weight" in done.refusal) == refused


def unfinished(runtime: RankRuntime, folder: Path) -> list[str]:
    """Save and load after the first of four micro-batches, and save after the last."""
    engine = build(Job((1, 1, 1, 1), 2), runtime)
    train(engine, 1, 1)
    engine.save_checkpoint(folder)
    engine.backward(engine(**batch(2, 0)))
    engine.step()
    said = []
    for call in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(CheckpointError) as refusal:
            call(folder)
        said.append(str(refusal.value))
    for number in range(1, MICRO_BATCHES):
        engine.backward(engine(**batch(2, number)))
        engine.step()
    engine.save_checkpoint(folder)
    engine.close()
    return said


def test_inside_a_step_nothing_is_saved_or_loaded(
    deepspeed_ranks: GangPool, tmp_path: Path
) -> None:
    """Accumulated gradients are not part of a checkpoint, and DeepSpeed's cannot be dropped."""
    (said,) = deepspeed_ranks.run(1, f"{HERE}:unfinished", [tmp_path], DEADLINE_S)
    assert len(said) == 2
    assert all("the end of a step, found accumulated gradients" in text for text in said)
    assert (tmp_path / "latest").read_text() == "global_step2"


# --- what ZeRO left where ------------------------------------------------------------------------


def read_twice(runtime: RankRuntime, job: Job) -> list[str]:
    """Compare the gathered state with DeepSpeed's own reading, and with gathering bit by bit."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from fold_impl.partitions import Partitions

    engine = build(job, runtime)
    train(engine, 1, 2)
    held = engine._partitions
    small = Partitions(engine.optimizer, held._partitions, numel=50)
    odd = []
    whole, pieces = held.state({}), small.state({})
    masters, parts = held.masters({}), small.masters({})
    for member in engine.folded_parameters:
        keys = [key for key, value in whole[member.name].items() if value.ndim]
        pairs = [(masters[member.name], safe_get_full_fp32_param(member.parameter))]
        pairs += [(masters[member.name], parts[member.name])]
        for key in keys:
            own = whole[member.name][key]
            pairs += [(own, safe_get_full_optimizer_state(member.parameter, key))]
            pairs += [(own, pieces[member.name][key])]
        if not keys or any(not torch.equal(*pair) for pair in pairs):
            odd.append(member.name)
    engine.close()
    return odd


@pytest.mark.parametrize("kind", ["z1-adam", "z2-adamw", "z1-bf16-fp32", "z1-fp16"])
def test_what_is_gathered_is_what_deepspeed_reads(deepspeed_ranks: GangPool, kind: str) -> None:
    """Independent oracle: safe_get_full_*, of every group (docs/findings/0005), in any batches."""
    for odd in deepspeed_ranks.run(4, f"{HERE}:read_twice", [KINDS[kind]] * 4, DEADLINE_S):
        assert odd == []


def negative_zeros(runtime: RankRuntime, job: Job) -> list[bool]:
    """Set all momenta to -0.0 and read them."""
    engine = build(job, runtime)
    train(engine, 1, 1)
    state = {
        name: {key: torch.full_like(value, -0.0) for key, value in entries.items()}
        for name, entries in engine.optimizer_state().items()
    }
    engine.load_optimizer_state(state)
    found = [
        bool(value.signbit().all())
        for entries in engine.optimizer_state().values()
        for value in entries.values()
    ]
    engine.close()
    return found


def test_a_negative_zero_is_gathered_as_one(deepspeed_ranks: GangPool) -> None:
    """0.0 + -0.0 is 0.0, so values are not added but bits."""
    job = KINDS["z1-momentum"]
    for found in deepspeed_ranks.run(4, f"{HERE}:negative_zeros", [job] * 4, DEADLINE_S):
        assert len(found) > 10
        assert all(found)


# --- death during a save -------------------------------------------------------------------------


def test_a_process_killed_at_any_moment_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at every call to the file system, ZeRO-1 in bf16: the old state or the new one."""
    command = [sys.executable, "-m", "tests.fold_impl.killed_saves", str(tmp_path), "deepspeed"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [found["tag"] for found in lines] == ["second", "first"]
    for found in lines:
        outcomes = found["outcomes"]
        assert len(outcomes) >= 20, found
        assert set(outcomes) == {"first", "second"}, found
        assert outcomes == sorted(outcomes), found
